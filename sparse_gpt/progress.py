"""The progress bar of long work on a terminal's stderr: what is done, how fast, and time left; and
how long something takes, in words."""

import sys
import time
from types import TracebackType

EVERY = 30.0  # seconds


def duration(seconds: float) -> str:
    """In the largest unit of which there are two: "90 minutes", "2.5 hours"."""
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


class Progress:
    """A context manager; draws nothing unless `wanted` and stderr is a terminal. Threads may share
    it. The total is bytes, told with MB/s and tokens/s, or anything else, told as a share. It
    appears after `after` seconds, at the next sign of progress. Of bytes there is a line every
    `EVERY` seconds where there is no terminal."""

    def __init__(
        self, title: str, total: float, wanted: bool, of_bytes: bool = True, after: float = 0
    ) -> None:
        from rich import progress
        from rich.console import Console
        from rich.table import Column

        self.console = Console(stderr=True)  # what it prints stands above the bar
        whole = Column(no_wrap=True)  # a narrow terminal takes its room from the bar
        amount = progress.DownloadColumn if of_bytes else progress.TaskProgressColumn
        self._bar = progress.Progress(
            progress.TextColumn("{task.description}", table_column=whole),
            progress.BarColumn(bar_width=None, table_column=Column(min_width=4, max_width=40)),
            amount(table_column=whole),
            progress.TextColumn("{task.fields[rate]}", table_column=whole),
            progress.TimeRemainingColumn(table_column=whole),
            console=self.console,
            disable=not (wanted and self.console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total, rate="")
        self._characters = self._tokens = 0
        self._from = time.monotonic() + after
        self._says = wanted and of_bytes and not self.console.is_terminal
        self._told = self._started = time.monotonic()
        self._title, self._total, self._done = title, total, 0

    def __enter__(self) -> "Progress":
        self._draw()
        return self

    def _draw(self) -> None:
        if time.monotonic() >= self._from:
            self._bar.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    @property
    def drawn(self) -> bool:
        """Whether there is anything to see."""
        return not self._bar.disable

    def title(self, text: str) -> None:
        """What stands before the bar from now on."""
        self._bar.update(self._task, description=text)

    def at(self, done: float) -> None:
        """So much of the total is done."""
        self._draw()
        self._bar.update(self._task, completed=done)

    def advance(self, n_bytes: int, characters: int | None = None, tokens: int = 0) -> None:
        """Count bytes of the input as done. The rate is that of the text in them: its characters,
        if they are others, and its tokens, if it was tokenized."""
        self._draw()
        self._characters += n_bytes if characters is None else characters
        self._tokens += tokens
        self._done += n_bytes
        seconds = time.monotonic() - self._started
        rate = ""
        if seconds:
            rate = f"{self._characters / seconds / 1e6:.1f} MB/s"
            if self._tokens:
                rate += f", {self._tokens / seconds / 1e6:.2f}M tokens/s"
        self._bar.update(self._task, advance=n_bytes, rate=rate)
        if self._says and time.monotonic() >= self._told + EVERY:
            self._told = time.monotonic()
            share = self._done / self._total if self._total else 1
            left = f", {duration(seconds * (1 / share - 1))} left" if share else ""
            line = f"{self._title}: {share:.0%} of {self._total / 1e6:,.0f} MB, {rate}{left}"
            print(line, file=sys.stderr, flush=True)
