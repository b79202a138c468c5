"""Sources to a stream of documents.

    sources ──find_files──▶ files ──cut──▶ slices ──read──▶ documents, and rejects

A source is a file, a folder (its files with a known suffix, recursively), a glob, or a data set of
the hub (`hf:NAME[:SUBSET][:SPLIT]`). The suffixes .jsonl, .ndjson and .json mean JSON Lines (one
object a line, blank lines skipped), .parquet rows of columns, anything else UTF-8 text: one
document a file, or split before each `separator`, which stays at the head of the document it opens;
.gz and .zst after any of them but .parquet are undone. Text is taken exactly as it lies in the file
(CRLF and a byte-order mark included; JSON Lines may begin with a mark, which is not part of any
text). Documents of nothing but white space are dropped.

A slice is a part of one file that holds whole documents, so that slices can be read by any process
in any order. Text and JSON Lines are cut at byte offsets, the rest as streams.py says, by one
sequential pass over the input, which also hashes it. The parsing is ours because the text and JSON
readers of `datasets` neither keep line ends nor can say which line is broken, and cost a second a
worker to import.
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
from data.streams import (
    HUB,
    hub_rows,
    hub_shards,
    open_compressed,
    parquet_rows,
    row_groups,
    shown,
)

SUFFIXES = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}
CODECS = {".gz": "gzip", ".zst": "zstd"}
SLICE_BYTES = 4 << 20  # what one worker tokenizes at a time: less than half a second


@dataclass(frozen=True)
class SourceFile:
    """One input file: where it is, its name without the way to it, and "text", "jsonl", "parquet"
    or "hub"; codec: "gzip" or "zstd" if it is compressed."""

    path: Path
    name: str
    kind: str
    codec: str | None = None


@dataclass(frozen=True, slots=True)  # a terabyte has 250,000
class Slice:
    """Bytes [start, end) of a file; `line` is the number of its first line or row, `hash` its
    xxh3-128, `number` the row group of parquet, or the shard of a hub data set."""

    file: SourceFile
    start: int
    end: int
    line: int
    hash: str
    number: int = 0

    @property
    def streamed(self) -> bool:
        """Whether it may hold far more text than a worker should return at a time."""
        return self.file.codec is not None or self.file.kind in ("parquet", "hub")


class Document(NamedTuple):
    """A text, the name of its file, and the line at which it starts (of parquet: the row)."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Reading:
    """How documents are taken from files: rows count if each key of `where` has its value, and
    documents from `min_chars` characters on."""

    separator: str | None
    text_field: str
    min_chars: int = 0
    where: tuple[tuple[str, str], ...] = ()


def find_files(sources: Sequence[str | Path]) -> list[SourceFile]:
    """The files of all sources, each source's in sorted order; raises DataError if there is none,
    a source does not exist or a file comes twice."""
    files: list[SourceFile] = []
    for source in sources:
        path = Path(source)
        if str(source).startswith(HUB):
            files.append(SourceFile(path, str(source), "hub"))
        elif path.is_dir():
            found = sorted(p for p in path.rglob("*") if _is_known(p) and p.is_file())
            if not found:
                raise DataError(
                    f"{path}: the folder holds no {', '.join(SUFFIXES)} file, compressed or not"
                )
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


def _suffix(path: Path) -> str:
    """The suffix that says the kind: the one before .gz or .zst."""
    return Path(path.stem).suffix if path.suffix in CODECS else path.suffix


def _is_known(path: Path) -> bool:
    return _suffix(path) in SUFFIXES


def _source_file(path: Path, name: str) -> SourceFile:
    codec = CODECS.get(path.suffix)
    kind = SUFFIXES.get(_suffix(path), "text")
    if codec and kind == "parquet":
        raise DataError(f"{path}: parquet has its own compression; undo the {path.suffix}")
    return SourceFile(path, name, kind, codec)


def cut(
    file: SourceFile, separator: str | None, slice_bytes: int = SLICE_BYTES
) -> tuple[list[Slice], dict[str, Any]]:
    """Slices, of text and JSON Lines of at least `slice_bytes` (the last: fewer), and the file's
    row in the manifest."""
    if file.kind == "hub":
        slices = [
            Slice(file, 0, size, 1, identity, number)
            for number, (size, identity) in enumerate(hub_shards(file.name))
        ]
        identity = xxhash.xxh3_128_hexdigest("".join(part.hash for part in slices).encode())
        return slices, {"name": file.name, "shards": len(slices), "identity": identity}
    slices = []
    whole = xxhash.xxh3_128()
    try:
        size = file.path.stat().st_size
        with open(file.path, "rb") as handle:
            view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            for start, end, line, number in _cuts(file, view, separator, slice_bytes):
                of_slice = xxhash.xxh3_128()
                for at in range(start, end, SLICE_BYTES):
                    block = handle.read(min(SLICE_BYTES, end - at))
                    whole.update(block)
                    of_slice.update(block)
                slices.append(Slice(file, start, end, line, of_slice.hexdigest(), number))
                if isinstance(view, mmap.mmap):  # what was read counts as our memory until then
                    view.madvise(mmap.MADV_DONTNEED, 0, end)
    except OSError as error:
        raise DataError(f"{file.path}: cannot read: {error.strerror}") from None
    return slices, {"name": file.name, "bytes": size, "xxh3_128": whole.hexdigest()}


