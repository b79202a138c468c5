"""What the commands share: arguments and options, and how a table is printed."""

import re
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
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
    """Print a table; into a file or a pipe, too wide for 80 columns, it keeps its lines whole."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def printable(text: str) -> str:
    """Text as it is, but that nothing in it steers a terminal, or is unknown to its encoding."""
    if sys.stdout.isatty():
        text = re.sub(r"[^\S \n\t]|[\0-\x08\x0e-\x1f\x7f-\x9f]", lambda c: ascii(c[0])[1:-1], text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def unescaped(text: str | None) -> str | None:
    """Text of an option in which \\n stands for a new line."""
    return text and text.replace("\\n", "\n")
