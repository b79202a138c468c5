"""What ends a process that reads a file is one line about that file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ranks import ENVIRONMENT, ROOT

from sparse_gpt.data.corpus.isolated import isolated
from sparse_gpt.errors import DataError, Resumable


def numbers(count: int, then: int | str | None = None) -> Iterator[tuple[int, bytes]]:
    for number in range(count):
        yield number, b"x" * number
    if isinstance(then, str):
        raise DataError(then)
    if then is not None:
        os.kill(os.getpid(), then)


def here() -> Iterator[tuple[str, bytes]]:
    yield os.getcwd(), b""


def pid() -> Iterator[tuple[int, bytes]]:
    yield os.getpid(), b""
    yield 0, b""


def test_it_yields_what_the_function_yields_in_a_process_that_is_used_again() -> None:
    assert list(isolated("a", numbers, 5)) == list(numbers(5))
    with pytest.raises(DataError, match=r"^what it says$"):
        list(isolated("a", numbers, 1, "what it says"))
    found = {tuple(isolated("a", pid)) for _ in range(3)}
    assert len(found) == 1
    assert os.getpid() not in dict(*found)


def test_it_follows_its_parent_to_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "a", tmp_path / "b"):
        folder.mkdir()
        monkeypatch.chdir(folder)
        assert list(isolated("a", here)) == [(str(folder), b"")]


def test_what_is_left_in_the_middle_is_ended() -> None:
    reading = isolated("a", pid)
    process, _ = next(reading)
    reading.close()  # type: ignore[attr-defined]
    assert not psutil.pid_exists(process)
    assert list(isolated("a", numbers, 2)) == list(numbers(2))


@pytest.mark.parametrize(
    ("ends_by", "error", "says"),
    [
        (signal.SIGABRT, DataError, "a.parquet: damaged so that reading it ended in SIGABRT"),
        (signal.SIGSEGV, DataError, "a.parquet: damaged so that reading it ended in SIGSEGV"),
        (signal.SIGKILL, Resumable, "a.parquet: its reader was killed, as the system does when"),
    ],
)
def test_its_death_is_told_and_the_next_goes_on(
    ends_by: int, error: type[DataError], says: str
) -> None:
    reading = isolated("a.parquet", numbers, 3, ends_by)
    assert [next(reading)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(error, match=says):
        next(reading)
    assert list(isolated("a", numbers, 2)) == list(numbers(2))


@pytest.mark.parametrize(
    "command",
    [
        ["prepare", "a.parquet", "--out", "out"],
        ["prepare", "a.parquet", "--out", "out", "--workers", "2"],
        ["prepare", "a.parquet", "--out", "out", "--workers", "2", "--shard-tokens", "20000"],
        ["vocab", "train", "a.parquet", "--out", "out", "--size", "300"],
    ],
)
def test_a_crash_in_native_code_ends_a_command_in_one_line(
    tmp_path: Path, command: list[str]
) -> None:
    texts = [f"document {n} of several words " * 50 for n in range(40_000)]
    how: dict[str, Any] = {"row_group_size": 1_000, "compression": "none", "use_dictionary": False}
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", **how)
    process = subprocess.Popen(
        [sys.executable, "-m", "sparse_gpt", *command],
        cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None:
        with suppress(psutil.Error):  # one that is gone by now
            for reader in _readers(process.pid):
                if reader.io_counters().read_chars > 20e6:  # of 62e6; 8e6 before it begins
                    reader.send_signal(signal.SIGSEGV)
        time.sleep(0.005)
    assert process.stderr is not None
    lines = [line for line in process.stderr.read().splitlines() if line.strip()]
    assert process.returncode == 2, lines
    assert "a.parquet" in lines[-1]
    assert "ended in SIGSEGV" in lines[-1]
    assert len(lines) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a.parquet"]


def _readers(parent: int) -> list[psutil.Process]:
    every = psutil.Process(parent).children(recursive=True)
    return [process for process in every if "_serve" in " ".join(process.cmdline())]
