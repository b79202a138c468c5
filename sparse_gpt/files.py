"""Files and folders that are whole or not there: written under another name, made to last, then
named; by one process at a time.

A sealed JSON file is an object whose first key, "hash", is the sha256 of the file's own bytes with
the 64 digits of that hash replaced by zeros.
"""

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sparse_gpt.errors import DataError, told

TEMPORARY = ".tmp-"
# Of a folder that was written before: no waiting mends it, as room on a disk may come.
LOST = {errno.ENOENT, errno.ENOTDIR, errno.EROFS, errno.EACCES, errno.EPERM}
_ZEROS = "0" * 64
_LONGEST = 255  # bytes of a name on every file system that we know


def temporary(path: Path) -> Path:
    """The name under which `path` is written, no longer than a name may be where that is not."""
    name = TEMPORARY + path.name
    if len(os.fsencode(name)) > _LONGEST:
        name = TEMPORARY + hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]
    return path.with_name(name)


def real(path: str | Path) -> Path:
    """Where a path leads through its links; around a loop of them, to what nobody can open."""
    return Path(os.path.realpath(path))


@contextmanager
def refusing(path: str | Path) -> Iterator[None]:
    """What the file system refuses inside is said of `path`, or of the file that the error names.

    Raises DataError."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)  # of a full disk it has none
        raise DataError(told(error)) from None


def sync(path: Path) -> None:
    """Return when a file's content, or a folder's names, are on the disk; at once where the file
    system cannot say so, as some cannot of folders."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def publish(path: Path) -> None:
    """Give the whole, flushed temporary file or folder its name, and make content and name last."""
    aside = temporary(path)
    if aside.is_dir():
        for inner in aside.rglob("*"):
            sync(inner)
    sync(aside)
    os.replace(aside, path)
    sync(path.parent)


def publish_text(path: Path, text: str) -> None:
    """Make `path` a file of this text, in UTF-8."""
    publish_bytes(path, text.encode())


def publish_bytes(path: Path, content: bytes) -> None:
    """Make `path` a file of this content. Processes that do so at once take turns. An OSError names
    a file, and leaves none."""
    try:
        with _written_aside(path) as aside:
            aside.write_bytes(content)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


@contextmanager
def _written_aside(path: Path) -> Iterator[Path]:
    """The temporary file of `path`, there and locked: it becomes `path` at the end, or goes."""
    aside = temporary(path)
    with locked(aside, wait=True):  # else one empties what another is about to name
        try:
            yield aside
            publish(path)
        except BaseException:
            with suppress(OSError):
                aside.unlink()
            raise


def to_json(value: Any, indent: int | None = 1) -> str:
    """JSON that readers in any language take: NaN and infinities, which it has not, are null."""
    return json.dumps(_finite(value), indent=indent, allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, list | tuple) else value


def write_sealed(path: Path, fields: Mapping[str, Any]) -> str:
    """Publish `fields` as a sealed JSON file; the hash it got."""
    content = to_json({"hash": _ZEROS, **fields}) + "\n"
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
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise DataError(f"{path}: not a file of ours, or damaged; write it again") from None
    if whole != digest:
        raise DataError(f"{path}: damaged: its content does not match its own hash")
    return dict(fields)


def lock(path: Path, *, shared: bool = False, wait: bool = False, folder: bool = False) -> int:
    """Take the lock of a folder, or of a file; the handle that holds it. A file is made if missing,
    unless the lock is to be `shared`, for which who cannot write it may ask too.

    It is of what has the name now, not of what had it when the wait began. The kernel takes it back
    when the handle is closed or the process ends, even on SIGKILL. Raises BlockingIOError if
    another process holds it, unless it is to `wait`. Where a file system cannot lock, as some of
    networks, everybody gets it.
    """
    reading = shared or folder
    kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        handle = os.open(path, os.O_RDONLY if reading else os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(handle)
            raise
        except OSError:
            pass
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(handle), os.stat(path)):
                return handle
        os.close(handle)


@contextmanager
def locked(
    path: Path, *, shared: bool = False, wait: bool = False, folder: bool = False
) -> Iterator[None]:
    """Hold `lock` inside the `with`."""
    handle = lock(path, shared=shared, wait=wait, folder=folder)
    try:
        yield
    finally:
        os.close(handle)


@contextmanager
def new_file(out: str | Path) -> Iterator[Path]:
    """A file to write: it becomes `out` at the end, in place of one that was there, and goes where
    that is not reached. Through a link it becomes the file that the link leads to. Processes take
    turns. Raises DataError if `out` is no file, and for every OSError until then."""
    with refusing(out):
        out = real(out)
        if os.path.lexists(out) and not out.is_file():
            raise DataError(f"{out}: is there already, and is no file; choose another name")
        with _written_aside(out) as aside:  # what cannot be written is not worked for
            yield aside


@contextmanager
def new_folder(out: str | Path) -> Iterator[Path]:
    """A folder to fill: it becomes the new folder `out` at the end, and goes where that is not
    reached. Raises DataError if `out` is there and not empty, if another process fills it, and for
    every OSError until then: a full disk, say."""
    with refusing(out):
        out = real(out)
        aside = temporary(out)
        missing = [folder for folder in out.parents if not folder.exists()]
        try:
            aside.mkdir(parents=True, exist_ok=True)
            with locked(aside, folder=True):
                try:
                    if out.exists() and (not out.is_dir() or any(out.iterdir())):
                        raise DataError(f"{out}: is there already; choose another folder")
                    for left_by_a_killed_run in aside.iterdir():
                        left_by_a_killed_run.unlink()
                    yield aside
                    publish(out)
                except BaseException:
                    shutil.rmtree(aside, ignore_errors=True)
                    for folder in missing:  # the innermost first, as far as they are empty
                        with suppress(OSError):
                            folder.rmdir()
                    raise
        except BlockingIOError:
            raise DataError(f"{aside}: another run is writing there; wait for it to end") from None


@contextmanager
def replaced_folder(out: Path) -> Iterator[Path]:
    """A folder to fill: it takes the place of `out` at the end, or of the folder that this is a
    link to. Several processes take turns."""
    out = real(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with locked(out.with_name(f".{out.name}.lock"), wait=True):
        aside = temporary(out)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir()
        yield aside
        shutil.rmtree(out, ignore_errors=True)
        publish(out)
