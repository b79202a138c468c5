"""Files that are whole or not there: written under another name, made to last, then named."""

import os
from pathlib import Path

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
