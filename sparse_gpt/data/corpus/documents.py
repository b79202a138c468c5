"""Slices to a stream of documents.

    slices ──blocks──▶ blocks ──documents──▶ documents, and rejects

JSON Lines have one object a line, and blank lines are skipped; JSON documents and CSV are rows as
values.py finds them; text is one document a file, or split before each `separator`, whose line ends
match CRLF too, and which stays at the head of the document it opens, or is dropped. Text is taken
exactly as it lies in the file, CRLF included; a byte-order mark at the head of a file is dropped.
So are documents of nothing but white space.

What can only be read front to back, or takes more room than a slice should, comes in blocks of
whole documents, which cost little to make: one process makes them, others take the documents out.
The parsing is ours because the text and JSON readers of `datasets` neither keep line ends nor can
say which line is broken, and cost a second a worker to import.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import xxhash

from sparse_gpt.data.corpus.hub import hub_tables
from sparse_gpt.data.corpus.readers import (
    line_blocks,
    open_content,
    packed,
    parquet_rows,
    rows_of,
    shown,
    value_at,
)
from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import SLICE_BYTES, Slice, separator_pattern
from sparse_gpt.data.corpus.sources import SourceFile
from sparse_gpt.data.corpus.values import value_lines
from sparse_gpt.errors import DataError

_json = json.JSONDecoder().decode  # json.loads without its questions, which cost a tenth


class Block(NamedTuple):
    """Whole documents as they lie in a file, or rows as `streams.packed` leaves them: the first
    one's line, the content, and how many bytes of the input are done with it."""

    file: SourceFile
    line: int
    content: bytes
    bytes: int


class Document(NamedTuple):
    """A text, the name of its file, and the line at which it starts (of parquet: the row)."""

    file: str
    line: int
    text: str


@dataclass(frozen=True)
class Reading:
    """How documents are taken from files: rows count if each key of `where` has its value, and
    documents from `min_chars` characters on. Of each document `cut_last`, a share of it, is a
    document by itself; `keep_separator`: it is part of the document it opens."""

    separator: str | None
    text_field: str
    min_chars: int = 0
    where: tuple[tuple[str, str], ...] = ()
    cut_last: float = 0.0
    keep_separator: bool = True


def read(slices: Iterable[Slice], reading: Reading) -> Iterator[Document | Reject]:
    """Every document of the slices, and a Reject for each that is not as it should be.

    Raises DataError if a file cannot be read, or is not the one that was cut.
    """
    for part in slices:
        for block in blocks(part, reading):
            yield from documents(block, reading)


def blocks(part: Slice, reading: Reading) -> Iterator[Block]:
    """The slice in blocks: one where it is plain text or lines, else of some `SLICE_BYTES`; raises
    DataError as `read` does."""
    file, size = part.file, part.end - part.start
    if not part.streamed:
        yield Block(file, part.line, b"".join(_content(part)), size)
    elif file.kind in ("parquet", "hub"):
        yield from _table_blocks(part, reading)
    else:
        yield from _streamed_blocks(part, reading)


def documents(block: Block, reading: Reading) -> Iterator[Document | Reject]:
    """The documents of a block that `reading` wants, and a Reject for each that is broken."""
    if block.file.kind in ("parquet", "hub"):
        found = _rows(block, reading)
    elif block.file.kind == "jsonl":
        found = _json_lines(block, reading)
    elif block.file.kind == "text":
        found = _texts(block, reading)
    else:
        found = _values(block, reading)
    for document in found:
        if isinstance(document, Reject):
            yield document
        elif _is_wanted(document.text, reading.min_chars):
            parts = _cut(document, block.file, reading) if reading.cut_last else [document]
            yield from (part for part in parts if _is_wanted(part.text, reading.min_chars))


def is_separated(file: SourceFile, separator: str) -> bool:
    """Whether a text file holds the separator; raises DataError if it cannot be read."""
    before = b""
    try:
        with open_content(file.path, file.codec) as (content, _):
            while block := content.read(SLICE_BYTES):
                block = before + block
                if separator_pattern(separator, b"\r\n" in block).search(block):
                    return True
                before = block[-2 * len(separator.encode()) :]
    except OSError as error:
        raise _unreadable(file, error) from None
    return False


def _is_wanted(text: str, min_chars: int) -> bool:
    return len(text) >= max(min_chars, 1) and not text.isspace()


def _content(part: Slice) -> Iterator[bytes]:
    """The slice in pieces; raises DataError at its end if they are not what was cut."""
    found = xxhash.xxh3_128()
    try:
        with open(part.file.path, "rb") as handle:
            handle.seek(part.start)
            for at in range(part.start, part.end, SLICE_BYTES):
                piece = handle.read(min(SLICE_BYTES, part.end - at))
                found.update(piece)
                yield piece
    except OSError as error:
        raise DataError(f"{part.file.path}: cannot read: {error.strerror}") from None
    if found.hexdigest() != part.hash:
        raise DataError(f"{part.file.path}: changed while it was being read; run again")


def _streamed_blocks(part: Slice, reading: Reading) -> Iterator[Block]:
    file, line, done = part.file, 1, 0
    for _ in _content(part):
        pass  # that it is what was cut
    try:
        with open_content(file.path, file.codec) as (content, place):
            if file.kind == "text":
                yield Block(file, 1, content.read(), part.end)
                return
            if file.kind == "jsonl":
                found = line_blocks(content, SLICE_BYTES)
            else:
                rows = value_lines(content, file.kind, file.path, _columns(reading))
                found = _joined(rows, SLICE_BYTES)
            for lines in found:
                here = place()
                yield Block(file, line, lines, here - done)
                line, done = line + lines.count(b"\n"), here
            yield Block(file, line, b"", part.end - done)
    except OSError as error:
        raise _unreadable(file, error) from None


