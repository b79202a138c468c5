"""The progress bar of long work over bytes: what is done, MB/s, tokens/s and time left, on a
terminal's stderr."""

from types import TracebackType


class Progress:
    """A context manager; draws nothing unless `wanted` and stderr is a terminal. Threads may share
    it."""

    def __init__(self, title: str, total_bytes: int, wanted: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar
        from rich.table import Column

        console = Console(stderr=True)
        whole = Column(no_wrap=True)  # a narrow terminal takes its room from the bar
        self._bar = Bar(
            TextColumn("{task.description}", table_column=whole),
            BarColumn(bar_width=None, table_column=Column(min_width=4, max_width=40)),
            DownloadColumn(table_column=whole),
            TextColumn("{task.fields[rate]}", table_column=whole),
            TimeRemainingColumn(table_column=whole),
            console=console,
            disable=not (wanted and console.is_terminal),
        )
        self._task = self._bar.add_task(title, total=total_bytes, rate="")
        self._characters = self._tokens = 0

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

    def title(self, text: str) -> None:
        """What stands before the bar from now on."""
        self._bar.update(self._task, description=text)

    def advance(self, n_bytes: int, characters: int | None = None, tokens: int = 0) -> None:
        """Count bytes of the input as done. The rate is that of the text in them: its characters,
        if they are others, and its tokens, if it was tokenized."""
        self._characters += n_bytes if characters is None else characters
        self._tokens += tokens
        seconds = self._bar.tasks[0].elapsed
        rate = ""
        if seconds:
            rate = f"{self._characters / seconds / 1e6:.1f} MB/s"
            if self._tokens:
                rate += f", {self._tokens / seconds / 1e6:.2f}M tokens/s"
        self._bar.update(self._task, advance=n_bytes, rate=rate)
