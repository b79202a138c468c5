"""Which files the sources are.

A source is a file, a folder (its files with a known suffix, in its folders and linked ones too, but
for hidden ones and `_SUCCESS`), a glob (of files and folders), a URL of these (remote.py), or a
data set of the hub (`hf:NAME[:SUBSET][:SPLIT]`). The suffixes, in any case, .jsonl and .ndjson mean
JSON Lines, .json those or a JSON document, .csv and .tsv a header and rows, .parquet rows of
columns, anything else UTF-8 text; .gz, .zst, .bz2 and .xz after any of them but .parquet are
undone.
"""

import codecs
import glob
import json
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from sparse_gpt.data.corpus.hub import HUB
from sparse_gpt.data.corpus.readers import open_content
from sparse_gpt.data.corpus.remote import fetched, is_remote, listed
from sparse_gpt.data.storage import interruptible
from sparse_gpt.errors import DataError

SUFFIXES = {
    ".txt": "text",
    ".text": "text",
    ".md": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}
_LITTER = {"_SUCCESS"}  # of Spark
CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
_LONG_LINE = 1 << 20  # bytes; a longer first line of an object is a line of JSON Lines

LeftOut = defaultdict[str, list[str]]  # names by kind


@dataclass(frozen=True)
class SourceFile:
    """One input file: where it is, its name without the way to it, and "text", "jsonl", "json",
    "csv", "tsv", "parquet" or "hub"; codec: one of CODECS' if it is compressed; held_out: all of it
    is for validation."""

    path: Path
    name: str
    kind: str
    codec: str | None = None
    held_out: bool = False


def find_files(
    sources: Sequence[str | Path],
    rows: str = "",
    tell: Callable[[str], None] | None = None,
) -> list[SourceFile]:
    """The files of all sources, each source's in sorted order; `tell` gets a line about a folder or
    glob of which something is left out. Raises DataError if there is none, a source does not
    exist or cannot be read, a file comes twice, or is plain text where `rows` says what needs
    rows."""
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        left_out: LeftOut = defaultdict(list)
        if is_remote(source):
            files += _remote_files(str(source), left_out, tell)
        elif str(source).startswith(HUB):
            files.append(SourceFile(path, str(source), "hub"))
        elif path.is_dir():
            found = _of_folder(path, left_out)
            if not found:
                raise _nothing_known(str(source), left_out)
            files += [_source_file(p, p.relative_to(path).as_posix()) for p in found]
        elif os.path.lexists(path):
            if not path.exists():
                raise DataError(f"{path}: is a link to {os.readlink(path)}, which is not there")
            files.append(_source_file(path, path.name))
        elif glob.has_magic(str(source)):
            found = _of_pattern(str(source), left_out)
            if not found:
                raise DataError(f"{source}: the pattern matches no file")
            files += [_source_file(p, p.name) for p in found]
        else:
            raise DataError(f"{source}: no such file or folder")
        if tell and (told := _listed("left out:", left_out)):
            tell(f"{source}: {told}")
    if not files:
        raise DataError("no source given: name a file, a folder or a pattern")
    seen: set[Path] = set()
    for file in files:
        if (real := file.path.resolve()) in seen:
            raise DataError(f"{file.path}: given twice among the sources; name it once")
        if rows and file.kind == "text":
            raise DataError(f"{file.path}: {rows}, but this file is plain text")
        seen.add(real)
    return files


def _nothing_known(folder: str, left_out: LeftOut) -> DataError:
    known = ", ".join(SUFFIXES)
    return DataError(
        f"{folder}: the folder holds no {known} file, compressed or not"
        + _listed("; there are", left_out)
    )


def _remote_files(
    url: str, left_out: LeftOut, tell: Callable[[str], None] | None
) -> list[SourceFile]:
    """The local copies of what a URL leads to."""
    with interruptible():
        files = listed(url, partial(_is_wanted_within, left_out=left_out), tell)
        if not files:
            raise _nothing_known(url, left_out)
        copies = fetched(files, tell)
    return [_source_file(copy, file.name) for copy, file in zip(copies, files, strict=True)]