def _unreadable(file: SourceFile, error: OSError) -> DataError:
    return DataError(f"{file.path}: damaged or not {file.codec or 'readable'}: {error}")


def _joined(lines: Iterator[bytes], size: int) -> Iterator[bytes]:
    block = bytearray()
    for line in lines:
        block += line
        if len(block) >= size:
            yield bytes(block)
            block.clear()
    yield bytes(block)


def _columns(reading: Reading) -> list[str]:
    return list(dict.fromkeys([reading.text_field, *(key for key, _ in reading.where)]))


def _table_blocks(part: Slice, reading: Reading) -> Iterator[Block]:
    file, line = part.file, part.line
    found: Iterator[tuple[int, bytes]]
    if file.kind == "hub":
        tables = hub_tables(file.name, part.hash, _columns(reading))
        found = ((table.num_rows, packed(table)) for table in tables)
        file = replace(file, name=f"{file.name}#{part.number}")
    else:
        for _ in _content(part):
            pass  # that it is what was cut
        found = parquet_rows(file.path, part.number, _columns(reading))
    for rows, content in found:
        yield Block(file, line, content, 0)
        line += rows
    yield Block(file, line, b"", part.end - part.start)


def _rows(block: Block, reading: Reading) -> Iterator[Document | Reject]:
    name, columns = block.file.name, _columns(reading)
    for number, values in enumerate(rows_of(block.content, columns, name), block.line):
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


def _texts(block: Block, reading: Reading) -> Iterator[Document | Reject]:
    """The content cut before each separator; the pieces together are the content, but for what is
    dropped."""
    content = block.content
    if block.line == 1:
        content = content.removeprefix(codecs.BOM_UTF8)
    pieces, dropped = [content], 0
    if reading.separator is not None:
        pattern = separator_pattern(reading.separator, b"\r\n" in content)
        marks = [match.span() for match in pattern.finditer(content)]
        ends = [*(start for start, _ in marks), len(content)]
        if reading.keep_separator:
            starts = [0, *ends[:-1]]
        else:
            starts = [0, *(end for _, end in marks)]
            dropped = reading.separator.count("\n")
        pieces = [content[start:end] for start, end in zip(starts, ends, strict=True)]
    line = block.line
    for piece in pieces:
        try:
            yield Document(block.file.name, line, piece.decode())
        except UnicodeDecodeError as error:
            at = line + piece.count(b"\n", 0, error.start)
            yield Reject(block.file.name, line, f"{_not_utf8(error)}, in line {at}")
        line += piece.count(b"\n") + dropped


def _cut(document: Document, file: SourceFile, reading: Reading) -> list[Document]:
    content = document.text.encode()
    at = _last(content, reading.cut_last)
    lines = content.count(b"\n", 0, at) if file.kind == "text" else 0
    return [
        document._replace(text=content[:at].decode()),
        document._replace(text=content[at:].decode(), line=document.line + lines),
    ]


def _last(content: bytes, share: float) -> int:
    """Where the last share of a text begins: behind a line's end, or a space, where there is one
    within as much again, so that no character is cut."""
    size = max(1, min(round(share * len(content)), len(content) - 1))
    latest = len(content) - size
    earliest = max(0, latest - size)
    for end in (b"\n", b" "):
        if (found := content.rfind(end, earliest, latest)) >= 0:
            return found + 1
    while latest > 0 and content[latest] & 0xC0 == 0x80:  # within a character of UTF-8
        latest -= 1
    return latest


def _json_lines(block: Block, reading: Reading) -> Iterator[Document | Reject]:
    name = block.file.name
    for number, line in enumerate(block.content.split(b"\n"), block.line):
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


def _values(block: Block, reading: Reading) -> Iterator[Document | Reject]:
    name = block.file.name
    for number, row in map(_json, block.content.decode().splitlines()):
        try:
            text = _row_text(row, reading) if isinstance(row, dict) else None
        except ValueError as error:
            row = str(error)
        if isinstance(row, str):
            yield Reject(name, number, row)
        elif text is not None:
            yield Document(name, number, text)


def _json_text(line: bytes, reading: Reading) -> str | None:
    """The text in a line, or None if it is not wanted; raises ValueError that says what is wrong
    with the line."""
    try:
        row = _json(line.decode())
    except UnicodeDecodeError as error:
        raise ValueError(_not_utf8(error)) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not JSON: {error}; each line must be one object") from None
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object; each line must be one, with {reading.text_field!r}")
    return _row_text(row, reading)


def _row_text(row: dict[str, Any], reading: Reading) -> str | None:
    """As `_json_text`, of a row."""
    field = reading.text_field
    if any(shown(value_at(row, key)) != value for key, value in reading.where):
        return None
    text = value_at(row, field)
    if text is ...:
        keys = ", ".join(row) or "none"
        raise ValueError(f"no key {field!r}; keys there: {keys} (set the text field)")
    if not isinstance(text, str):
        raise ValueError(f"{field!r} is {type(text).__name__}, must be a string")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an escape like \ud800
            raise ValueError(
                f"{field!r} holds half a surrogate pair, or a byte that is not UTF-8, at character "
                f"{error.start}"
            ) from None
    return text


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 text (byte {error.start} of the document is 0x{byte:02x})"
