"""Files that are whole or not there: written under another name, made to last, then named, by one
process at a time."""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sparse_gpt.errors import DataError

TEMPORARY = ".tmp-"


def temporary(path: Path) -> Path:
    """The name under which `path` is written."""
    return path.with_name(TEMPORARY + path.name)


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(path: Path) -> None:
    """Give the whole, flushed temporary file its name, and make the name last."""
    sync(temporary(path))
    os.replace(temporary(path), path)
    sync(path.parent)


def publish_text(path: Path, text: str) -> None:
    """Make `path` a file of this text, in UTF-8."""
    temporary(path).write_bytes(text.encode())
    publish(path)


def lock(handle: int, kind: int, folder: Path, who: str) -> None:
    """Take a lock of `fcntl.flock`, which the kernel takes back when the process ends, even on
    SIGKILL. Raises DataError if another process, a `who` that writes in `folder`, holds it."""
    try:
        fcntl.flock(handle, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{folder}: another {who} is writing there; wait for it to end") from None
    except OSError:
        pass  # some network file systems cannot lock


@contextmanager
def whole_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill: it becomes the new folder `out` at the end, and goes where that is not
    reached. Raises DataError if `out` is there and not empty, if another process fills it, and for
    every OSError until then: a full disk, say."""
    out = Path(out).resolve()
    aside = temporary(out)
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: is there already; choose another folder")
        aside.mkdir(parents=True, exist_ok=True)
        with _alone(aside):
            for left_by_a_killed_run in aside.iterdir():
                left_by_a_killed_run.unlink()
            try:
                yield aside
                for path in aside.iterdir():
                    sync(path)
                publish(out)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                for folder in missing:  # the innermost first
                    folder.rmdir()
                raise
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, fcntl.LOCK_EX, folder, "run")
        yield
    finally:
        os.close(handle)


_ZEROS = "0" * 64


def write_sealed(path: Path, fields: dict[str, Any]) -> str:
    """Publish `fields` as a sealed JSON file; the hash it got."""
    content = json.dumps({"hash": _ZEROS, **fields}, indent=1) + "\n"
    digest = hashlib.sha256(content.encode()).hexdigest()
    publish_text(path, content.replace(_ZEROS, digest, 1))
    return digest


def read_sealed(path: Path) -> dict[str, Any]:
    """The object in a sealed JSON file; raises DataError if it is not whole."""
    content = path.read_bytes()
    try:
        fields = json.loads(content)
        digest = fields["hash"]
        whole = hashlib.sha256(content.replace(digest.encode(), _ZEROS.encode(), 1)).hexdigest()
    except (ValueError, KeyError, TypeError, AttributeError):
        raise DataError(f"{path}: not a file of ours, or damaged; run prepare again") from None
    if whole != digest:
        raise DataError(f"{path}: damaged: its content does not match its own hash")
    return dict(fields)
