"""What `data.corpus.isolated` calls in its process, which finds this by its name."""

import os
from collections.abc import Iterator

from sparse_gpt.errors import DataError


def numbers(count: int, then: int | str | None = None) -> Iterator[tuple[int, bytes]]:
    for number in range(count):
        yield number, b"x" * number
    if isinstance(then, str):
        raise DataError(then)
    if then is not None:
        os.kill(os.getpid(), then)


def here() -> Iterator[tuple[str, bytes]]:
    yield os.getcwd(), b""


def pid() -> Iterator[tuple[int, bytes]]:
    yield os.getpid(), b""
    yield 0, b""