def _is_wanted_within(name: str, left_out: LeftOut) -> bool:
    """Of a file's name within a folder."""
    *folders, last = name.split("/")
    if any(map(_is_hidden, folders)):
        left_out["in hidden folders"].append(name)
        return False
    return _is_wanted(last, left_out)


def _of_folder(folder: Path, left_out: LeftOut) -> list[Path]:
    """What to read of a folder, sorted; counts what not, by its kind.

    Links to folders are followed last, and no folder is entered twice, by whatever names it has.
    """
    files: list[Path] = []
    seen: set[str] = set()
    pending = [str(folder)]
    while pending:
        links: list[str] = []
        for top in pending:
            for where, folders, names in os.walk(top, onerror=_refuse):
                if (real := os.path.realpath(where)) in seen:
                    folders.clear()
                    continue
                seen.add(real)
                left_out["hidden folders"] += filter(_is_hidden, folders)
                folders[:] = sorted(name for name in folders if not _is_hidden(name))
                paths = [os.path.join(where, name) for name in folders]
                links += [path for path in paths if os.path.islink(path)]
                files += [Path(where, name) for name in names if _is_wanted(name, left_out)]
        pending = links
    for path in files:
        if not path.exists():
            raise DataError(f"{path}: is a link to {os.readlink(path)}, which is not there")
    return _once([path for path in files if path.is_file()])


def _of_pattern(pattern: str, left_out: LeftOut) -> list[Path]:
    found: list[Path] = []
    for path in map(Path, glob.glob(pattern, recursive=True)):
        if path.is_file() and path.name not in _LITTER:
            found.append(path)
        elif path.is_dir() and "**" not in pattern:
            found += _of_folder(path, left_out)
    return _once(found)


def _once(paths: list[Path]) -> list[Path]:
    """Sorted, and of several names of one file the first; what is no link goes before."""
    by_file: dict[str, Path] = {}
    for path in sorted(paths, key=lambda path: (path.is_symlink(), path)):
        by_file.setdefault(os.path.realpath(path), path)
    return sorted(by_file.values())


def _is_wanted(name: str, left_out: LeftOut) -> bool:
    if _is_hidden(name) or name in _LITTER:
        left_out["hidden"].append(name)
    elif _is_known(Path(name)):
        return True
    else:
        suffix = Path(name).suffix
        left_out[suffix or "without a suffix"].append(name)
    return False


def _is_hidden(name: str) -> bool:
    return name.startswith(".")


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}")


def _listed(head: str, left_out: LeftOut) -> str:
    """What was counted, most first, with a name or two; "" if nothing."""
    kinds = sorted(left_out.items(), key=lambda item: -len(item[1]))
    counts = ", ".join(
        f"{len(names):,} {kind} ({', '.join([*names[:2], *['…'][: len(names) - 2]])})"
        for kind, names in kinds
        if names
    )
    return f"{head} {counts}" if counts else ""


def _suffix(path: Path) -> str:
    """The suffix that says the kind: the one before that of a compressed file."""
    return (Path(path.stem) if path.suffix.lower() in CODECS else path).suffix.lower()


def _is_known(path: Path) -> bool:
    return _suffix(path) in SUFFIXES


def _source_file(path: Path, name: str) -> SourceFile:
    codec = CODECS.get(path.suffix.lower())
    kind = SUFFIXES.get(_suffix(path), "text")
    if codec and kind == "parquet":
        raise DataError(f"{path}: parquet has its own compression; undo the {path.suffix}")
    if kind == "json" and not _is_json_document(path, codec):
        kind = "jsonl"
    return SourceFile(path, name, kind, codec)


def _is_json_document(path: Path, codec: str | None) -> bool:
    """Whether a file is an array, or objects of several lines, rather than JSON Lines: its first
    line that is not blank says it."""
    try:
        with open_content(path, codec) as (content, _):
            line = content.readline(_LONG_LINE).removeprefix(codecs.BOM_UTF8)
            while line.isspace():
                line = content.readline(_LONG_LINE)
    except OSError:  # who reads it will say so
        return False
    text = line.decode(errors="replace").rstrip()
    if text.lstrip().startswith("["):
        return True
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        return bool(text) and len(line) < _LONG_LINE and error.pos == len(text)
    except (ValueError, RecursionError):
        pass
    return False
