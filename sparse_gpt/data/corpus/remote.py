"""Sources on web servers and in object storage: copied whole to a local cache before they are read.

    https://HOST/FILE   s3://BUCKET/FILE_OR_FOLDER_OR_GLOB   gs://…   whatever else fsspec reads

A copy is CACHE/sources/HOST-URL/VERSION/NAME, the last two folders hashes: of the URL, and of what
the server says of the file's version (its ETag, else a hash or its time, with its size). So a file
that has changed is another copy, and one that is there is whole: it is named when it is complete.
Where the server says nothing of a version the file is copied each time; where no server answers,
the newest copy is taken. Processes that want one file at the same time take turns.
"""

import glob
import re
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from sparse_gpt.data.storage import cache, cannot_be_read, open_storage, require_room, status_of
from sparse_gpt.errors import DataError
from sparse_gpt.files import locked, publish, temporary
from sparse_gpt.progress import Progress

# What storages say of a file's version, the surest first.
_VERSIONS = (
    "ETag", "etag", "blob_id", "md5Hash", "Content-MD5", "Digest", "Last-Modified", "LastModified",
    "last_modified", "updated", "mtime", "created",
)  # fmt: skip


@dataclass(frozen=True)
class RemoteFile:
    """One file: its URL, its name within the source, bytes and version, each None if the server
    does not say; `storage` is fsspec's, `path` the file's in it. `old`: a copy of before, which has
    to do."""

    storage: Any
    path: str
    name: str
    size: int | None = None
    version: str | None = None
    old: Path | None = None

    @property
    def url(self) -> str:
        """Its own, whatever pattern it was found by."""
        return str(self.storage.unstrip_protocol(self.path))

    @property
    def place(self) -> Path:
        """The folder of all its versions' copies."""
        host = re.sub(r"[^\w.-]", "_", urlsplit(self.url).netloc.rpartition("@")[2])
        return cache("sources") / f"{host[:80]}-{_short(self.url)}"

    @property
    def copy(self) -> Path:
        """Where its copy is, or is to be."""
        return self.old or self.place / _short(self.version or "") / Path(self.name).name


def is_remote(source: str | Path) -> bool:
    """Whether a source is a URL."""
    return "://" in str(source)


def listed(
    url: str, is_wanted: Callable[[str], bool], tell: Callable[[str], None] | None
) -> list[RemoteFile]:
    """The files that a URL leads to, sorted; of folders those whose names within are wanted. `tell`
    gets a line where a copy of before has to do. Raises DataError if the URL cannot be read, or a
    pattern matches nothing."""
    try:
        storage, path = open_storage(url)
        if glob.has_magic(urlsplit(path).path if _is_web(url) else path):
            return _matching(storage, path, is_wanted)
    except DataError as error:
        raise DataError(f"{url}: {error}") from None
    except Exception as error:  # each kind of storage has its own
        raise cannot_be_read(url, error) from None
    try:
        info = storage.info(path)
        if info["type"] == "directory":
            return list(_inside(storage, info, is_wanted))
    except Exception as error:
        copies = _copies(RemoteFile(storage, path, ""))
        is_answer = isinstance(error.__cause__ or error, FileNotFoundError | PermissionError)
        if not copies or is_answer or status_of(error) is not None:
            raise cannot_be_read(url, error) from None
        old = copies[-1]
        if tell:
            when = time.strftime("%Y-%m-%d", time.localtime(old.stat().st_mtime))
            tell(f"{cannot_be_read(url, error)}; the copy of {when} is taken: {old}")
        return [RemoteFile(storage, path, old.name, old=old)]
    return [_file(storage, path, info, _name(path))]


def _matching(storage: Any, pattern: str, is_wanted: Callable[[str], bool]) -> list[RemoteFile]:
    """As the shell does, a pattern finds nothing hidden unless it says so; folders are read."""
    root = re.split(r"[*?[]", pattern, maxsplit=1)[0].rpartition("/")[0]
    found: list[RemoteFile] = []
    for path in sorted(storage.glob(pattern)):
        if "/." in path[len(root) :] and "/." not in pattern:
            continue
        info = storage.info(path)
        if info["type"] == "file":
            found.append(_file(storage, path, info, _name(path)))
        elif "**" not in pattern:
            inside = _inside(storage, info, is_wanted)
            found += [replace(file, name=_name(file.path)) for file in inside]
    if not found:
        raise DataError("the pattern matches no file")
    return found


def _inside(
    storage: Any, folder: dict[str, Any], is_wanted: Callable[[str], bool]
) -> Iterator[RemoteFile]:
    root = f"{folder['name'].rstrip('/')}/"
    for path, info in sorted(storage.find(root, detail=True).items()):
        if info["type"] == "file" and is_wanted(name := path.removeprefix(root)):
            yield _file(storage, path, info, name)


def fetched(files: list[RemoteFile], tell: Callable[[str], None] | None) -> list[Path]:
    """The local copies, made where they are missing; `tell` gets a line for a file that has changed
    since it was copied, and progress is drawn then. Raises DataError if a file cannot be copied."""
    missing = [file for file in files if not (file.old or (file.version and file.copy.exists()))]
    total = sum(file.size or 0 for file in missing)
    if missing:
        require_room(missing[0].url, total, cache("sources"))
        with Progress("copying", total, tell is not None) as bar:
            done = 0
            for file in missing:
                _fetch(file, tell, bar, done)
                done += file.size or 0
    return [file.copy for file in files]


def _fetch(file: RemoteFile, tell: Callable[[str], None] | None, bar: Progress, done: int) -> None:
    from fsspec.callbacks import Callback

    copy, aside = file.copy, temporary(file.copy)
    copy.parent.mkdir(parents=True, exist_ok=True)
    with locked(file.place / ".lock", wait=True):
        if file.version and copy.exists():  # another process was first
            return
        if tell and file.version and _copies(file):
            tell(f"{file.url}: has changed since it was copied; it is copied anew")
        try:
            callback = Callback(hooks={"at": lambda size, value, **_: bar.at(done + value)})
            file.storage.get_file(file.path, str(aside), callback=callback)
            size = aside.stat().st_size
            if file.size is not None and size != file.size:
                raise EOFError(f"{size:,} of its {file.size:,} bytes came; run again")
            file.storage.invalidate_cache()
            if _version(file.storage.info(file.path)) != file.version:
                raise EOFError("it changed while it was copied; run again")
            publish(copy)
        except Exception as error:
            raise cannot_be_read(file.url, error) from None
        finally:
            with suppress(FileNotFoundError):
                aside.unlink()


def _file(storage: Any, path: str, info: dict[str, Any], name: str) -> RemoteFile:
    if Path(name).name in ("", "..") or "\0" in name:
        raise DataError(f"{path}: names no file; give the address of one")
    return RemoteFile(storage, path, name, info.get("size"), _version(info))


def _version(info: dict[str, Any]) -> str | None:
    said = next((key for key in _VERSIONS if info.get(key)), None)
    return said and f"{info[said]} {info.get('size')}"


def _copies(file: RemoteFile) -> list[Path]:
    """Those of all versions, the oldest first."""
    found = (path for path in file.place.glob("*/[!.]*") if path.is_file())
    return sorted(found, key=lambda path: path.stat().st_mtime)


def _name(path: str) -> str:
    """What a file is called, of a URL without its query."""
    if _is_web(path):
        path = unquote(urlsplit(path).path)
    return path.rpartition("/")[2]


def _is_web(url: str) -> bool:
    return url.startswith(("http://", "https://"))


def _short(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:16]
