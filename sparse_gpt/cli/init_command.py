"""`sparse-gpt init`: a run file to begin with."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer


def init(
    file: Annotated[
        Path, typer.Argument(help="The run file to write; never one that is there.")
    ] = Path("run.yaml"),
    data: Annotated[
        str | None,
        typer.Option(
            help="A folder that prepare wrote or will write, or a file or folder of text.",
            show_default="is asked for",
        ),
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(
            help="d32 to d128 (minutes on a CPU), 124m or 355m.", show_default="of the budget"
        ),
    ] = None,
    devices: Annotated[
        int | None,
        typer.Option(min=1, max=10_000, help="GPUs (on a CPU: ranks).", show_default="1"),
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Training FLOPs.", show_default="40 tokens for each parameter a token uses"
        ),
    ] = None,
) -> None:
    """Write a commented run file with a learning rate, batch and steps that our studies support.

    On a terminal it asks for what no option says.
    """
    from sparse_gpt.errors import ConfigError
    from sparse_gpt.files import new_file
    from sparse_gpt.plan.starter import SIZES, starter

    if os.path.lexists(file):
        raise ConfigError(f"{file}: is there already; give another name")
    if sys.stdin.isatty() and sys.stdout.isatty():
        if data is None:
            data = typer.prompt("Data: text, or a folder of shards", "shards/corpus")
        if size is None and budget is None:
            size = typer.prompt(f"Size: {', '.join(SIZES)}", "d64")
        if devices is None:
            devices = typer.prompt("Devices", 1, type=int)
        if budget is None:
            answer = typer.prompt("Training FLOPs (8e12, say; 0: what suits the size)", 0.0)
            budget = answer or None
    if data is None:
        raise ConfigError("--data is missing: a folder of shards, or text to make them of")
    found = starter(file, data, size, devices or 1, budget)
    file.parent.mkdir(parents=True, exist_ok=True)
    with new_file(file) as new:
        new.write_text(found.text, encoding="utf-8")
    print(f"{file}: {found.config.total_steps:,} steps. Next:")
    for command in found.commands:
        print(f"  {command}")
