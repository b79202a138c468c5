import os
import signal

import pytest

from sparse_gpt.train.preemption import Preempted, Preemption


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_noted_and_ends_nothing(number):
    before = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        preemption = Preemption()
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_the_run_says_where_it_stopped():
    assert str(Preempted(7)) == "stopped on a signal after step 7; start it again to go on"
