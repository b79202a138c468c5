"""What the commands share: how a table is printed, and the option that prints JSON instead."""

import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def show(table: Table) -> None:
    """Print a table; into a file or a pipe, too wide for 80 columns, it keeps its lines whole."""
    Console(width=None if sys.stdout.isatty() else 120).print(table)
