"""Sources to a stream of documents.

    sources ──find_files──▶ files ──cut──▶ slices ──read──▶ (origin, text) of each document

A source is a file, a folder (its .txt, .jsonl, .ndjson and .json files, recursively) or a glob; the
last three suffixes mean JSON Lines (one object a line, blank lines skipped), anything else is
UTF-8 text: one document a file, or split before each `separator`, which stays at the head of the
document it opens. Text is taken exactly as it lies in the file (CRLF and a byte-order mark
included; JSON Lines may begin with a mark, which is not part of any text). Documents of nothing
but white space are dropped.

A slice is a byte range of one file that holds whole documents, so that slices can be read by any
process in any order. They are cut by one sequential pass over the input, which also hashes it.
`read` streams them through `datasets` in Arrow batches; the parsing is ours because neither its
text nor its JSON reader keeps line ends or can say which line is broken.
"""

import glob
import json
import mmap
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from data.errors import DataError

SUFFIXES = {".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl"}
SLICE_BYTES = 4 << 20  # what one worker tokenizes at a time: about half a second
_BATCH = 1024  # documents an Arrow batch


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
    kind: str
    start: int
    end: int
    line: int
    hash: str


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
                slices.append(Slice(file.path, file.kind, start, end, line, digest))
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


def read(slices: Iterable[Slice], reading: Reading) -> Iterator[tuple[str, str]]:
    """(origin, text) of every document of the slices; the origin is "file:line" or "file: byte n".

    Raises DataError that names the file and line (or byte) of whatever is not as it should be.
    """
    import pyarrow as pa
    from datasets import IterableDataset
    from datasets.iterable_dataset import ArrowExamplesIterable

    schema = pa.schema({"origin": pa.string(), "text": pa.large_string()})

    def tables(slices: list[Slice]) -> Iterator[tuple[tuple[int, int], pa.Table]]:
        for number, part in enumerate(slices):
            rows = list(_documents(part, reading))
            columns = [list(column) for column in zip(*rows, strict=True)] or [[], []]
            yield (number, 0), pa.table(columns, schema=schema)

    # IterableDataset.from_generator would do the same, but needs a writable cache folder.
    stream = IterableDataset(ArrowExamplesIterable(tables, {"slices": list(slices)}))
    for table in stream.with_format("arrow").iter(batch_size=_BATCH):
        yield from zip(table["origin"].to_pylist(), table["text"].to_pylist(), strict=True)


def _documents(part: Slice, reading: Reading) -> Iterator[tuple[str, str]]:
    try:
        with open(part.path, "rb") as handle:
            handle.seek(part.start)
            content = handle.read(part.end - part.start)
    except OSError as error:
        raise DataError(f"{part.path}: cannot read: {error.strerror}") from None
    if xxhash.xxh3_128_hexdigest(content) != part.hash:
        raise DataError(f"{part.path}: changed while it was being read; run again")
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = part.line + content.count(b"\n", 0, error.start)
        raise DataError(
            f"{part.path}:{line}: not UTF-8 text (byte {part.start + error.start} of the file is "
            f"0x{content[error.start]:02x}); convert the file to UTF-8"
        ) from None
    if part.kind == "jsonl":
        documents = _json_lines(part, text, reading.text_field)
    elif reading.separator is None:
        documents = iter([(str(part.path), text)])
    else:
        documents = _split(part, text, reading.separator)
    return (document for document in documents if document[1] and not document[1].isspace())


def _split(part: Slice, text: str, separator: str) -> Iterator[tuple[str, str]]:
    """The text cut before each separator; the pieces together are the text."""
    line = part.line
    head, *tails = text.split(separator)
    for piece in (head, *(separator + tail for tail in tails)):
        yield f"{part.path}:{line}", piece
        line += piece.count("\n")


def _json_lines(part: Slice, content: str, field: str) -> Iterator[tuple[str, str]]:
    if part.start == 0:
        content = content.removeprefix("\ufeff")
    for number, line in enumerate(content.split("\n"), part.line):
        if not line or line.isspace():
            continue
        origin = f"{part.path}:{number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{origin}: not JSON: {error}; each line must be one object") from None
        if not isinstance(row, dict):
            raise DataError(f"{origin}: not a JSON object; each line must be one, with {field!r}")
        if field not in row:
            keys = ", ".join(row) or "none"
            raise DataError(f"{origin}: no key {field!r}; keys there: {keys} (set the text field)")
        text = row[field]
        if not isinstance(text, str):
            raise DataError(f"{origin}: {field!r} is {type(text).__name__}, must be a string")
        if not text.isascii():
            try:
                text.encode()
            except UnicodeEncodeError as error:  # an escape like \ud800
                raise DataError(
                    f"{origin}: {field!r} holds half a surrogate pair at character {error.start}; "
                    "no encoding can hold it: mend or remove the line"
                ) from None
        yield origin, text
