"""Files that are whole or not there: written under another name, made to last, then named, by one
process at a time."""

import fcntl
import os
from pathlib import Path

from data.errors import DataError

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
