"""launch/train.py on a disk that stands still for half a second at the tenth batch."""

import time
from typing import Any

from sparse_gpt.data.shards.reader import Split
from sparse_gpt.train import rank

read, reads = Split.read, 0


def stalling(self: Split, *arguments: Any) -> None:
    global reads
    reads += self.name == "train"
    if reads == 10 and self.name == "train":
        time.sleep(0.5)
    read(self, *arguments)


Split.read = stalling  # type: ignore[method-assign]
rank.main()
