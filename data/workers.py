"""A function over items in worker processes, results in order, little of it in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from typing import TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """(item, function(item)) for each item, in order; at most two items a worker are under way,
    and no more are taken from `items`. What `function` raises is raised here. One worker is this
    process itself, with two threads: tiktoken lets go of Python's lock."""
    pool = _pool(workers)
    try:
        under_way: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            under_way.append((item, pool.submit(function, item)))
            if len(under_way) == 2 * workers:
                item, future = under_way.popleft()
                yield item, future.result()
        for item, future in under_way:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _pool(workers: int) -> Executor:
    if workers == 1:
        return ThreadPoolExecutor(2)
    # Spawned, not forked: Arrow, tokenizers and progress bars have threads, and locks with them.
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker)


def _start_worker() -> None:
    """Leave interrupts to the parent, and do not outlive it: a worker that waits for its next item
    would never notice that the parent was killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
