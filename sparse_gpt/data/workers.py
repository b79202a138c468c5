"""A function over items in worker processes, results in order, little of it in memory."""

import multiprocessing
import os
import signal
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, TypeVar

from sparse_gpt.errors import Resumable

Item = TypeVar("Item")
Result = TypeVar("Result")
_to_parent: Connection | None = None  # of a worker


def stopped() -> bool:
    """In a worker: whether its parent wants no more results, so that what takes long may end."""
    return _to_parent is not None and _to_parent.poll()  # no item comes before a result went


def in_order(
    function: Callable[[Item], Result], items: Iterable[Item], workers: int
) -> Generator[tuple[Item, Result], None, None]:
    """(item, function(item)) for each item, in order; at most two items a worker are under way,
    and no more are taken from `items`. What `function` raises is raised here, and Resumable if a
    worker was killed. One worker is this process itself, with two threads: tiktoken lets go of
    Python's lock."""
    with ExitStack() as stack:
        threads = ThreadPoolExecutor(workers if workers > 1 else 2)
        stack.callback(threads.shutdown, cancel_futures=True)
        call = function if workers == 1 else stack.enter_context(_Processes()).call(function)
        under_way: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            under_way.append((item, threads.submit(call, item)))
            if len(under_way) == 2 * workers:
                item, future = under_way.popleft()
                yield item, future.result()
        for item, future in under_way:
            yield item, future.result()


class _Processes:
    """A worker process for each thread that calls, over a connection of its own: workers that
    share a queue share its locks, and one that is killed holding a lock, or in the midst of a
    result, leaves the others waiting for ever. At the end no worker is given more, and
    `stopped()` is true in those that are at work."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._connections: list[Connection] = []

    def call(self, function: Callable[[Item], Result]) -> Callable[[Item], Result]:
        """`function`, done by the calling thread's worker."""

        def remote(item: Item) -> Result:
            if not hasattr(self._own, "connection"):
                self._own.connection = self._start()
            try:
                self._own.connection.send((function, item))
                result, error = self._own.connection.recv()
            except (EOFError, OSError):
                raise Resumable(
                    "a worker was killed, as the system does when memory runs out; run again "
                    "with fewer workers"
                ) from None
            if error is not None:
                raise error
            value: Result = result
            return value

        return remote

    def _start(self) -> Connection:
        # Spawned, not forked: Arrow, tokenizers and progress bars have threads, and locks with
        # them. What is spawned inherits no other worker's connection.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        context.Process(target=_work, args=(theirs,), daemon=True).start()
        theirs.close()
        self._connections.append(ours)
        return ours

    def __enter__(self) -> "_Processes":
        return self

    def __exit__(self, *exc_info: object) -> None:
        for connection in self._connections:
            # Half closed, so that a thread still reads what its worker has for it.
            with socket.socket(fileno=os.dup(connection.fileno())) as end:
                end.shutdown(socket.SHUT_WR)


def _work(to_parent: Connection) -> None:
    """Do items until there are no more. Interrupts are the parent's; a worker does not outlive
    it, even in the midst of an item, and has nothing to say then."""
    global _to_parent
    _to_parent = to_parent
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def follow_parent() -> None:
        parent = multiprocessing.parent_process()
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow_parent, daemon=True).start()
    while True:
        try:
            function, item = to_parent.recv()
        except (EOFError, OSError):
            return
        outcome: tuple[Any, BaseException | None]
        try:
            outcome = function(item), None
        except Exception as error:
            outcome = None, error
        try:
            to_parent.send(outcome)
        except OSError:
            return
