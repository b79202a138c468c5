"""A progress bar over bytes that are copied or converted."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, total: int, wanted: bool = True) -> Iterator[Callable[[int], None]]:
    """Bytes done of `total`, bytes/s and time left, on stderr if `wanted` and that is a terminal;
    gives a function that counts bytes as done."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    console = Console(stderr=True)
    columns = (TextColumn(label), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    drawn = wanted and console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, disable=not drawn) as progress:
        task = progress.add_task("", total=total)
        yield lambda n_bytes: progress.advance(task, n_bytes)
