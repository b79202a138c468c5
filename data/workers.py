"""A function over items in worker processes, results in order, little of it in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Generator[Result, None, None]:
    """function(item) for each item, in order; at most two items a worker are under way. What
    `function` raises is raised here. One worker is this process itself."""
    workers = min(workers, len(items))
    if workers <= 1:
        yield from map(function, items)
        return
    # Spawned, not forked: Arrow, tokenizers and progress bars have threads, and locks with them.
    pool = ProcessPoolExecutor(
        workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
    )
    try:
        under_way: deque[Future[Result]] = deque()
        for item in items:
            under_way.append(pool.submit(function, item))
            if len(under_way) == 2 * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave interrupts to the parent, and do not outlive it: a worker that waits for its next item
    would never notice that the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Else `datasets` spends three seconds a worker on importing torch, which nothing here uses.
    os.environ["USE_TORCH"] = "NO"

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
