"""Trackers follow the record: each gets the rows of `metrics.jsonl` up to the newest checkpoint.

No resume and no rollback takes those rows back, so that a store to which one can only add holds
what TensorBoard shows, each point once, however often the run is killed. A tracker has a thread of
its own: training neither waits for it nor ends with it.
"""

import re
import sys
import threading
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from sparse_gpt.config.schema import LogConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.files import publish_text
from sparse_gpt.train.checkpoint.manifest import step_of, tags
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.trackers.stores import STORES, Points, Run, Store

_LOOKS = 10.0  # seconds from one look for a new checkpoint to the next
_END_WAITS = 20.0  # seconds that the end of a run waits for what is still on its way


def check_trackers(log: LogConfig) -> None:
    """Raises ConfigError where the package of a tracker is missing."""
    for name in log.trackers:
        missing = [each for each in STORES[name].packages if find_spec(each) is None]
        if missing:
            raise ConfigError(
                f"log.trackers: {name} needs {' and '.join(missing)}: "
                f"pip install 'sparse-gpt[{name}]', or leave {name} out"
            )


class Trackers:
    """Those of a run; on rank 0 alone.

    names: as in `log.trackers`. settings: what they show of the run besides its rows. points: what
    TensorBoard draws of a row. Raises ConfigError where a store does not let a new run in. A run
    that it knows goes on all the same: what is missing there comes once it answers.
    """

    def __init__(
        self, names: Sequence[str], run_dir: Path, settings: Mapping[str, Any], points: Points
    ) -> None:
        self._followers: list[_Follower] = []
        if not names:
            return
        known = (run_dir / "tracker-id").exists()
        run = Run(_id_of(run_dir / "tracker-id"), str(run_dir), run_dir, settings)
        for name in dict.fromkeys(names):
            follower = _Follower(name, STORES[name](run, points), run_dir)
            try:
                follower.open()
            except Exception as error:
                if not known:
                    (run_dir / "tracker-id").unlink()
                    said = f"log.trackers: {name}: {_first_line(error)}"
                    raise ConfigError(f"{said}; {follower.store.advice}") from error
                follower.warn(_first_line(error))
            self._followers.append(follower)
        for follower in self._followers:
            follower.start()

    def close(self, finished: bool) -> None:
        """Send what is final and not sent yet; the stores learn whether the run is finished."""
        for follower in self._followers:
            follower.end(finished)
        for follower in self._followers:
            follower.join(_END_WAITS)
            if follower.is_alive():
                follower.warn(f"it has not taken all, {_END_WAITS:g} seconds after the end")


class _Follower(threading.Thread):
    """Keeps one store up to date until the run ends."""

    def __init__(self, name: str, store: Store, run_dir: Path) -> None:
        super().__init__(name=f"tracker-{name}", daemon=True)
        self.tracker, self.store, self.run_dir = name, store, run_dir
        self._open = self._warned = self._finished = False
        self._ending = threading.Event()

    def open(self) -> None:
        """Raises what the store raises."""
        self.store.open()
        self._open = True

    def end(self, finished: bool) -> None:
        """Have the thread end soon."""
        self._finished = finished
        self._ending.set()

    def run(self) -> None:
        """Look for checkpoints until told to end, then once more."""
        seen, ended = None, False
        while not ended:
            ended = self._ending.wait(_LOOKS)
            try:
                newest = next(iter(tags(self.run_dir / "checkpoints")), None)
                if newest == seen and not ended:
                    continue
                seen = newest
                if not self._open:
                    self.open()
                if newest is not None:
                    self._update(step_of(newest))
                if ended:
                    self.store.close(self._finished)
            except Exception as error:
                self._open = False
                self.warn(_first_line(error))

    def _update(self, step: int) -> None:
        self.store.update([row for row in read_metrics(self.run_dir) if row["step"] <= step])

    def warn(self, reason: str) -> None:
        """Say once why the tracker misses something."""
        if not self._warned:
            self._warned = True
            print(
                f"warning: log.trackers: {self.tracker}: {reason}; training goes on, and the run's "
                "metrics.jsonl has all",
                file=sys.stderr,
                flush=True,
            )


def _id_of(path: Path) -> str:
    """By which a run's trackers know it again: of its first start, kept in its folder."""
    if not path.exists():
        publish_text(path, uuid4().hex)
    found = path.read_text()
    if not re.fullmatch("[0-9a-f]{32}", found):
        raise ConfigError(f"{path}: is no id of ours; remove it, and the trackers begin a new run")
    return found


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
