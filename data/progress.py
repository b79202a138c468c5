"""The progress bar of `prepare`, over all its workers: input done, MB/s of text, tokens/s and time
left, on a terminal's stderr."""

from types import TracebackType


class Progress:
    """A context manager; draws nothing unless `wanted` and stderr is a terminal."""

    def __init__(self, total_bytes: int, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            TextColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bar

        console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("tokenizing"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not (wanted and console.is_terminal),
        )
        self._task = self._bar.add_task("tokenizing", total=total_bytes, rate="")
        self._tokens = self._characters = 0

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.stop()

    def advance(self, n_bytes: int, characters: int, tokens: int) -> None:
        """Count bytes of the input as done; characters and tokens are of the text in them."""
        self._characters += characters
        self._tokens += tokens
        seconds = self._bar.tasks[0].elapsed
        rate = ""
        if seconds:
            mega = (n / seconds / 1e6 for n in (self._characters, self._tokens))
            rate = "{:.1f} MB/s, {:.2f}M tokens/s".format(*mega)
        self._bar.update(self._task, advance=n_bytes, rate=rate)
