"""Slices to blocks: what can only be read front to back, or takes more room than a slice should,
comes in blocks of whole documents, which cost little to make: one process makes them, others take
the documents out."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import xxhash

from sparse_gpt.data.corpus.hub import hub_rows
from sparse_gpt.data.corpus.readers import line_blocks, open_content, parquet_rows
from sparse_gpt.data.corpus.slices import SLICE_BYTES, Slice, separator_pattern
from sparse_gpt.data.corpus.sources import SourceFile
from sparse_gpt.data.corpus.values import value_lines
from sparse_gpt.errors import DataError


@dataclass(frozen=True)
class Reading:
    """How documents are taken from files: rows count if each key of `where` has its value, and
    documents from `min_chars` characters on. Of each document `cut_last`, a share of it, is a
    document by itself; `keep_separator`: it is part of the document it opens; `messages`: what
    stands in `text_field` is chat turns."""

    separator: str | None
    text_field: str
    min_chars: int = 0
    where: tuple[tuple[str, str], ...] = ()
    cut_last: float = 0.0
    keep_separator: bool = True
    messages: bool = False

    @property
    def columns(self) -> list[str]:
        """What is needed of a row, the text first."""
        return list(dict.fromkeys([self.text_field, *(key for key, _ in self.where)]))


class Block(NamedTuple):
    """Whole documents as they lie in a file, or rows as `streams.packed` leaves them: the first
    one's line, the content, and how many bytes of the input are done with it."""

    file: SourceFile
    line: int
    content: bytes
    bytes: int


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
                rows = value_lines(content, file.kind, file.path, reading.columns)
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


def _table_blocks(part: Slice, reading: Reading) -> Iterator[Block]:
    file, line = part.file, part.line
    if file.kind == "hub":
        found = hub_rows(file.name, part.hash, reading.columns)
        file = replace(file, name=f"{file.name}#{part.number}")
    else:
        for _ in _content(part):
            pass  # that it is what was cut
        found = parquet_rows(file.path, part.number, reading.columns)
    for rows, content in found:
        yield Block(file, line, content, 0)
        line += rows
    yield Block(file, line, b"", part.end - part.start)
