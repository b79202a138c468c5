"""Being told to stop: a signal that asks for it becomes a checkpoint at the end of the step."""

import errno
import io
import os
import signal
import sys
from typing import Any


class Preempted(Exception):
    """The run saved a checkpoint after `step` completed steps and stops, to go on later."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped on a signal after step {step}; start it again to go on")


def stop_signals() -> list[signal.Signals]:
    """SIGTERM (schedulers, clouds), SIGINT (Ctrl-C), SIGUSR1 (Slurm, ahead of its time limit)
    and SIGHUP (a terminal that is closed), unless that is ignored, as under nohup."""
    numbers = [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    return [*numbers, signal.SIGHUP] if hangs_up else numbers


def leave_terminal() -> None:
    """Write nothing more to a terminal that is gone: that would be an error in whatever prints."""
    for stream in (1, 2):
        try:
            os.ttyname(stream)
        except OSError as error:
            if error.errno == errno.EIO:  # it hung up; of a file or pipe it is ENOTTY
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, stream)
                os.close(nowhere)


class _Terminal(io.FileIO):
    """A stream of this process that outlasts the terminal it leads to."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            leave_terminal()
            return len(data)


def outlast_terminal() -> None:
    """Let what is printed to a terminal that is closed be lost, and not end this process: a rank
    prints before it is told."""
    sys.stdout, sys.stderr = (
        io.TextIOWrapper(
            io.BufferedWriter(_Terminal(number, "w", closefd=False)), line_buffering=True
        )
        for number in (1, 2)
    )


class Preemption:
    """Notes the signals that ask to stop.

    requested: whether this rank got one. The ranks must agree on the step at which they stop.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in stop_signals():
            signal.signal(number, self._note)

    def _note(self, number: int, _: object) -> None:
        if number == signal.SIGHUP:
            leave_terminal()
        if number == signal.SIGINT:  # a second Ctrl-C ends at once
            signal.signal(number, signal.SIG_DFL)
        self.requested = True
