"""Reading ahead: while a step computes, a thread reads the batches of the next ones, so that a disk
is waited for only where it is slower than training on the whole."""

from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

T = TypeVar("T")


def prefetched(batches: Iterator[T], ahead: int = 2) -> Iterator[T]:
    """`batches`, which must not end, in their order, up to `ahead` of them read before they are
    asked for. What reading raises is raised where the batch is asked for. Closing it (or letting go
    of it) ends the thread."""
    device: dict[str, Any] = {}
    if torch.cuda.is_available():  # else page-locked memory would open a context on GPU 0
        current = torch.cuda.current_device()
        device = {"initializer": torch.cuda.set_device, "initargs": (current,)}
    thread = ThreadPoolExecutor(1, "prefetch", **device)
    try:
        waiting: deque[Future[T]] = deque(thread.submit(next, batches) for _ in range(ahead))
        while True:
            batch = waiting.popleft().result()
            waiting.append(thread.submit(next, batches))
            yield batch
    finally:
        thread.shutdown(cancel_futures=True)
