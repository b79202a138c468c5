"""Rows of JSON documents and of CSV, which are read from front to back, as lines of JSON: each is
[line of the file, row], or [line, what is wrong with the row]."""

import codecs
import csv
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sparse_gpt.data.corpus.readers import require_columns
from sparse_gpt.errors import DataError

DELIMITERS = {"csv": ",", "tsv": "\t"}
_SPACE = re.compile(r"[ \t\n\r]*")
_LONGEST = 2**31 - 1  # characters of a field, of which `csv` takes 131,072 by itself


def value_lines(
    content: io.BufferedReader, kind: str, path: Path, columns: list[str]
) -> Iterator[bytes]:
    """The lines of a file of this kind. Raises DataError for a file that is no such thing, or CSV
    without one of the columns."""
    rows = _json_rows(content, path) if kind == "json" else _csv_rows(content, kind, path, columns)
    for line, row in rows:
        yield json.dumps([line, row]).encode() + b"\n"


def _csv_rows(
    content: io.BufferedReader, kind: str, path: Path, columns: list[str]
) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(_LONGEST)
    text = io.TextIOWrapper(content, "utf-8-sig", "surrogateescape", newline="")
    reader = csv.reader(text, delimiter=DELIMITERS[kind], strict=True)
    line = 1
    try:
        header = next(reader, [])
        require_columns(columns, header, str(path))
        while True:
            line = reader.line_num + 1
            row = next(reader, None)
            if row is None:
                return
            if len(row) == len(header):
                yield line, dict(zip(header, row, strict=True))
            elif row:
                yield line, f"has {len(row)} fields, the header {len(header)}; quote the others"
    except csv.Error as error:
        reason = str(error).expandtabs(1)
        raise DataError(
            f"{path}:{line}: not {kind.upper()}: {reason}; within a quoted field a quote is doubled"
        ) from None
    finally:
        text.detach()  # else it closes the content with itself


def _json_rows(content: io.BufferedReader, path: Path) -> Iterator[tuple[int, Any]]:
    """Of an array its elements, and values that follow one another, however they are spaced."""
    text = content.read().removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    line, counted = 1, 0
    try:
        for start, value in _values(text):
            line, counted = line + text.count("\n", counted, start), start
            is_row = isinstance(value, dict)
            yield line, value if is_row else "not a JSON object; each element must be one"
    except (ValueError, RecursionError) as error:
        if isinstance(error, json.JSONDecodeError):
            line, error = error.lineno, ValueError(error.msg)
        raise DataError(f"{path}:{line}: not JSON: {error}; mend the file") from None


def _values(text: str) -> Iterator[tuple[int, Any]]:
    decode, space = json.JSONDecoder().raw_decode, _behind_space
    at, is_array = space(text, 0), False
    while at < len(text) or is_array:
        if not is_array and text[at] == "[":
            at, is_array = space(text, at + 1), True
            if text[at : at + 1] == "]":
                at, is_array = space(text, at + 1), False
            continue
        value, end = decode(text, at)
        yield at, value
        at = space(text, end)
        if is_array:
            if text[at : at + 1] not in (",", "]"):
                raise json.JSONDecodeError("Expecting ',' or ']'", text, at)
            is_array = text[at] == ","
            at = space(text, at + 1)


def _behind_space(text: str, at: int) -> int:
    found = _SPACE.match(text, at)
    return found.end() if found else at
