"""Worker processes: order, errors, and ends of every kind."""

import multiprocessing
import threading
import time
from pathlib import Path

import pytest

from sparse_gpt.data.workers import in_order, stopped
from sparse_gpt.errors import DataError, Resumable


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import this module; pytest itself loads it by its path."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])


def slow_square(number: int) -> int:
    time.sleep(0.05 * (number % 3))
    return number * number


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_results_come_in_order(workers: int) -> None:
    expected = [(number, number * number) for number in range(12)]
    assert list(in_order(slow_square, range(12), workers)) == expected


def fail_at_three(number: int) -> int:
    if number == 3:
        raise DataError("three")
    return number


def test_what_the_function_raises_is_raised() -> None:
    with pytest.raises(DataError, match="three"):
        list(in_order(fail_at_three, range(9), 2))


def until_stopped(path: Path) -> bool:
    path.touch()
    while not stopped():
        time.sleep(0.01)
    path.unlink()
    return True


def test_one_that_is_at_work_is_told_to_stop(tmp_path: Path) -> None:
    """By a failure beside it, without which it would go on for ever."""
    running, failed = tmp_path / "running", tmp_path / "failed"
    with pytest.raises(DataError, match="beside"):
        list(in_order(_either, (failed, running), 2))
    assert not running.exists()


def _either(path: Path) -> bool:
    if path.name == "running":
        return until_stopped(path)
    while not path.with_name("running").exists():
        time.sleep(0.01)
    raise DataError("beside")


def ask_and_answer(size: int) -> bytes:
    """Busy with what a worker shares with others: `stopped()`, and results larger than a pipe."""
    for _ in range(200):
        assert not stopped()
    return bytes(size)


@pytest.mark.parametrize("wait", [0.0, 0.01, 0.05, 0.2])
def test_a_kill_at_any_moment_is_an_error_and_no_hang(wait: float) -> None:
    results = in_order(ask_and_answer, [10**6] * 10_000, 2)
    next(results)
    victim = multiprocessing.active_children()[0]
    killer = threading.Timer(wait, victim.kill)
    killer.start()
    with pytest.raises(Resumable, match="a worker was killed"):
        for _ in results:
            pass
    killer.join()
