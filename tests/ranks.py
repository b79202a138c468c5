"""Starts the command line and ranks as users and launchers do, and waits for what they do.

Nothing here expects anything to be quick: a time limit is where a hang is taken for one.
"""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from sparse_gpt.train.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # nothing here compiles, and inductor takes seconds to import
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
    "WANDB_MODE": "offline",
    "MLFLOW_TRACKING_URI": "",
}


_started: list[subprocess.Popen[str]] = []


def start(command: Sequence[str | Path], **options: Any) -> subprocess.Popen[str]:
    """A process that does not outlive the test that starts it (see conftest.py)."""
    settings = {"env": ENVIRONMENT, "cwd": ROOT, "text": True, **options}
    _started.append(subprocess.Popen(list(map(str, command)), **settings))
    return _started[-1]


def end_what_was_started() -> None:
    """Kill what a failed test has left running."""
    for process in _started:
        if process.poll() is None:
            process.kill()
            process.wait()
    _started.clear()


def sparse_gpt(*arguments: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "sparse_gpt", *map(str, arguments)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def stage(number: int) -> str:
    """The override that sets a ZeRO stage."""
    return f"deepspeed={{zero_optimization: {{stage: {number}}}}}"


def start_ranks(
    run_file: Path,
    *overrides: str,
    world_size: int = 2,
    odd: Sequence[str] = (),
    script: Path = ROOT / "launch/train.py",
) -> list[subprocess.Popen[str]]:
    """Start train.py once a rank, as any launcher does, without the launcher's start-up time.

    The last rank has the overrides `odd` besides.
    """
    command = [sys.executable, str(script), "--config", str(run_file), *overrides]
    return _start([command] * (world_size - 1) + [[*command, *odd]])


def run_on_ranks(code: str, *arguments: str | Path, world_size: int = 2) -> list[str]:
    """What `world_size` processes print that run `code`, each with a rank of its own."""
    return finish(_start([[sys.executable, "-c", code, *map(str, arguments)]] * world_size))


def _start(commands: Sequence[list[str]]) -> list[subprocess.Popen[str]]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        start(
            command,
            env={
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(len(commands)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for rank, command in enumerate(commands)
    ]


def finish(ranks: list[subprocess.Popen[str]], timeout: float = 300) -> list[str]:
    """Wait for ranks that must succeed; returns what each printed."""
    outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(outputs)
    return outputs


def until(
    condition: Callable[[], object], process: subprocess.Popen[Any], seconds: float = 300
) -> None:
    """Return when `condition` holds, which it must before `process` ends."""
    deadline = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.communicate()}")
        assert time.monotonic() < deadline, "it hangs"
        time.sleep(0.005)


def processes_of(run_file: Path) -> list[psutil.Process]:
    """The living processes, of whatever kind, whose command line names a run file."""
    found = []
    for process in psutil.process_iter():
        try:
            if str(run_file) in process.cmdline():
                found.append(process)
        except psutil.Error:
            continue
    return found


def until_gone(run_file: Path, seconds: float = 60) -> None:
    """Return when no process of a run is left; what is left then fails the test, and is killed."""
    deadline = time.monotonic() + seconds
    while (left := processes_of(run_file)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for process in left:
        process.kill()
    assert not left


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return read_metrics(run_dir)


EXACT = ("train/loss", "train/grad_norm", "train/learning_rate", "val/loss")


def exact(run_dir: Path) -> dict[int, list[Any]]:
    """What is equal to the bit in equal runs, by step."""
    return {row["step"]: [row.get(tag) for tag in EXACT] for row in metrics(run_dir)}
