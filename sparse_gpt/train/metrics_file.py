"""The record of a run, `metrics.jsonl`, and TensorBoard's files, which are drawn from it.

`metrics.jsonl` holds one object a logged step, its keys being TensorBoard's tags. On resume the
rows after the checkpoint are dropped and the rest is drawn again, so that neither shows a step
twice. A full disk stops neither training nor the record: rows wait in memory until there is room.
"""

import errno
import json
import math
import os
import sys
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, StrictFloat, StrictInt, TypeAdapter
from torch.utils.tensorboard import SummaryWriter

from sparse_gpt.errors import ConfigError
from sparse_gpt.files import LOST, publish_text, to_json
from sparse_gpt.schema import checked

Row = Mapping[str, Any]


class MetricsFile:
    """Appends rows, whole or not at all, and draws them.

    resume_step: the step whose state the run goes on from; later rows are dropped, all at 0.
    begin: writes what TensorBoard shows besides the rows. draw: adds a row to it.
    lost: why nothing more can be kept in the run's folder, once that is so.
    """

    lost: str | None = None

    def __init__(
        self,
        run_dir: Path,
        resume_step: int,
        begin: Callable[[SummaryWriter], None],
        draw: Callable[[SummaryWriter, Row], None],
    ) -> None:
        self.run_dir, self._begin, self._draw = run_dir, begin, draw
        self._open(resume_step)

    def _open(self, resume_step: int) -> None:
        before = read_metrics(self.run_dir) if resume_step else []
        rows = [row for row in before if row["step"] <= resume_step]
        self._path = self.run_dir / "metrics.jsonl"
        publish_text(self._path, "".join(to_json(row, None) + "\n" for row in rows))
        self._file = self._path.open("ab", buffering=0)
        self._waiting: list[Row] = []
        self._board: SummaryWriter | None = self._draw_all()

    def rewind(self, step: int) -> None:
        """Drop what came after `step`, whose state the run goes on from."""
        self.close()
        self._open(step)

    def add(self, row: Row) -> None:
        """Append and draw a row, with those that had to wait for room on the disk."""
        self._waiting.append(row)
        try:
            self._append()
            rows, self._waiting = self._waiting, []
            if self._board is None:
                self._board = self._draw_all()
            else:
                for each in rows:
                    self._draw(self._board, each)
        except OSError as error:
            board, self._board = self._board, None  # its thread has ended; drawn again later
            if error.errno in LOST:
                self.lost = f"{self.run_dir}: {error.strerror}"
            elif board is not None:
                said = f"warning: {self.run_dir}: the record cannot be written ({error.strerror}); "
                said += "training goes on, rows wait in memory. Free some disk space"
                print(said, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Finish the files."""
        self._file.close()
        if self._board is not None:
            with suppress(OSError):  # what is not drawn is in the record
                self._board.close()

    def _append(self) -> None:
        if not self._path.exists() or not os.fstat(self._file.fileno()).st_nlink:
            raise FileNotFoundError(errno.ENOENT, "was deleted or moved away while it trained")
        lines = "".join(to_json(row, None) + "\n" for row in self._waiting).encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(lines) < len(lines):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            self._file.truncate(end)
            raise

    def _draw_all(self) -> SummaryWriter:
        folder = self.run_dir / "tensorboard"  # which may be a link
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            if old.name.startswith("events.out.tfevents."):
                old.unlink()
        board = SummaryWriter(str(folder), flush_secs=5)
        self._begin(board)
        for row in read_metrics(self.run_dir):
            self._draw(board, row)
        return board


def quiet_tensorboard() -> None:
    """Let TensorBoard's thread, where it cannot write, end without a traceback: `add` says it."""

    def told(of_thread: threading.ExceptHookArgs) -> None:
        if not isinstance(of_thread.exc_value, OSError):
            threading.__excepthook__(of_thread)

    threading.excepthook = told


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The logged steps of a run, none without any; but for a last line that a kill has torn. What
    was not a finite number is NaN. Raises ConfigError for any other line that is no row."""
    path = folder / "metrics.jsonl"
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            row = checked(_ROW, json.loads(line))
        except (ValueError, RecursionError) as error:
            if number == len(lines):
                break
            raise ConfigError(
                f"{path}:{number}: is no row ({str(error).splitlines()[0]}); mend it, or take the "
                "line out"
            ) from None
        rows.append({key: math.nan if value is None else value for key, value in row.items()})
    return rows


def _has_step(row: dict[str, float | None]) -> dict[str, float | None]:
    step = row.get("step")
    if not isinstance(step, int) or not 0 <= step < 2**62:
        raise ValueError("step is missing, or not the number of one")
    return row


_ROW = TypeAdapter(Annotated[dict[str, StrictInt | StrictFloat | None], AfterValidator(_has_step)])
