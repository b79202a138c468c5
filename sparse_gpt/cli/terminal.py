"""What the commands share: arguments and options, and how a table is printed."""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.measure import Measurement, measure_renderables
from rich.padding import Padding
from rich.table import Table

from sparse_gpt.files import to_json

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def _run_file(path: Path) -> Path:
    from sparse_gpt.config.load import find_file

    return find_file(path)


def _sweep_file(path: Path) -> Path:
    from sparse_gpt.config.load import find_file

    return find_file(path, "sweeps")


Config = Annotated[
    Path, typer.Argument(callback=_run_file, help="A run file, or the name of one of configs/.")
]
SweepFile = Annotated[
    Path,
    typer.Argument(
        callback=_sweep_file, help="A sweep file, or the name of one of configs/sweeps/."
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="Override the file, e.g. optimizer.lr=1e-3."),
]


def print_json(value: Any, indent: int | None = 1) -> None:
    """Print JSON that any language reads."""
    print(to_json(value, indent))


def show(table: Table) -> None:
    """Print a table. Where it is too wide, words of a cell come under one another, without lines
    between columns if need be; else its rows follow one another: nothing is cut. A file or a pipe
    is 120 wide, unless COLUMNS says otherwise."""
    wide = sys.stdout.isatty() or "COLUMNS" in os.environ
    console = Console(width=None if wide else 120, highlight=False)
    for lines in (table.box, None):
        if table.box and not lines:
            table.box, table.pad_edge = None, False
        if _fitted(table, console):
            console.print(table)
            return
    for text in (table.title, *_rows(table), table.caption):
        if text:
            console.print(text)


def _fitted(table: Table, console: Console) -> bool:
    """Give each column its words' width, and what is left to the first ones, as far as they need
    it; False where not even that fits."""
    options = console.options.update(max_width=10_000)
    columns = [
        measure_renderables(console, options, [column.header, *column.cells])
        for column in table.columns
    ]
    between = Measurement.get(console, options, table).maximum - sum(c.maximum for c in columns)
    least = [column.minimum for column in columns]
    least[0] = max(least[0], min(columns[0].maximum, 18))  # names are not in a pile
    left = console.width - between - sum(least)
    if left < 0:
        return False
    for column, width, most in zip(table.columns, least, columns, strict=True):
        more = min(left, most.maximum - width)
        column.width, left = width + more, left - more
    return True


def _rows(table: Table) -> Iterator[str | Padding]:
    titles = [str(column.header) for column in table.columns]
    for cells in zip(*(column.cells for column in table.columns), strict=True):
        pairs = zip(titles[1:], map(str, cells[1:]), strict=True)
        yield f"[bold]{cells[0]}[/]"
        yield Padding(", ".join(f"{title} {cell}".strip() for title, cell in pairs if cell), (0, 2))


def printable(text: str) -> str:
    """Text as it is, but that nothing in it steers a terminal, or is unknown to its encoding."""
    if sys.stdout.isatty():
        text = re.sub(r"[^\S \n\t]|[\0-\x08\x0e-\x1f\x7f-\x9f]", lambda c: ascii(c[0])[1:-1], text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def unescaped(text: str | None) -> str | None:
    """Text of an option in which \\n stands for a new line."""
    return text and text.replace("\\n", "\n")
