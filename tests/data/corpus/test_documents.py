import json
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data.corpus.blocks import Reading, is_separated
from sparse_gpt.data.corpus.documents import Document, read
from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import cut
from sparse_gpt.data.corpus.sources import SourceFile, find_files
from sparse_gpt.errors import DataError


def texts(
    path: Path, separator: str | None = None, field: str = "text", slice_bytes: int = 4 << 20
) -> list[str]:
    (file,) = find_files([path])
    slices, _ = cut(file, separator, slice_bytes)
    return [document.text for document in good(read(slices, Reading(separator, field)))]


def good(documents: Iterable[Document | Reject]) -> Iterator[Document]:
    for document in documents:
        assert isinstance(document, Document), document
        yield document


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize(
    "content",
    [
        "plain\n",
        "crlf\r\nand\rcr\r\n",
        "a \ufeffmark within",
        "no end",
        "\x0b\x0c\x1c\x85\u2028x\u2029\x00y",
    ],
)
def test_text_is_taken_exactly(tmp_path: Path, content: str) -> None:
    assert texts(write(tmp_path / "a.txt", content)) == [content]
    assert texts(write(tmp_path / "marked.txt", "\ufeff" + content)) == [content]


def test_json_lines_are_taken_exactly(tmp_path: Path) -> None:
    documents = ["a\r\nb\r", "\u2028 line\x85", "😀 \ufeff", "<|endoftext|>", "\x00"]
    lines = [json.dumps({"text": d, "n": 1}, ensure_ascii=i % 2) for i, d in enumerate(documents)]
    path = write(tmp_path / "a.jsonl", "\ufeff" + "\r\n\r\n".join(lines))
    assert texts(path) == documents


@settings(max_examples=150)
@given(
    st.text("ab\r\n é", max_size=60) | st.lists(st.sampled_from(["\r\n", "a", "\n"])).map("".join),
    st.text("ab\r\n", min_size=1, max_size=3),
    st.integers(1, 20),
)
def test_slices_change_nothing(
    tmp_path_factory: pytest.TempPathFactory, content: str, separator: str, slice_bytes: int
) -> None:
    """However finely a text is cut, its documents are those of the whole: nothing lost, but for
    separators that are dropped."""
    path = write(tmp_path_factory.getbasetemp() / "slices.txt", content)
    kept, dropped = split(content, separator)
    assert texts(path, separator, slice_bytes=slice_bytes) == [p for p in kept if p.strip()]
    (file,) = find_files([path])
    assert is_separated(file, separator) == (len(kept) > 1)
    slices, _ = cut(file, separator, slice_bytes)
    found = good(read(slices, Reading(separator, "text", keep_separator=False)))
    lines, line = [], 1
    for piece in dropped:
        lines.append((line, piece))
        line += piece.count("\n") + separator.count("\n")
    assert [d[1:] for d in found] == [(line, piece) for line, piece in lines if piece.strip()]


def split(content: str, separator: str) -> tuple[list[str], list[str]]:
    """The pieces with and without separators, whose line ends match CRLF too, a step at a time."""
    kept, dropped, at = [""], [""], 0
    while at < len(content):
        end = at
        for char in separator:
            if char == "\n" and content.startswith("\r\n", end):
                end += 2
            elif content.startswith(char, end):
                end += 1
            else:
                kept[-1] += content[at]
                dropped[-1] += content[at]
                at += 1
                break
        else:
            kept.append(content[at:end])
            dropped.append("")
            at = end
    return kept, dropped


@settings(max_examples=100)
@given(
    text=st.text(st.sampled_from("ab \n\té☃\U0001f600"), max_size=200),
    share=st.floats(0.001, 0.999),
)
def test_a_last_part_is_cut_off_between_characters(
    tmp_path_factory: pytest.TempPathFactory, text: str, share: float
) -> None:
    path = write(tmp_path_factory.getbasetemp() / "last.txt", text)
    (file,) = find_files([path])
    found = list(good(read(cut(file, None)[0], Reading(None, "text", cut_last=share))))
    assert len(found) <= 2
    if len(found) == 2:
        assert "".join(document.text for document in found) == text
        assert found[1].line == 1 + found[0].text.count("\n")
        size = len(text.encode())
        assert share * size - 1 <= len(found[1].text.encode()) <= 2 * share * size + 4
    else:  # nothing but white space before the cut, or behind it
        assert all(document.text.strip() == text.strip() for document in found)


def test_json_lines_in_slices_keep_their_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", "".join(f'{{"text": "{i}"}}\n' for i in range(100)))
    (file,) = find_files([path])
    slices, row = cut(file, None, slice_bytes=50)
    assert len(slices) > 20
    found = list(read(slices, Reading(None, "text")))
    assert found == [Document("a.jsonl", i + 1, str(i)) for i in range(100)]
    assert row["bytes"] == path.stat().st_size == sum(s.end - s.start for s in slices)