def _cuts(
    file: SourceFile, view: mmap.mmap | bytes, separator: str | None, slice_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, line, number) of each slice; they cover the file."""
    size = len(view)
    if file.kind == "parquet":
        groups = row_groups(file.path)
        ends = [*(start for start, _ in groups[1:]), size]
        start, row = 0, 1
        for number, ((_, rows), end) in enumerate(zip(groups, ends, strict=False)):
            yield start, end, row, number
            start, row = end, row + rows
    elif file.codec is not None:
        if size:
            yield 0, size, 1, 0
    else:
        start, line = 0, 1
        while start < size:
            end = _boundary(view, file.kind, separator, start + slice_bytes, size)
            yield start, end, line, 0
            if end < size:
                line += view[start:end].count(b"\n")
            start = end


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
            if isinstance(document, Reject) or _is_wanted(document.text, reading.min_chars):
                yield document


def _is_wanted(text: str, min_chars: int) -> bool:
    return len(text) >= max(min_chars, 1) and not text.isspace()


def _documents(part: Slice, reading: Reading) -> Iterator[Document | Reject]:
    file = part.file
    if file.kind in ("parquet", "hub"):
        return _table(part, reading)
    if file.codec is not None:
        return _compressed(part, reading)
    content = b"".join(_content(part))
    if file.kind == "jsonl":
        lines = enumerate(content.split(b"\n"), part.line)
        return _json_lines(file.name, lines, reading)
    return _texts(part, content, reading.separator)


def _content(part: Slice) -> Iterator[bytes]:
    """The slice in blocks; raises DataError at its end if they are not what was cut."""
    found = xxhash.xxh3_128()
    try:
        with open(part.file.path, "rb") as handle:
            handle.seek(part.start)
            for at in range(part.start, part.end, SLICE_BYTES):
                block = handle.read(min(SLICE_BYTES, part.end - at))
                found.update(block)
                yield block
    except OSError as error:
        raise DataError(f"{part.file.path}: cannot read: {error.strerror}") from None
    if found.hexdigest() != part.hash:
        raise DataError(f"{part.file.path}: changed while it was being read; run again")


def _compressed(part: Slice, reading: Reading) -> Iterator[Document | Reject]:
    path, name, codec = part.file.path, part.file.name, part.file.codec
    for _ in _content(part):
        pass  # that it is what was cut
    try:
        with open_compressed(path, str(codec)) as content:
            if part.file.kind == "text":
                yield from _texts(part, content.read(), reading.separator)
            else:
                yield from _json_lines(name, enumerate(content, 1), reading)
    except OSError as error:
        raise DataError(f"{path}: damaged or not {codec}: {error}") from None


def _table(part: Slice, reading: Reading) -> Iterator[Document | Reject]:
    columns = list(dict.fromkeys([reading.text_field, *(key for key, _ in reading.where)]))
    if part.file.kind == "hub":
        rows = hub_rows(part.file.name, part.number, columns)
        name = f"{part.file.name}#{part.number}"
    else:
        for _ in _content(part):
            pass  # that it is what was cut
        rows = parquet_rows(part.file.path, part.number, columns)
        name = part.file.name
    for number, values in enumerate(rows, part.line):
        row = dict(zip(columns, values, strict=True))
        if any(_decoded(row[key]) != value for key, value in reading.where):
            continue
        text = values[0]
        if not isinstance(text, bytes):
            found = type(text).__name__
            yield Reject(name, number, f"{reading.text_field!r} is {found}, must be a string")
            continue
        try:
            yield Document(name, number, text.decode())
        except UnicodeDecodeError as error:
            yield Reject(name, number, _not_utf8(error))


def _decoded(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else shown(value)


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
            yield Document(part.file.name, line, piece.decode())
        except UnicodeDecodeError as error:
            at = line + piece.count(b"\n", 0, error.start)
            yield Reject(part.file.name, line, f"{_not_utf8(error)}, in line {at}")
        line += piece.count(b"\n")


def _json_lines(
    name: str, lines: Iterable[tuple[int, bytes]], reading: Reading
) -> Iterator[Document | Reject]:
    for number, line in lines:
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line or line.isspace():
            continue
        try:
            text = _json_text(line, reading)
        except ValueError as error:
            yield Reject(name, number, str(error))
        else:
            if text is not None:
                yield Document(name, number, text)


def _json_text(line: bytes, reading: Reading) -> str | None:
    """The text in a line, or None if it is not wanted; raises ValueError that says what is wrong
    with the line."""
    field = reading.text_field
    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; each line must be one object") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object; each line must be one, with {field!r}")
    if any(shown(row.get(key)) != value for key, value in reading.where):
        return None
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
