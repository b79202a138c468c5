"""Data sets of the hub, over HTTP: the command against a server of the hub's protocol."""

import gzip
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import TOKEN, Hub

from sparse_gpt.data import prepare, verify
from sparse_gpt.data.shards.manifest import SPLITS, read_manifest

ROWS = [
    {"text": f"document {n} é😀\r\n" * (n % 7), "lang": "de" if n % 3 else "en"}
    for n in range(1500)
]
UNITS = ("--held-out", "0.1", "--shard-tokens", "1000")  # each file is a unit of its own
# Several commands in one process, which is quicker; the last with a token.
EACH = """
import os, sys
from sparse_gpt.cli.main import main
token, *sources = sys.argv[1:]
for source in sources:
    if source == sources[-1]:
        os.environ["HF_TOKEN"] = token
    sys.argv = ["sparse-gpt", "prepare", source, "--out", "never"]
    try:
        main()
    except SystemExit as stopped:
        print("exit", stopped.code, file=sys.stderr)
"""


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=100)
    return sink.getvalue()


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


CORPUS = {
    f"data/train-{n:05d}-of-00005.parquet": parquet(ROWS[300 * n : 300 * (n + 1)]) for n in range(5)
}
FIRST, _, _, FOURTH, FIFTH = CORPUS


class Commands:
    """Runs `sparse-gpt prepare` against a hub that holds `team/corpus`, in a folder of its own."""

    def __init__(self, folder: Path, hub: Hub) -> None:
        self.folder, self.hub = folder, hub

    def popen(self, *command: str, **env: str) -> "subprocess.Popen[str]":
        settings = {
            **{key: value for key, value in os.environ.items() if key != "HF_TOKEN"},
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.folder / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # which go elsewhere
            **env,
        }
        return subprocess.Popen(
            [sys.executable, *command],
            cwd=self.folder,
            env=settings,
            stderr=-1,
            stdout=-3,
            text=True,
        )

    def start(self, source: str, out: str, *options: str, **env: str) -> "subprocess.Popen[str]":
        return self.popen("-m", "sparse_gpt", "prepare", source, "--out", out, *options, **env)

    def run(self, source: str, out: str, *options: str, **env: str) -> str:
        """Of a command that succeeds, its stderr."""
        return ended(self.start(source, out, *options, **env))

    def hold(self, held: str) -> tuple[threading.Event, threading.Event]:
        """Events: somebody asks for the content of a file; go on and send it."""
        asked, go_on = threading.Event(), threading.Event()

        def fault(file: str, start: int, end: int) -> None:
            if file == held:
                asked.set()
                go_on.wait(300)

        self.hub.fault = fault
        return asked, go_on

    def write(self, out: str, content: dict[str, bytes]) -> None:
        (self.folder / out).mkdir()
        for name, written in content.items():
            (self.folder / out / name).write_bytes(written)

    def content(self, out: str) -> dict[str, bytes]:
        found = (self.folder / out).glob("[!.]*")
        return {path.name: path.read_bytes() for path in found}


def ended(command: "subprocess.Popen[str]", code: int = 0) -> str:
    _, stderr = command.communicate(timeout=120)
    assert command.returncode == code, stderr
    return stderr