def test_white_space_documents_are_dropped(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": ""}\n{"text": " \\n"}\n\n{"text": "x"}\n')
    assert texts(path) == ["x"]


def test_folders_and_globs_are_sorted(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.jsonl", "notes.rst"):
        write(tmp_path / name, "x")
    assert [f.name for f in find_files([tmp_path])] == ["a.txt", "b.txt", "sub/c.jsonl"]
    assert [f.name for f in find_files([f"{tmp_path}/*.txt"])] == ["a.txt", "b.txt"]
    assert [f.name for f in find_files([f"{tmp_path}/s*"])] == ["c.jsonl"]
    assert find_files([tmp_path / "notes.rst"]) == [
        SourceFile(tmp_path / "notes.rst", "notes.rst", "text")
    ]


def test_litter_is_left_out_and_told(tmp_path: Path) -> None:
    for folder in (".cache", "sub/.ipynb_checkpoints"):
        (tmp_path / folder).mkdir(parents=True)
        write(tmp_path / folder / "copy.txt", "x")
    for name in ("a.txt", "._a.txt", "_SUCCESS", "b.pdf", "c", "sub/d.txt"):
        write(tmp_path / name, "x")
    told: list[str] = []
    assert [f.name for f in find_files([tmp_path], tell=told.append)] == ["a.txt", "sub/d.txt"]
    [line] = told
    assert line.startswith(f"{tmp_path}: left out: ")
    listed = line.partition("out: ")[2]
    for kind in ("1 .pdf (b.pdf)", "1 without a suffix (c)"):
        assert kind in listed
    for kind, first, second in (
        ("2 hidden", "._a.txt", "_SUCCESS"),
        ("2 hidden folders", ".cache", ".ipynb_checkpoints"),
    ):
        assert f"{kind} ({first}, {second})" in listed or f"{kind} ({second}, {first})" in listed
    told.clear()
    found = find_files([f"{tmp_path}/*.txt", f"{tmp_path}/sub"], tell=told.append)
    assert [f.name for f in found] == ["a.txt", "d.txt"]
    assert told == [f"{tmp_path}/sub: left out: 1 hidden folders (.ipynb_checkpoints)"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    inside, outside = tmp_path / "in", tmp_path / "out"
    for folder in (inside / "a", inside / "b", outside / "deep"):
        folder.mkdir(parents=True)
    for path in (inside / "b/own.txt", outside / "one.txt", outside / "deep/two.txt"):
        write(path, path.name)
    (inside / "a/loop").symlink_to(inside)
    (inside / "a/to_b").symlink_to(inside / "b")
    (inside / "c").symlink_to(outside)
    (outside / "back").symlink_to(outside)
    (inside / "b/again.txt").symlink_to(outside / "one.txt")
    (inside / "own2.txt").symlink_to(inside / "b/own.txt")
    names = ["b/own.txt", "c/deep/two.txt", "c/one.txt"]
    assert [file.name for file in find_files([inside])] == names
    (inside / "dangling.txt").symlink_to(tmp_path / "nothing")
    with pytest.raises(DataError, match=r"dangling\.txt: is a link to .*nothing, which is not"):
        find_files([inside])
    with pytest.raises(DataError, match=r"dangling\.txt: is a link to .*nothing, which is not"):
        find_files([inside / "dangling.txt"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_folder_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "shut").mkdir(mode=0o000)
    write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=r"shut: cannot be read: Permission denied"):
        find_files([tmp_path])


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("none.txt", "none.txt: no such file or folder"),
        ("*.nothing", r"\*.nothing: the pattern matches no file"),
        ("empty", "empty: the folder holds no .txt"),
    ],
)
def test_sources_that_are_not_there(tmp_path: Path, source: str, says: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=says):
        find_files([tmp_path / source])


def test_a_file_given_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "x")
    with pytest.raises(DataError, match=r"a\.txt: given twice"):
        find_files([path, tmp_path])


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b"{not json}", "not JSON: Expecting property name"),
        (b'"text"', "not a JSON object"),
        (b'{"body": 1, "id": 2}', "no key 'text'; keys there: body, id"),
        (b'{"text": null}', "'text' is NoneType, must be a string"),
        (b'{"text": "\xff"}', "not UTF-8 text (byte 10 of the document is 0xff)"),
        (b'{"text": "\\ud800"}', "half a surrogate pair"),
        (b"[" * 100_000, "not JSON"),
    ],
)
@pytest.mark.parametrize("slice_bytes", [1, 4 << 20])
def test_a_bad_line_is_rejected_alone(
    tmp_path: Path, line: bytes, says: str, slice_bytes: int
) -> None:
    first, last = b'{"text": "fine"}\n\r\n\n\n\n', b'\n{"text": "too"}'
    path = write(tmp_path / "a.jsonl", first + line + last)
    (file,) = find_files([path])
    found = list(read(cut(file, None, slice_bytes)[0], Reading(None, "text")))
    assert found[0] == Document("a.jsonl", 1, "fine")
    assert found[2] == Document("a.jsonl", 7, "too")
    reject = found[1]
    assert isinstance(reject, Reject)
    assert (reject.file, reject.line) == ("a.jsonl", 6)
    assert says in reject.reason
    assert "\n" not in reject.reason


def test_bad_utf8_in_text_names_the_place(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"one\ntwo \xc3\x28-three\n-four\n")
    (file,) = find_files([path])
    slices = cut(file, "-")[0]
    assert list(read(slices, Reading("-", "text"))) == [
        Reject("a.txt", 1, "not UTF-8 text (byte 8 of the document is 0xc3), in line 2"),
        Document("a.txt", 2, "-three\n"),
        Document("a.txt", 3, "-four\n"),
    ]


def test_a_file_that_changes_under_the_reader(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "before")
    (file,) = find_files([path])
    slices, _ = cut(file, None)
    write(path, "behind")
    with pytest.raises(DataError, match="changed while it was being read"):
        list(read(slices, Reading(None, "text")))


def test_reading_files_needs_no_datasets(tmp_path: Path) -> None:
    """It takes a second a worker to import, and likes to make cache folders."""
    path = write(tmp_path / "a.txt", "text")
    code = (
        "import sys\n"
        "from sparse_gpt.data.corpus.slices import cut\n"
        "from sparse_gpt.data.corpus.documents import *\n"
        "from sparse_gpt.data.corpus.sources import find_files\n"
        f"(f,) = find_files([{str(path)!r}])\n"
        "print(next(read(cut(f, None)[0], Reading(None, 'text'))).text, 'datasets' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "text False\n", done.stderr
