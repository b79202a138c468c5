"""A function over items in worker processes, results in order, little of it in memory."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from multiprocessing.synchronize import Event
from typing import TypeVar

from sparse_gpt.errors import Resumable

Item = TypeVar("Item")
Result = TypeVar("Result")
_stop: Event | None = None  # of a worker: its parent's


def stopped() -> bool:
    """In a worker: whether its parent wants no more results, so that what takes long may end."""
    return _stop is not None and _stop.is_set()


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """(item, function(item)) for each item, in order; at most two items a worker are under way,
    and no more are taken from `items`. What `function` raises is raised here, and Resumable if a
    worker was killed. One worker is this process itself, with two threads: tiktoken lets go of
    Python's lock."""
    with ExitStack() as stack:
        pool = _pool(workers, stack)
        under_way: deque[tuple[Item, Future[Result]]] = deque()
        try:
            for item in items:
                under_way.append((item, pool.submit(function, item)))
                if len(under_way) == 2 * workers:
                    item, future = under_way.popleft()
                    yield item, future.result()
            for item, future in under_way:
                yield item, future.result()
        except BrokenProcessPool:
            raise Resumable(
                "a worker was killed, as the system does when memory runs out; run again with "
                "fewer workers"
            ) from None


def _pool(workers: int, stack: ExitStack) -> Executor:
    """Processes or threads that end with the stack."""
    pool: Executor
    if workers == 1:
        pool = ThreadPoolExecutor(2)
        stack.callback(pool.shutdown, cancel_futures=True)
        return pool
    # Spawned, not forked: Arrow, tokenizers and progress bars have threads, and locks with them.
    context = multiprocessing.get_context("spawn")
    stop = context.Event()
    pool = ProcessPoolExecutor(workers, context, _start_worker, (stop,))
    stack.callback(pool.shutdown, cancel_futures=True)
    stack.callback(stop.set)  # the first of both
    return pool


def _start_worker(stop: Event) -> None:
    """Leave interrupts to the parent, and do not outlive it: a worker that waits for its next item
    would never notice that the parent was killed."""
    global _stop
    _stop = stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
