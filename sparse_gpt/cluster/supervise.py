"""Runs a launch to its end: passes signals to the ranks, names the cause of a failure, leaves no
process behind, and starts again after a crash.

DeepSpeed's runner and launcher pass no signal on, or kill the ranks for it, so this looks for the
ranks themselves.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from sparse_gpt.cluster.launcher import RANK, Launch
from sparse_gpt.train.distributed import PREEMPTED
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.preemption import leave_terminal, stop_signals

_POLL = 0.05  # seconds
_LAST_WORDS = 10.0  # seconds in which the other ranks may say what they saw of one that failed
_FAREWELL = 30.0  # seconds after the end of one host's ranks in which those of others must end
_DONE, _FAILED, _BAD_INPUT = 0, 1, 2
_UNKNOWN = 256  # no exit code: its parent has taken note of the end already


def supervise(
    launch: Launch, run_dir: Path, restarts: int, patience: float, again: str = "run again"
) -> int:
    """Run `launch`, after a crash up to `restarts` times again; returns the exit code.

    0 done, 1 failure, 2 bad input, 75 (PREEMPTED) stopped by one of `stop_signals` after a
    checkpoint, for which ranks have `patience` seconds. A second SIGTERM or Ctrl-C raises
    KeyboardInterrupt. Whatever happens, no process of the job outlives this call.

    again: how the user goes on after a stop.
    """
    asked: list[signal.Signals] = []

    def take(number: int, _: object) -> None:
        if asked and number in (signal.SIGTERM, signal.SIGINT):
            raise KeyboardInterrupt
        if number == signal.SIGHUP:
            leave_terminal()
        if number == signal.SIGINT:  # not by print, which this may have interrupted
            with suppress(OSError):
                os.write(
                    2, b"stopping after this step, with a checkpoint; Ctrl-C again ends at once\n"
                )
        asked.append(signal.Signals(number))

    reached: list[int | None] = []  # newest logged step at each crash
    with _on(stop_signals(), take):
        while True:
            code, cause = _run(launch, asked, patience)
            if code != _FAILED:
                break
            rows = read_metrics(run_dir)
            reached.append(rows[-1]["step"] if rows else None)
            restarted = len(reached) - 1
            if restarts and reached[-1:] == reached[-2:-1]:
                where = "before the first step" if reached[-1] is None else f"at step {reached[-1]}"
                cause += f", again {where}: another restart would not help"
                break
            if restarted == restarts:
                break
            delay = min(2**restarted, 60)
            _say(f"{cause}; restart {restarted + 1} of {restarts} in {delay} s")
            until = time.monotonic() + delay
            while time.monotonic() < until and not asked:
                time.sleep(_POLL)
            if asked:
                code, cause = PREEMPTED, f"stopped by {asked[0].name} between restarts"
                break
    if code == PREEMPTED:
        cause += f"; to go on: {again}"
    if cause:
        count = len(reached) - (code == _FAILED)
        after = f" (after {count} restart{'s' * (count > 1)})" if count else ""
        _say(f"{'error: ' if code == _FAILED else ''}{cause}{after}")
    return code


def _run(launch: Launch, asked: Sequence[signal.Signals], patience: float) -> tuple[int, str]:
    """Run it once; returns the exit code, and the cause if the ranks have not said it."""
    environment = os.environ | launch.environment | {"SPARSE_GPT_HOLDS_STDIN": "1"}
    process = subprocess.Popen(
        launch.command, env=environment, stdin=subprocess.PIPE, start_new_session=True
    )
    ranks, hosts = _Ranks(process.pid, launch), _Hosts(process.pid)
    deadline = float("inf")
    try:
        while process.poll() is None and time.monotonic() < deadline:
            time.sleep(_POLL)
            ranks.look()
            if asked:
                ranks.tell(_for_ranks(asked[0]))
                deadline = min(deadline, time.monotonic() + patience)
            if ranks.failure and ranks.failure[1] != PREEMPTED:
                deadline = min(deadline, time.monotonic() + _LAST_WORDS)
            if launch.remote and hosts.silent_for() > _FAREWELL:
                break
        ranks.look()
        hang = launch.remote and process.poll() is None and hosts.silent_for() > _FAREWELL
        orphans = bool(ranks.alive)
    finally:
        _end(process, launch)
    if hang and not asked:
        return _FAILED, (
            "the ranks of one host have ended, and those of another hang: "
            f"{_FAREWELL:.0f} s later all are ended; what they say is above"
        )
    # What the first rank ended with says more than what the runner makes of it, unless the runner
    # has seen a signal end a rank before we looked.
    failure, runner = ranks.failure, process.returncode
    if ranks.reaped is not None and (number := _signed(runner)) < 0 < runner:
        failure = ranks.reaped, number
    code = failure[1] if failure else runner
    if code == _BAD_INPUT or (code == _DONE and not orphans):
        return code, ""
    if code == PREEMPTED or (asked and (failure is None or code == -_for_ranks(asked[0]))):
        by = f"by {asked[0].name}" if asked else "on request"
        how = "after" if code == PREEMPTED else "without"
        return PREEMPTED, f"stopped {by} {how} a checkpoint"
    return _FAILED, _cause(runner, failure)


def _for_ranks(number: signal.Signals) -> signal.Signals:
    """What ranks are sent: SIGTERM for Ctrl-C, which a rank that only starts would meet with a
    traceback."""
    return signal.SIGTERM if number == signal.SIGINT else number


class _Hosts:
    """The ways into the hosts of a job: what pdsh has started, one for each."""

    def __init__(self, runner: int) -> None:
        self._runner = psutil.Process(runner)
        self._looked, self._most, self._since = 0.0, 0, float("inf")

    def silent_for(self) -> float:
        """Seconds since the first host's ranks ended while others' go on; negative if none has."""
        now = time.monotonic()
        if now > self._looked + 1:
            self._looked, ways = now, self._ways()
            if ways < self._most:
                self._since = min(self._since, now)
            self._most = max(self._most, ways)
        return now - self._since

    def _ways(self) -> int:
        with suppress(psutil.Error):
            for process in self._runner.children(recursive=True):
                with suppress(psutil.Error):
                    if any(Path(word).name == "pdsh" for word in process.cmdline()[:2]):
                        living = [way.status() for way in process.children()]
                        return len(living) - living.count(psutil.STATUS_ZOMBIE)
        return 0


class _Ranks:
    """The job's ranks on this machine, as they come and go."""

    def __init__(self, runner: int, launch: Launch) -> None:
        self.alive: dict[int, psutil.Process] = {}
        self.failure: tuple[int, int] | None = None  # the first (rank, exit code) that is not 0
        self.reaped: int | None = None  # one that ended before, its code known to its parent only
        self._runner, self._launch = psutil.Process(runner), launch
        self._told: set[int] = set()

    def look(self) -> None:
        """Find ranks that have started and ranks that have ended."""
        if not self._launch.remote and len(self.alive) < self._launch.world_size:
            self.alive |= _ranks_below(self._runner)
        failed = []
        for rank, process in list(self.alive.items()):
            code = _exit_code(process)
            if code is None:
                continue
            del self.alive[rank]
            if code == _UNKNOWN and self.failure is None and self.reaped is None:
                self.reaped = rank
            elif code not in (_DONE, _UNKNOWN):
                failed.append((code, rank))
        if failed and self.failure is None:
            code, rank = min(failed)  # a signal's is negative: the others' ends follow from it
            self.failure = rank, code

    def tell(self, number: signal.Signals) -> None:
        """Pass a signal on, once to each rank here; of other hosts', one says it to the rest."""
        if self._launch.remote and not self._told:
            kill = f"pkill -{number} -f {shlex.quote(_pattern(self._launch.job))}"
            subprocess.Popen(["ssh", self._launch.hosts[0], kill], stdin=subprocess.DEVNULL)
            self._told.add(0)
        for rank in self.alive.keys() - self._told:
            self._told.add(rank)
            with suppress(psutil.NoSuchProcess):
                self.alive[rank].send_signal(number)


