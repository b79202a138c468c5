"""What tests of several rooms share: small data sets, a run file, the command in this process, a
disk that can be full; and which tests the fast lane leaves out."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import settings
from launching import launches
from ranks import ROOT, end_what_was_started

from sparse_gpt.cli.main import main
from sparse_gpt.data import prepare, train_vocab

os.environ.setdefault("OMP_NUM_THREADS", "1")  # each test process has a core; torch reads it

# Random tests draw anew each time, and keep what failed in .hypothesis/ until it passes. A CI draws
# the same each time: what it finds is a change's own doing. What was found once is an @example.
settings.register_profile("here", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "here")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what starts processes: `scripts/test fast` leaves it out."""
    for item in items:
        if isinstance(item, pytest.Function) and launches(item):
            item.add_marker("launches")


@pytest.fixture(autouse=True)
def _nothing_outlives_its_test() -> Iterator[None]:
    yield
    end_what_was_started()


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The novels, tokenized by chapter with a tenth held out, in a vocabulary of 1,024 ids."""
    folder = tmp_path_factory.mktemp("data")
    novels = sorted(map(str, (ROOT / "data/novels").glob("*.txt")))
    chapters = {"separator": "\nChapter ", "held_out": 0.1}
    train_vocab(novels, folder / "bpe", size=1024, **chapters, progress=False)
    prepare(novels, folder / "novels", vocab=folder / "bpe", **chapters)
    return folder / "novels"


@pytest.fixture(scope="session")
def pair(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Each novel by itself, in the vocabulary of `shards`."""
    folder = tmp_path_factory.mktemp("pair")
    for novel in sorted((ROOT / "data/novels").glob("*.txt")):
        prepare(
            [str(novel)],
            folder / novel.stem,
            vocab=shards.parent / "bpe",
            separator="\nChapter ",
            held_out=0.1,
        )
    return sorted(map(str, folder.iterdir()))


@pytest.fixture(scope="session")
def gpt2_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same as `shards` in GPT-2's vocabulary."""
    out = tmp_path_factory.mktemp("gpt2") / "novels"
    novels = sorted(map(str, (ROOT / "data/novels").glob("*.txt")))
    prepare(novels, out, separator="\nChapter ", held_out=0.1)
    return out


@pytest.fixture
def gpt2_run_file(run_file: Path, gpt2_shards: Path) -> Path:
    """`run_file` on those."""
    tree = yaml.safe_load(run_file.read_text())
    tree["data"]["path"], tree["model"]["vocab_size"] = str(gpt2_shards), 50257
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


@pytest.fixture
def run_file(tmp_path: Path, shards: Path) -> Path:
    """A run of seconds: 16 steps of 16 sequences of 32 tokens, micro-batches of 4."""
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {
            "preset": "tiny",
            "ffn": "default",
            "d_model": 32,
            "n_layer": 2,
            "n_head": 2,
            "max_seq_len": 32,
            "vocab_size": 1024,
        },
        "data": {"path": str(shards)},
        "batch": {"global_tokens": 512, "micro_batch": 4},
        "duration": {"steps": 16},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 4},
        "checkpoint": {"every": 4},
        "eval": {"every": 8, "max_tokens": 1024},
        "log": {"profile_every": 4},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@dataclass(frozen=True)
class Done:
    """How a command ended and what it said."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine has no GPU, as for the processes that ranks.py starts."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)


@pytest.fixture
def command(
    no_gpu: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Done]:
    """Runs the command line in this process, in the folder of the source."""
    monkeypatch.chdir(ROOT)

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["sparse-gpt", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            main()
        return Done(int(stopped.value.code or 0), *capsys.readouterr())

    return run


@pytest.fixture
def refused(command: Callable[..., Done]) -> Callable[..., str]:
    """Runs a command in this process; returns the one line with which it is refused."""

    def run(*arguments: object) -> str:
        done = command(*arguments)
        assert done.returncode == 2, done
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]

    return run


class SmallDisk:
    """A file system in memory that can be full."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._filler = folder, folder / "filler"
        folder.mkdir()

    def resize(self, mebibytes: int) -> None:
        """Give it this size, whatever is on it stays. Skips the test where it cannot be mounted."""
        size = f"size={mebibytes}m"
        options = f"remount,{size}" if os.path.ismount(self.folder) else size
        mount = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(self.folder)]
        if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
            pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")

    def fill(self) -> None:
        """Take what room there is, also what was freed since."""
        with self._filler.open("ab", buffering=0) as file, suppress(OSError):
            while True:
                file.write(bytes(1 << 16))

    def empty(self) -> None:
        """Give it back."""
        self._filler.unlink()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[SmallDisk]:
    """A disk of 2 MiB until it is resized; only root may mount one."""
    disk = SmallDisk(tmp_path / "disk")
    disk.resize(2)
    yield disk
    subprocess.run(["umount", "--lazy", str(disk.folder)], check=True)
