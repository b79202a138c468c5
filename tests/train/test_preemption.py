import os
import pty
import signal
import sys

import pytest

from sparse_gpt.train.preemption import Preempted, Preemption, stop_signals

NUMBERS = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP]


@pytest.mark.parametrize("number", NUMBERS)
def test_a_signal_is_noted_and_ends_nothing(number):
    before = {each: signal.getsignal(each) for each in NUMBERS}
    try:
        preemption = Preemption()
        assert not preemption.requested
        os.kill(os.getpid(), number)
        assert preemption.requested
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def test_under_nohup_a_closed_terminal_is_nothing():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert stop_signals() == [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGHUP, before)


HUNG_UP = """
import pathlib, sys, time
from sparse_gpt.train.preemption import Preemption
noted = Preemption()
print("ready", flush=True)
while not noted.requested:
    time.sleep(0.01)
print("to nobody", flush=True)
print("to nobody", file=sys.stderr, flush=True)
pathlib.Path(sys.argv[1]).write_text("went on")
"""


def test_a_closed_terminal_is_noted_and_what_is_printed_then_is_no_error(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", HUNG_UP, str(tmp_path / "said")])
    assert b"ready" in os.read(terminal, 100)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert (tmp_path / "said").read_text() == "went on"


def test_the_run_says_where_it_stopped():
    assert str(Preempted(7)) == "stopped on a signal after step 7; start it again to go on"