def _ranks_below(runner: psutil.Process) -> dict[int, psutil.Process]:
    """The ranks among the processes that DeepSpeed's runner and its launcher have started."""
    ranks = {}
    with suppress(psutil.NoSuchProcess):
        for process in runner.children(recursive=True):
            with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                if process.cmdline()[1:4] == ["-u", "-m", RANK]:
                    ranks[int(process.environ()["RANK"])] = process
    return ranks


def _pattern(job: str) -> str:
    """What pkill finds the ranks of a job by, but not their launcher or the shell that runs it."""
    return f"[-]-local_rank=[0-9]+ --job {job}"


def _exit_code(process: psutil.Process) -> int | None:
    """What a process ended with, negative a signal; None while it runs; or _UNKNOWN."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return None
        fields = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()
        return os.waitstatus_to_exitcode(int(fields[49]))  # field 52 of proc(5)
    except (psutil.NoSuchProcess, OSError):
        return _UNKNOWN


def _signed(code: int) -> int:
    """An exit code as the rank's that it was: 247 was -9, the end by signal 9."""
    return code if code < 128 else code - 256


def _cause(runner: int, failure: tuple[int, int] | None) -> str:
    """One line about a job that failed, from its first failure or else its runner's exit code."""
    if failure:
        who, code = f"rank {failure[0]}", failure[1]
    elif runner <= 0:
        return "the deepspeed launcher was killed; its ranks are ended"
    else:
        who, code = "a rank", _signed(runner)
    if code < 0:
        memory = " (out of memory?)" if -code == signal.SIGKILL else ""
        return f"{who} was killed by {signal.Signals(-code).name}{memory}"
    return f"{who} failed with exit code {code}; what it says is above"


def _end(process: subprocess.Popen[bytes], launch: Launch) -> None:
    """End every process of the job: checkpoints are whole or not there, so it may be abrupt.

    Told to end, DeepSpeed's runner would end the launchers of all jobs on the hosts.
    """
    with _on(stop_signals(), signal.SIG_IGN):
        whole = process.poll() == _DONE
        if not launch.remote:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
        _end_group(process)
        if launch.remote and not whole:
            _end_on_hosts(launch)


def _end_on_hosts(launch: Launch) -> None:
    """End the job's launchers and ranks on the hosts that answer within some seconds."""
    kill = f"pkill -KILL -f {shlex.quote(f'[-]-job {launch.job}')}"
    environment = {**os.environ, "PDSH_RCMD_TYPE": "ssh"}
    process = subprocess.Popen(
        ["pdsh", "-S", "-f", "1024", "-w", ",".join(launch.hosts), kill],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    with suppress(subprocess.TimeoutExpired):
        process.wait(10)
    _end_group(process)


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Kill a process with the session that it began."""
    deadline = time.monotonic() + 5
    with suppress(ProcessLookupError):
        while time.monotonic() < deadline:
            os.killpg(process.pid, signal.SIGKILL)  # raises when the group is empty
            process.poll()
            time.sleep(_POLL)


@contextmanager
def _on(numbers: Sequence[signal.Signals], handler: Any) -> Iterator[None]:
    """Handle signals in another way for a while."""
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in previous.items():
            signal.signal(number, old)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
