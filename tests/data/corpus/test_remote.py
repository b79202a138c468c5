"""Sources by URL: from a web server that is made to fail in every way, and from object storage."""

import gzip
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from sparse_gpt.data import prepare, train_vocab
from sparse_gpt.data import storage as storage_of_urls
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.data.shards.manifest import Manifest
from sparse_gpt.errors import DataError


@dataclass
class Web:
    """What a web server holds, by path, and how it answers.

    etags     whether it says versions            asked  the requests, "HEAD /a.jsonl"
    encoding  what it says of .gz files
    answer    of a path: a status instead of the file
    cut       of a path: so many bytes of it are sent, and the connection ends
    on_get    called before content is sent
    """

    files: dict[str, bytes]
    etags: bool = True
    encoding: str = "identity"
    asked: list[str] = field(default_factory=list)
    answer: dict[str, int] = field(default_factory=dict)
    cut: dict[str, int] = field(default_factory=dict)
    on_get: Callable[[], None] = lambda: None
    server: Any = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def end(self) -> None:
        """From now on nobody answers."""
        self.server.shutdown()
        self.server.server_close()


def handler(web: Web) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send(body=False)

        def do_GET(self) -> None:
            self.send(body=True)

        def send(self, body: bool) -> None:
            path = self.path.partition("?")[0]
            web.asked.append(f"{self.command} {path}")
            content = web.files.get(path)
            status = web.answer.get(path, 404 if content is None else 200)
            if status != 200 or content is None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            if body:
                web.on_get()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            if web.etags:
                self.send_header("ETag", f'"{hash(content)}"')
            if path.endswith(".gz"):
                self.send_header("Content-Encoding", web.encoding)
            if path.endswith("/"):
                self.send_header("Content-Type", "text/html")
            self.end_headers()
            if body:
                self.wfile.write(content[: web.cut.get(path)])
                self.close_connection = path in web.cut

        def log_message(self, *_: Any) -> None:
            pass

    return Handler