@pytest.fixture
def commands(tmp_path: Path) -> Iterator[Commands]:
    with Hub() as hub:
        hub.push("team/corpus", CORPUS)
        yield Commands(tmp_path, hub)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The folder that UNITS makes of `team/corpus`."""
    with Hub() as hub:
        hub.push("team/corpus", CORPUS)
        commands = Commands(tmp_path_factory.mktemp("undisturbed"), hub)
        commands.run("hf:team/corpus", "out", *UNITS)
        made = commands.content("out")
    assert sum(name.startswith("unit-") for name in made) == 5
    return made


def shards(folder: Path) -> list[Any]:
    assert verify(folder) == []
    manifest = read_manifest(folder)
    return [(shard.bin, shard.idx) for split in SPLITS for shard in manifest.splits[split]]


def test_shards_are_those_of_the_local_files(commands: Commands, tmp_path: Path) -> None:
    running = commands.start("hf:team/corpus", "out", "--held-out", "0.1", "--workers", "2")
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS))
    prepare([tmp_path / "rows.jsonl"], tmp_path / "local", held_out=0.1)
    ended(running)
    assert shards(tmp_path / "out") == shards(tmp_path / "local")


def test_subset_split_column_and_rows_of_private_data_sets(
    commands: Commands, tmp_path: Path
) -> None:
    splits = [{"split": split, "path": f"de/{split}*"} for split in ("train", "test")]
    configs = [
        {"config_name": "en", "data_files": "en.jsonl"},
        {"config_name": "de", "data_files": splits},
    ]
    noise = np.random.default_rng(0)
    images = [
        {"image": noise.bytes(200_000), "lang": row["lang"], "body": row["text"]}
        for row in ROWS[:200]
    ]
    langs = {
        "README.md": f"---\n{json.dumps({'configs': configs})}\n---\n".encode(),
        "en.jsonl": lines(ROWS[200:]),
        "de/train.jsonl": lines(ROWS[:100]),
        "de/test.jsonl": lines(ROWS[100:200]),
    }
    for name, files in (("team/langs", langs), ("team/images", {"a.parquet": parquet(images)})):
        commands.hub.push(name, files)
        commands.hub.private.add(name)
    column = ("--text-field", "body", "--where", "lang=en")
    wanted = {
        "hf:team/langs:de:test": ((), ROWS[100:200]),
        "hf:team/images": (column, [row for row in ROWS[:200] if row["lang"] == "en"]),
    }
    running = [
        commands.start(source, source, "--held-out", "0.1", *options, HF_TOKEN=TOKEN)
        for source, (options, _) in wanted.items()
    ]
    for command, (source, (_, rows)) in zip(running, wanted.items(), strict=True):
        ended(command)
        manifest = read_manifest(tmp_path / source)
        assert sum(map(manifest.documents, SPLITS)) == sum(row["text"] != "" for row in rows)
    # Of 40 MB, little more than what is read ahead.
    sent = sum(end - start for file, start, end in commands.hub.sent if file == "a.parquet")
    assert sent < 10_000_000


def test_what_cannot_be_opened_or_read_is_one_line(commands: Commands) -> None:
    hub, whole = commands.hub, gzip.compress(lines(ROWS))
    readme = b"---\nconfigs:\n- {config_name: a, data_files: a.jsonl}\n"
    hub.push("team/private", CORPUS)
    hub.push("team/gated", CORPUS)
    hub.push("team/script", {**CORPUS, "script.py": b""})
    hub.push("team/empty", {".gitattributes": b""})
    more = b"- {config_name: b, data_files: a.jsonl}\n---\n"
    hub.push("team/subsets", {"a.jsonl": lines(ROWS), "README.md": readme + more})
    hub.push("team/broken", {"a.parquet": b"no parquet"})
    hub.push("team/line", {"a.jsonl": lines(ROWS), "b.jsonl": lines(ROWS) + b"{"})
    hub.push("team/cut", {"a.jsonl.gz": whole, "b.jsonl.gz": whole[:-100]})
    hub.private.add("team/private")
    hub.gated.add("team/gated")
    says = {
        "hf:team/none": "Dataset 'team/none' doesn't exist on the Hub or cannot be accessed; check "
        "the name, and set HF_TOKEN to a token that may read it if it is private",
        "hf:team/private": "Dataset 'team/private' doesn't exist on the Hub or cannot be accessed; "
        "check the name, and set HF_TOKEN to a token that may read it if it is private",
        "hf:team/gated": "401 Client Error. Cannot access gated repo for url ",
        "hf:team/script": "Dataset scripts are no longer supported, but found script.py",
        "hf:team/empty": "The directory at hf://datasets/team/empty",
        "hf:team/subsets": "Config name is missing. Please pick one among the available configs: "
        "['a', 'b']",
        "hf:team/subsets:c": "BuilderConfig 'c' not found. Available: ['a', 'b']",
        "hf:team/corpus::dev": "Bad split: dev. Available splits: ['train']",
        "hf:team/broken": "Parquet magic bytes not found",
        "hf:team/line": "b.jsonl: JSON parse error",
        "hf:team/cut": "b.jsonl.gz: Compressed file ended before the end-of-stream marker was "
        "reached; download the files and prepare those: there, a broken line is set aside",
        "hf:team/corpus::train:": "a hub data set is hf:NAME[:SUBSET][:SPLIT]",
        "hf:team/corpus": "Client error '401 Unauthorized' for url ",  # for the token is wrong
    }
    stderr = ended(commands.popen("-c", EACH, "hf_of_nobody", *says))
    assert "Traceback" not in stderr
    found = [line for line in stderr.splitlines() if line.startswith(("error: ", "exit "))]
    for (source, text), error, code in zip(says.items(), found[::2], found[1::2], strict=True):
        assert error.startswith(f"error: {source}: ")
        assert text in error
        assert ("set HF_TOKEN" in error) == (source[8:] in ("none", "private", "gated", "corpus"))
        assert code == "exit 2"
    assert not (commands.folder / "never").exists()


def test_a_crash_in_native_code_is_one_line(commands: Commands) -> None:
    asked, go_on = commands.hold(FOURTH)  # of the first one's columns the command itself asks
    running = commands.start("hf:team/corpus", "out", "--held-out", "0.1")
    assert asked.wait(120)
    for process in psutil.Process(running.pid).children(recursive=True):
        process.send_signal(signal.SIGSEGV)
    stderr = ended(running, code=2)
    go_on.set()
    assert "hf:team/corpus: damaged so that reading it ended in SIGSEGV" in stderr
    assert stderr.count("\n") == 1
    assert not (commands.folder / "out").exists()


def test_a_server_that_fails_for_a_while(commands: Commands, tmp_path: Path) -> None:
    wide, narrow = ([{**row, "noise": "x" * n} for row in ROWS] for n in (14_000, 9))
    commands.hub.push(
        "team/wide", {"a.jsonl": lines(wide), "b.jsonl.gz": gzip.compress(lines(narrow))}
    )
    faults = [("a.jsonl", 10_000_000, "drop"), ("b.jsonl.gz", 0, 503)]

    def fault(file: str, start: int, end: int) -> int | str | None:
        if faults and faults[0][0] == file and start >= faults[0][1]:
            return faults.pop(0)[2]
        return None

    commands.hub.fault = fault
    command = commands.start("hf:team/wide", "out", "--held-out", "0.1")
    (tmp_path / "rows.jsonl").write_bytes(lines(ROWS + ROWS))
    prepare([tmp_path / "rows.jsonl"], tmp_path / "local", held_out=0.1)
    ended(command)
    assert not faults
    assert shards(tmp_path / "out") == shards(tmp_path / "local")


@pytest.mark.long
def test_a_server_that_fails_for_good_and_other_commits(
    commands: Commands, request: pytest.FixtureRequest
) -> None:
    hub = commands.hub
    hub.fault = lambda file, start, end: 503 if file == FOURTH else None
    failing = commands.start("hf:team/corpus", "out", *UNITS)
    undisturbed = request.getfixturevalue("undisturbed")  # made while that tries again
    stderr = ended(failing, code=2)
    assert "Traceback" not in stderr
    last = stderr.splitlines()[-1]
    assert last.startswith(
        f"error: hf:team/corpus: {FOURTH}: Server error '503 Service Unavailable'"
    )
    assert last.endswith("; run again to go on from what is finished")
    kept = commands.content("out")
    assert kept
    assert kept.items() <= undisturbed.items()

    # A word in its README changes no input; a commit amid a run does not reach it.
    hub.push("team/corpus", {**CORPUS, "README.md": b"# A word about it"})
    sent_before = len(hub.sent)
    asked, go_on = commands.hold(FIFTH)
    patient = {"HF_HUB_DOWNLOAD_TIMEOUT": "300"}  # it asks again for what is held, else
    resumed = commands.start("hf:team/corpus", "out", *UNITS, **patient)
    assert asked.wait(60)
    hub.push("team/corpus", {**CORPUS, FIFTH: CORPUS[FIRST]})
    commands.write("whole", undisturbed)
    other = commands.start("hf:team/corpus", "whole", *UNITS)
    stderr = ended(other, code=2)
    assert stderr.startswith("error: whole: holds shards made from other input or options (")
    assert commands.content("whole") == undisturbed
    go_on.set()
    ended(resumed)
    assert commands.content("out") == undisturbed
    fetched = [file for file, _, _ in hub.sent[sent_before:]]
    assert fetched.count(FIFTH) == 1
    assert fetched.count(FIRST) == 2  # done before: once by each for its columns


def test_a_killed_run_is_finished_by_two_parts(
    commands: Commands, undisturbed: dict[str, bytes], tmp_path: Path
) -> None:
    asked, go_on = commands.hold(FOURTH)
    killed = commands.start("hf:team/corpus", "out", *UNITS)
    assert asked.wait(60)
    killed.send_signal(signal.SIGKILL)
    ended(killed, code=-signal.SIGKILL)
    go_on.set()
    records = [name for name in commands.content("out") if name.startswith("unit-")]
    assert len(records) == 1
    parts = [commands.start("hf:team/corpus", "out", *UNITS, "--part", f"{n}/2") for n in (1, 2)]
    for part in parts:
        ended(part)
    assert commands.content("out") == undisturbed


def test_workers_that_meet_another_commit_do_not_mix(
    commands: Commands, undisturbed: dict[str, bytes]
) -> None:
    asked, go_on = commands.hold(FIRST)
    running = commands.start("hf:team/corpus", "out", *UNITS, "--workers", "2")
    assert asked.wait(60)  # the parent has its commit, the workers are not yet started
    commands.hub.push("team/corpus", {**CORPUS, FIFTH: CORPUS[FIRST]})
    go_on.set()
    stderr = ended(running, code=2)
    assert stderr == "error: hf:team/corpus: changed while it was being read; run again\n"
    kept = commands.content("out")
    assert [name for name in kept if name.startswith("unit-")]
    assert kept.items() <= undisturbed.items()
