"""launch/train.py on a disk that stands still at the tenth batch, until the step that needs it has
waited for a fifth of a second."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Event
from typing import Any

from sparse_gpt.data.shards.reader import Split
from sparse_gpt.train import rank
from sparse_gpt.train.telemetry import Telemetry

read, reads = Split.read, 0
data_wait, waits, waited_for = Telemetry.data_wait, 0, Event()


def stalling(self: Split, *arguments: Any) -> None:
    global reads
    reads += self.name == "train"
    if reads == 10 and self.name == "train":
        waited_for.wait()
        time.sleep(0.2)
    read(self, *arguments)


@contextmanager
def counting(self: Telemetry) -> Iterator[None]:
    global waits
    with data_wait(self):
        waits += 1
        if waits == 10:
            waited_for.set()
        yield


Split.read = stalling  # type: ignore[method-assign]
Telemetry.data_wait = counting  # type: ignore[method-assign]
rank.main()
