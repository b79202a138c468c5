import threading
from itertools import count, islice

import pytest

from sparse_gpt.data.batches.prefetch import prefetched
from sparse_gpt.errors import DataError


def test_batches_come_in_order_and_are_read_ahead_of_their_use():
    read = threading.Semaphore(0)

    def reading():
        for number in count():
            read.release()
            yield number

    batches = prefetched(reading(), ahead=3)
    assert next(batches) == 0
    for _ in range(4):  # the first, and three that nobody asked for
        assert read.acquire(timeout=30)
    assert not read.acquire(timeout=0.05)
    assert list(islice(batches, 50)) == list(range(1, 51))


def test_an_error_is_raised_where_its_batch_is_asked_for():
    def reading():
        yield 0
        yield 1
        raise DataError("the disk is gone")

    batches = prefetched(reading(), ahead=2)
    assert next(batches) == 0
    assert next(batches) == 1
    with pytest.raises(DataError, match="the disk is gone"):
        next(batches)


def test_closing_ends_the_thread():
    before = threading.active_count()
    batches = prefetched(count())
    next(batches)
    assert threading.active_count() == before + 1
    batches.close()
    assert threading.active_count() == before
