"""Sources to a stream of documents.

    sources ──find_files──▶ files ──cut──▶ slices ──read──▶ documents, and rejects

A source is a file, a folder (its .txt, .jsonl, .ndjson and .json files, recursively) or a glob; the
last three suffixes mean JSON Lines (one object a line, blank lines skipped), anything else is
UTF-8 text: one document a file, or split before each `separator`, which stays at the head of the
document it opens. Text is taken exactly as it lies in the file (CRLF and a byte-order mark
included; JSON Lines may begin with a mark, which is not part of any text). Documents of nothing
but white space are dropped.

A slice is a byte range of one file that holds whole documents, so that slices can be read by any
process in any order. They are cut by one sequential pass over the input, which also hashes it. The
parsing is ours because the text and JSON readers of `datasets` neither keep line ends nor can say
which line is broken, and cost a second a worker to import.
"""

import codecs
import glob
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from data.errors import DataError
from data.rejects import Reject

SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
SLICE_BYTES = 4 << 20  # what one worker tokenizes at a time: less than half a second


@dataclass(frozen=True)
class SourceFile:
    """One input file: where it is, its name without the way to it, and "text" or "jsonl"."""

    path: Path
    name: str
    kind: str


@dataclass(frozen=True)
class Slice:
    """Bytes [start, end) of a file; `line` is the number of its first line, `hash` its xxh3-128."""

    path: Path
    name: str
    kind: str
    start: int
    end: int
    line: int
    hash: str


class Document(NamedTuple):
    """A text, the name of its file, and the line at which it starts."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Reading:
    """How documents are taken from files."""

    separator: str | None
    text_field: str


def find_files(sources: Sequence[str | Path]) -> list[SourceFile]:
    """The files of all sources, each source's in sorted order; raises DataError if there is none,
    a source does not exist or a file comes twice."""
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            if not found:
                raise DataError(f"{path}: the folder holds no {', '.join(SUFFIXES)} file")
            files += [_source_file(p, p.relative_to(path).as_posix()) for p in found]
        elif path.exists():
            files.append(_source_file(path, path.name))
        elif glob.has_magic(str(source)):
            found = sorted(Path(p) for p in glob.glob(str(source), recursive=True))
            found = [p for p in found if p.is_file()]
            if not found:
                raise DataError(f"{source}: the pattern matches no file")
            files += [_source_file(p, p.name) for p in found]
        else:
            raise DataError(f"{source}: no such file or folder")
    if not files:
        raise DataError("no source given: name a file, a folder or a pattern")
    seen: set[Path] = set()
    for file in files:
        if (real := file.path.resolve()) in seen:
            raise DataError(f"{file.path}: given twice among the sources; name it once")
        seen.add(real)
    return files


def _source_file(path: Path, name: str) -> SourceFile:
    return SourceFile(path, name, SUFFIXES.get(path.suffix, "text"))


def cut(
    file: SourceFile, separator: str | None, slice_bytes: int = SLICE_BYTES
) -> tuple[list[Slice], dict[str, Any]]:
    """Slices of at least `slice_bytes` (the last: fewer), and the file's row in the manifest."""
    slices: list[Slice] = []
    whole = xxhash.xxh3_128()
    try:
        size = file.path.stat().st_size
        with open(file.path, "rb") as handle:
            view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            start, line = 0, 1
            while start < size:
                end = _boundary(view, file.kind, separator, start + slice_bytes, size)
                content = view[start:end]
                whole.update(content)
                digest = xxhash.xxh3_128_hexdigest(content)
                slices.append(Slice(file.path, file.name, file.kind, start, end, line, digest))
                start, line = end, line + content.count(b"\n")
    except OSError as error:
        raise DataError(f"{file.path}: cannot read: {error.strerror}") from None
    return slices, {"name": file.name, "bytes": size, "xxh3_128": whole.hexdigest()}


def _boundary(view: mmap.mmap | bytes, kind: str, separator: str | None, at: int, size: int) -> int:
    """The first place at or after `at` where a document starts whatever came before; or `size`."""
    if at >= size or (kind == "text" and separator is None):
        return size
    if kind == "jsonl":
        return view.find(b"\n", at - 1) + 1 or size
    mark = str(separator).encode()
    found = view.find(mark, at)
    # An occurrence that overlaps an earlier one counts or not depending on where counting began.
    while found != -1 and view.find(mark, max(0, found - len(mark) + 1), found + len(mark)) < found:
        found = view.find(mark, found + 1)
    return found if found != -1 else size


def read(slices: Iterable[Slice], reading: Reading) -> Iterator[Document | Reject]:
    """Every document of the slices, and a Reject for each that is not as it should be.

    Raises DataError if a file cannot be read, or is not the one that was cut.
    """
    for part in slices:
        for document in _documents(part, reading):
            if isinstance(document, Reject) or not (document.text.isspace() or not document.text):
                yield document


def _documents(part: Slice, reading: Reading) -> Iterator[Document | Reject]:
    try:
        with open(part.path, "rb") as handle:
            handle.seek(part.start)
            content = handle.read(part.end - part.start)
    except OSError as error:
        raise DataError(f"{part.path}: cannot read: {error.strerror}") from None
    if xxhash.xxh3_128_hexdigest(content) != part.hash:
        raise DataError(f"{part.path}: changed while it was being read; run again")
    if part.kind == "jsonl":
        if part.start == 0:
            content = content.removeprefix(codecs.BOM_UTF8)
        lines = enumerate(content.split(b"\n"), part.line)
        return _json_lines(part.name, lines, reading.text_field)
    return _texts(part, content, reading.separator)


def _texts(part: Slice, content: bytes, separator: str | None) -> Iterator[Document | Reject]:
    """The content cut before each separator; the pieces together are the content."""
    pieces = [content]
    if separator is not None:
        mark = separator.encode()
        head, *tails = content.split(mark)
        pieces = [head, *(mark + tail for tail in tails)]
    line = part.line
    for piece in pieces:
        try:
            yield Document(part.name, line, piece.decode())
        except UnicodeDecodeError as error:
            at = line + piece.count(b"\n", 0, error.start)
            yield Reject(part.name, line, f"{_not_utf8(error)}, in line {at}")
        line += piece.count(b"\n")


def _json_lines(
    name: str, lines: Iterable[tuple[int, bytes]], field: str
) -> Iterator[Document | Reject]:
    for number, line in lines:
        if not line or line.isspace():
            continue
        try:
            yield Document(name, number, _json_text(line, field))
        except ValueError as error:
            yield Reject(name, number, str(error))


def _json_text(line: bytes, field: str) -> str:
    """The text in a line; raises ValueError that says what is wrong with it."""
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; each line must be one object") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object; each line must be one, with {field!r}")
    if field not in row:
        keys = ", ".join(row) or "none"
        raise ValueError(f"no key {field!r}; keys there: {keys} (set the text field)")
    text = row[field]
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is {type(text).__name__}, must be a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an escape like \ud800
            raise ValueError(
                f"{field!r} holds half a surrogate pair at character {error.start}; no encoding "
                "can hold it"
            ) from None
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 text (byte {error.start} of the document is 0x{byte:02x})"
