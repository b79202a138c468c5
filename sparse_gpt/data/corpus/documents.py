"""Slices to a stream of documents.

    slices ──blocks──▶ blocks ──documents──▶ documents, and rejects

JSON Lines have one object a line, and blank lines are skipped; JSON documents and CSV are rows as
values.py finds them; text is one document a file, or split before each `separator`, whose line ends
match CRLF too, and which stays at the head of the document it opens, or is dropped. Text is taken
exactly as it lies in the file, CRLF included; a byte-order mark at the head of a file is dropped.
So are documents of nothing but white space.
The parsing is ours because the text and JSON readers of `datasets` neither keep line ends nor can
say which line is broken, and cost a second a worker to import.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from sparse_gpt.data.corpus.blocks import Block, Reading, blocks
from sparse_gpt.data.corpus.chat import rendered
from sparse_gpt.data.corpus.readers import decoded, rows_of, shown, value_at
from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import Slice, separator_pattern
from sparse_gpt.data.corpus.sources import SourceFile

_json = json.JSONDecoder().decode  # json.loads without its questions, which cost a tenth


class Document(NamedTuple):
    """A text, the name of its file, and the line at which it starts (of parquet: the row)."""

    file: str
    line: int
    text: str


def read(slices: Iterable[Slice], reading: Reading) -> Iterator[Document | Reject]:
    """Every document of the slices, and a Reject for each that is not as it should be.

    Raises DataError if a file cannot be read, or is not the one that was cut.
    """
    for part in slices:
        for block in blocks(part, reading):
            yield from documents(block, reading)


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


def _is_wanted(text: str, min_chars: int) -> bool:
    return len(text) >= max(min_chars, 1) and not text.isspace()


def _rows(block: Block, reading: Reading) -> Iterator[Document | Reject]:
    name, columns = block.file.name, reading.columns
    for number, values in enumerate(rows_of(block.content, columns, name), block.line):
        row = dict(zip(columns, values, strict=True))
        if any(shown(decoded(row[key], "replace")) != value for key, value in reading.where):
            continue
        try:
            yield Document(name, number, _text(decoded(values[0]), reading))
        except UnicodeDecodeError as error:
            yield Reject(name, number, _not_utf8(error))
        except ValueError as error:
            yield Reject(name, number, str(error))


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
        option = "messages" if reading.messages else "the text field"
        raise ValueError(f"no key {field!r}; keys there: {keys} (set {option})")
    text = _text(text, reading)
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError as error:  # an escape like \ud800
            raise ValueError(
                f"{field!r} holds half a surrogate pair, or a byte that is not UTF-8, at character "
                f"{error.start}"
            ) from None
    return text


def _text(value: Any, reading: Reading) -> str:
    """What the text field holds, as text; raises ValueError that says why it cannot be."""
    if reading.messages:
        return rendered(value, reading.text_field)
    if not isinstance(value, str):
        hint = "; of chat turns give messages instead" if isinstance(value, list) else ""
        kind = type(value).__name__
        raise ValueError(f"{reading.text_field!r} is {kind}, must be a string{hint}")
    return value


def _not_utf8(error: UnicodeDecodeError) -> str:
    byte = error.object[error.start]
    return f"not UTF-8 text (byte {error.start} of the document is 0x{byte:02x})"
