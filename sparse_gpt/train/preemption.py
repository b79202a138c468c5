"""Being told to stop: SIGTERM or SIGUSR1 becomes a checkpoint at the end of the step."""

import signal


class Preempted(Exception):
    """The run saved a checkpoint after `step` completed steps and stops, to go on later."""

    def __init__(self, step: int) -> None:
        super().__init__(f"stopped on a signal after step {step}; start it again to go on")


class Preemption:
    """Notes SIGTERM (schedulers, clouds) and SIGUSR1 (Slurm, ahead of its time limit).

    requested: whether this rank got one. The ranks must agree on the step at which they stop.
    """

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._note)

    def _note(self, *_: object) -> None:
        self.requested = True
