"""Whose turn it is to write a shard folder, and what is removed from it afterwards.

A run that does all units locks the folder. One that does part i of n shares that lock with the
other parts, and locks the file `.tmp-part-i-of-n` for itself. The kernel lets go of a lock when
its process ends, even on SIGKILL.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from sparse_gpt.data.corpus.rejects import REJECTED
from sparse_gpt.data.corpus.slices import NOTES
from sparse_gpt.data.preparation.units import Unit, count_records, files_of, refuse_strangers
from sparse_gpt.data.shards.manifest import MANIFEST
from sparse_gpt.data.vocabulary import VOCAB_FILE
from sparse_gpt.errors import DataError, Resumable
from sparse_gpt.files import TEMPORARY, lock, locked

_PART_LOCK = re.compile(r"\.tmp-part-(\d+)-of-(\d+)")
_PART_FILE = re.compile(r"\.tmp-(?:part|cuts)-\d+-of-\d+")


@dataclass(frozen=True)
class Part:
    """Part `number` (from 1) of `count`."""

    number: int = 1
    count: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise DataError(f"part is {self}; it is i/n with 1 ≤ i ≤ n")

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Part":
        """The part that "i/n" names; raises DataError."""
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None:
            raise DataError(f"part is {text!r}; it is i/n with 1 ≤ i ≤ n, e.g. 2/8")
        return cls(int(match[1]), int(match[2]))

    def of(self, units: list[Unit]) -> list[Unit]:
        """Its share: every `count`-th."""
        return units[self.number - 1 :: self.count]


def part_of_environment() -> str | None:
    """The part of this process as prepare's "i/n": by its task of a Slurm array, or RANK of
    WORLD_SIZE as launchers set them; None outside both."""
    for number, count, first in (
        ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN"),
        ("RANK", "WORLD_SIZE", ""),
    ):
        if number in os.environ and count in os.environ:
            rank = int(os.environ[number]) - int(os.environ.get(first, "0"))
            return f"{rank + 1}/{os.environ[count]}"
    return None


@contextmanager
def claim(out: Path, part: Part) -> Iterator[None]:
    """Hold this part of `out`, made if missing.

    On DataError, unless it is a Resumable and units are finished, what was noted there goes with
    the folders made for it.
    Raises DataError if `out` cannot be written, holds what no unit writes, or is held by another
    process.
    """
    missing: list[Path] = []
    try:
        missing += [folder for folder in (out, *out.parents) if not folder.exists()]
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        _remove_folders(missing)
        raise DataError(f"{out}: cannot write there: {error.strerror}") from None
    with ExitStack() as stack:
        stack.callback(_remove_folders, missing)
        _hold(out, part, stack)
        if part.count == 1:  # nobody else's
            stack.callback(_remove_temporaries, out)
        names = {MANIFEST, REJECTED, VOCAB_FILE}
        refuse_strangers(out, names | {TEMPORARY + name for name in names}, _PART_FILE)
        try:
            yield
        except DataError as error:
            if not (isinstance(error, Resumable) and count_records(out)):
                forget(out)
            raise


@contextmanager
def writing(out: Path, mine: list[Unit]) -> Iterator[None]:
    """On DataError, unless it is a Resumable, the files that these units' work has left since then
    go, and temporary ones of theirs in any case."""
    before = files_of(out, mine)
    try:
        yield
    except Resumable:
        raise
    except DataError:
        for path in files_of(out, mine) - before:
            path.unlink()
        raise
    finally:
        for path in files_of(out, mine):
            if path.name.startswith(TEMPORARY):
                path.unlink()


def forget(out: Path) -> None:
    """Remove the notes of all parts. Who still wants them cuts again."""
    for path in out.glob(f"{NOTES}*"):
        path.unlink(missing_ok=True)


@contextmanager
def publishing(out: Path, units: list[Unit]) -> Iterator[None]:
    """One process at a time; for when all units are finished."""
    with locked(units[0].record(out), wait=True):
        yield


def _hold(out: Path, part: Part, stack: ExitStack) -> None:
    stack.enter_context(_alone(out, out, "prepare", shared=part.count > 1, folder=True))
    if part.count == 1:
        return
    for path in out.iterdir():
        match = _PART_LOCK.fullmatch(path.name)
        if match and int(match[2]) != part.count:
            with _alone(path, out, f"prepare with part {match[1]}/{match[2]}"):
                path.unlink()  # of a run that was killed
    path = out / f"{TEMPORARY}part-{part.number}-of-{part.count}"
    stack.enter_context(_alone(path, out, f"prepare with part {part}"))
    stack.callback(path.unlink)


@contextmanager
def _alone(path: Path, out: Path, who: str, **how: bool) -> Iterator[None]:
    try:
        handle = lock(path, **how)
    except BlockingIOError:
        raise DataError(f"{out}: another {who} is writing there; wait for it to end") from None
    try:
        yield
    finally:
        os.close(handle)


def _remove_temporaries(out: Path) -> None:
    for path in out.glob(f"{TEMPORARY}*"):
        if not path.name.startswith(NOTES):
            path.unlink()


def _remove_folders(folders: list[Path]) -> None:
    """The innermost first, as far as they are empty."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