@pytest.fixture
def web(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Web]:
    """Serving until the test ends; the cache is the test's own."""
    monkeypatch.setenv("SPARSE_GPT_CACHE", str(tmp_path / "cache"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    web = Web({})
    web.server = ThreadingHTTPServer(("127.0.0.1", 0), handler(web))
    thread = threading.Thread(target=web.server.serve_forever, args=(0.01,))
    thread.start()
    yield web
    web.end()
    thread.join()


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def texts(url: str, told: list[str] | None = None) -> list[str]:
    files = find_files([url], tell=None if told is None else told.append)
    return [
        json.loads(line)["text"] for file in files for line in file.path.read_bytes().splitlines()
    ]


def test_a_file_is_copied_once_a_version(web: Web, tmp_path: Path) -> None:
    web.files["/a.jsonl"] = lines("old")
    told: list[str] = []
    assert texts(f"{web.url}/a.jsonl", told) == ["old"]
    assert texts(f"{web.url}/a.jsonl", told) == ["old"]
    assert (web.asked.count("GET /a.jsonl"), told) == (1, [])
    web.files["/a.jsonl"] = lines("new")  # of the same size
    assert texts(f"{web.url}/a.jsonl", told) == ["new"]
    assert told == [f"{web.url}/a.jsonl: has changed since it was copied; it is copied anew"]
    web.files["/a.jsonl"] = lines("old")
    assert texts(f"{web.url}/a.jsonl", told) == ["old"]
    assert (web.asked.count("GET /a.jsonl"), len(told)) == (2, 1)
    for path in (tmp_path / "cache" / "sources").rglob("*"):
        assert not path.name.startswith(".tmp-")


def test_without_a_version_it_is_copied_each_time(web: Web) -> None:
    web.etags = False
    for text in ("old", "new"):
        web.files["/a.jsonl"] = lines(text)
        assert texts(f"{web.url}/a.jsonl") == [text]


def test_where_nobody_answers_the_newest_copy_is_taken_or_one_line_told(web: Web) -> None:
    for text in ("old", "new"):
        web.files["/a.jsonl"] = lines(text)
        assert texts(f"{web.url}/a.jsonl") == [text]
    web.answer["/a.jsonl"] = 503  # an answer
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: the server answers 503"):
        texts(f"{web.url}/a.jsonl")
    web.end()
    told: list[str] = []
    assert texts(f"{web.url}/a.jsonl", told) == ["new"]
    (line,) = told
    assert line.startswith(f"{web.url}/a.jsonl: cannot be read: Cannot connect to host")
    assert "; the copy of 20" in line
    for url in (f"{web.url}/other.jsonl", f"{web.url}/*.jsonl", f"{web.url}/a.jsonl?v=2"):
        with pytest.raises(DataError, match=r"cannot be read: .*[Cc]onnect") as error:
            texts(url)
        assert "\n" not in str(error.value)


def test_names_queries_and_patterns(web: Web) -> None:
    web.files["/two%20words.jsonl"] = lines("a")
    web.files["/x/b.jsonl.gz"] = gzip.compress(lines("b"))
    web.files["/x/"] = b'<a href="b.jsonl.gz">b</a> <a href="c.txt">c</a> <a href="no.csv">no</a>'
    web.files["/x/c.txt"] = b"text"
    (file,) = find_files([f"{web.url}/two%20words.jsonl?download=true&name=a/b.txt"])
    assert (file.name, file.kind, file.codec) == ("two words.jsonl", "jsonl", None)
    (file,) = find_files([f"{web.url}/x/*.gz"])
    assert (file.name, file.kind, file.codec) == ("b.jsonl.gz", "jsonl", "gzip")
    assert gzip.decompress(file.path.read_bytes()) == lines("b")
    with pytest.raises(DataError, match="the pattern matches no file"):
        find_files([f"{web.url}/x/*.zst"])
    with pytest.raises(DataError, match="given twice among the sources"):
        find_files([f"{web.url}/x/c.txt", f"{web.url}/x/*.txt"])
    with pytest.raises(DataError, match=r"x/\*\.csv: cannot be read: the server answers 404"):
        find_files([f"{web.url}/x/*.csv"])
    with pytest.raises(DataError, match="names no file; give the address of one"):
        find_files([f"{web.url}/x/"])
    web.files["/x/%00"] = b""
    with pytest.raises(DataError, match="names no file; give the address of one"):
        find_files([f"{web.url}/x/%00"])


def test_an_address_is_asked_for_as_it_is_written(web: Web, tmp_path: Path) -> None:
    """Signed ones are no others' then; and a name that hides a way leads nowhere."""
    web.files["/x/..%2f..%2fy.txt"] = b"text"
    (file,) = find_files([f"{web.url}/x/..%2f..%2fy.txt?sign=a%2fb%2B%3d&ids[]=1&name=a::*.txt"])
    assert (file.name, file.path.read_bytes()) == ("y.txt", b"text")
    assert file.path.resolve().is_relative_to((tmp_path / "cache").resolve())


def test_packed_files_come_packed_whatever_the_server_calls_it(web: Web) -> None:
    web.encoding = "gzip"  # as many do; then they say no size that could be compared
    web.files["/a.jsonl.gz"] = gzip.compress(lines("a"))
    (file,) = find_files([f"{web.url}/a.jsonl.gz"])
    assert file.path.read_bytes() == web.files["/a.jsonl.gz"]


def spoil(web: Web) -> None:
    web.files["/a.jsonl"] += b" "


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (lambda web: web.cut.update({"/a.jsonl": 700}), "cannot be read: "),
        (lambda web: web.answer.update({"/a.jsonl": 403}), "403 Forbidden; check the address, and"),
        (lambda web: web.answer.update({"/a.jsonl": 404}), "the server answers 404"),
        (
            lambda web: setattr(web, "on_get", lambda: spoil(web)),
            r"came; run again|it changed whil",
        ),
    ],
    ids=["cut short", "forbidden", "not there", "changes"],
)
def test_what_fails_is_one_line_and_leaves_nothing(
    web: Web, tmp_path: Path, fault: Callable[[Web], None], says: str
) -> None:
    web.files["/a.jsonl"] = lines(*map(str, range(100)))
    fault(web)
    with pytest.raises(DataError, match=rf"^{web.url}/a\.jsonl: .*{says}") as error:
        prepare([f"{web.url}/a.jsonl"], tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
    assert [path for path in tmp_path.rglob("*.jsonl") if path.is_file()] == []
    web.cut, web.answer, web.on_get = {}, {}, lambda: None
    assert prepare([f"{web.url}/a.jsonl"], tmp_path / "out") is not None


def test_a_server_that_falls_silent(web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    web.files["/a.jsonl"] = lines("a")
    monkeypatch.setattr(storage_of_urls, "_SILENT", 1)
    go_on = threading.Event()
    web.on_get = lambda: go_on.wait(60) and None
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read: Timeout on reading data"):
        texts(f"{web.url}/a.jsonl")
    go_on.set()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("https://nowhere.invalid/a.txt", "cannot be read: Cannot connect to host nowhere.invalid"),
        ("nowhere://a/b.txt", "cannot be read: Protocol not known: nowhere"),
        ("http:///a.txt", "cannot be read: InvalidUrlClientError"),
        ("memory://a/b.txt", "cannot be read: is not there; check the address"),
    ],
)
def test_addresses_that_lead_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, says: str
) -> None:
    monkeypatch.setenv("SPARSE_GPT_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError, match=f"^{url}: {says}") as error:
        prepare([url], tmp_path / "out")
    assert "\n" not in str(error.value)


def shards(manifest: Manifest | None) -> Any:
    assert manifest is not None
    return manifest.hash, manifest.splits


def test_corpora_are_those_of_the_local_files(web: Web, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for number in range(2):
        content = lines(*(f"{number} {n}" for n in range(50)))
        web.files[f"/{number}.jsonl"] = content
        (tmp_path / "in" / f"{number}.jsonl").write_bytes(content)
    sources = [f"{web.url}/{number}.jsonl" for number in range(2)]
    local = prepare([tmp_path / "in"], tmp_path / "local")
    assert shards(prepare(sources, tmp_path / "out")) == shards(local)
    web.end()
    assert shards(prepare(sources, tmp_path / "out")) == shards(local)
    train_vocab(sources, tmp_path / "vocab", size=262)
    prepare(sources[:1], tmp_path / "apart", held_out_from=sources[1:])


def test_who_wants_one_file_at_once_copies_it_once(web: Web) -> None:
    """Threads here; what they take turns by is a lock of the kernel's, so processes do too."""
    web.files["/a.jsonl"] = lines(*map(str, range(1000)))
    go_on = threading.Event()
    web.on_get = lambda: go_on.wait(60) and None
    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(texts, f"{web.url}/a.jsonl") for _ in range(3)]
        while web.asked.count("HEAD /a.jsonl") < 3:
            assert not any(one.done() for one in running)
        go_on.set()
        assert {len(one.result()) for one in running} == {1000}
    assert web.asked.count("GET /a.jsonl") == 1


def test_an_interrupt_while_it_copies_says_nothing_and_leaves_nothing(
    web: Web, tmp_path: Path
) -> None:
    web.files["/a.jsonl"] = lines("a")
    go_on = threading.Event()
    web.on_get = lambda: go_on.wait(60) and None
    code = (
        "import signal; from sparse_gpt.cli.main import main;"
        "signal.signal(signal.SIGINT, signal.default_int_handler); main()"  # ours may be ignored
    )
    command = [sys.executable, "-c", code, "prepare", f"{web.url}/a.jsonl", "--out"]
    process = subprocess.Popen([*command, str(tmp_path / "out")], stderr=-1, text=True)
    while "GET /a.jsonl" not in web.asked:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    go_on.set()
    assert (process.returncode, stderr) == (130, "")
    left = [path.name for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert (left, (tmp_path / "out").exists()) == ([".lock"], False)


def test_folders_and_patterns_of_object_storage(storage: Any, scheme: str, tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    for name in ("a.jsonl", "in/b.jsonl", "in/.hidden/c.jsonl", ".d.jsonl", "in/_SUCCESS", "x.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(lines(f"of {name}", "and more"))
    storage.put(f"{folder}/", "team/corpus/", recursive=True)
    local = prepare([folder], tmp_path / "local")
    told: list[str] = []
    assert texts(f"{scheme}://team/corpus", told)[::2] == ["of a.jsonl", "of in/b.jsonl"]
    (line,) = told
    for name in ("1 .bin (x.bin)", "2 hidden (.d.jsonl, _SUCCESS)", "1 in hidden folders"):
        assert name in line
    assert shards(prepare([f"{scheme}://team/corpus/"], tmp_path / "out")) == shards(local)
    assert texts(f"{scheme}://team/corpus/*.jsonl")[::2] == ["of a.jsonl"]
    assert texts(f"{scheme}://team/corpus/.*.jsonl")[::2] == ["of .d.jsonl"]
    assert texts(f"{scheme}://team/corp*")[::2] == ["of a.jsonl", "of in/b.jsonl"]
    assert texts(f"{scheme}://team/**/b.jsonl")[::2] == ["of in/b.jsonl"]
    assert texts(f"{scheme}://team/corpus/in/b.jsonl")[::2] == ["of in/b.jsonl"]
    shutil.rmtree(tmp_path / "cache" / "sources")
    storage.pipe_file("team/corpus/a.jsonl", lines("other"))
    assert texts(f"{scheme}://team/corpus")[0] == "other"
    storage.pipe_file("team/corpus/a.jsonl", lines("third"))
    assert texts(f"{scheme}://team/corpus", told)[0] == "third"
    assert "a.jsonl: has changed since it was copied" in told[-2] + told[-1]
    for source in ("corpus/none.jsonl", "none/*.jsonl", "none"):
        with pytest.raises(
            DataError, match=f"^{scheme}://team/{source.replace('*', '.')}"
        ) as error:
            texts(f"{scheme}://team/{source}")
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="none-there"):
        texts(f"{scheme}://none-there/a.jsonl")
