"""Trains what a sweep still lacks, through the deepspeed launcher, some runs at a time.

May be killed at any moment and started again: finished runs are never repeated, half-finished ones
resume, and a run that outlived a killed sweep is waited for. A run that fails or diverges is said
so, and the rest goes on.
"""

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import torch
from rich.console import Console

from sparse_gpt.cluster.slurm import submit
from sparse_gpt.cluster.this_machine import cores
from sparse_gpt.data import Blend
from sparse_gpt.errors import ConfigError, InputError, told
from sparse_gpt.files import real
from sparse_gpt.progress import Progress
from sparse_gpt.sweep.collect import computed_flops, ended, log_path, reached, state
from sparse_gpt.sweep.grid import Cell, Sweep, write_configs
from sparse_gpt.train.checks import check_data, check_machine, check_settings
from sparse_gpt.train.feed import open_data
from sparse_gpt.train.run_dir import fork, held

_POLL = 1.0  # seconds


class Trainer:
    """Starts runs in processes of their own, `jobs` at a time, `devices` for each."""

    def __init__(self, jobs: int, devices: int) -> None:
        self.jobs, self.devices = jobs, devices
        gpus = torch.cuda.device_count()
        if gpus and jobs * devices > gpus:
            raise ConfigError(
                f"--jobs {jobs} × --devices {devices}: this machine has {gpus} GPUs; give fewer"
            )
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
        names = visible.split(",") if gpus else [""] * jobs * devices
        self._free: SimpleQueue[str] = SimpleQueue()
        for job in range(jobs):
            self._free.put(",".join(names[job * devices : (job + 1) * devices]))
        self._threads = str(max(1, cores() // (jobs * devices)))
        self._processes: set[subprocess.Popen[bytes]] = set()
        self.stopping = threading.Event()

    def train(self, config_path: Path, log: Path) -> int:
        """Train one run to its end, its output appended to `log`; returns the exit code."""
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "sparse_gpt", "train", str(config_path)]
        share = self._free.get()
        environment = {"OMP_NUM_THREADS": self._threads, **os.environ}
        if torch.cuda.device_count():
            environment["CUDA_VISIBLE_DEVICES"] = share
        try:
            with log.open("ab") as file:
                process = subprocess.Popen(
                    [*command, "--devices", str(self.devices)],
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    env=environment,
                    start_new_session=True,  # Ctrl-C is the sweep's, which passes it on once
                )
                self._processes.add(process)
                try:
                    return process.wait()
                finally:
                    self._processes.discard(process)
        finally:
            self._free.put(share)

    def stop(self) -> None:
        """End every run; each saves a checkpoint before and ends its own ranks."""
        self.stopping.set()
        for process in list(self._processes):
            process.terminate()


def run_sweep(
    sweep: Sweep, trainer: Trainer, chain: int | None, changed: Callable[[], None]
) -> list[str]:
    """Train the grid, or its `chain`-th chain alone; returns one line a run that did not make it.

    `changed` is called whenever a chain has ended.
    """
    if chain is not None and not 0 <= chain < len(sweep.chains):
        raise ConfigError(f"--chain {chain}: the sweep has chains 0 to {len(sweep.chains) - 1}")
    chains = sweep.chains if chain is None else [sweep.chains[chain]]
    check_runs([cell for cells in chains for cell in cells], trainer.devices)
    write_configs(sweep)
    # The longest first, so that no long one is left alone at the end.
    chains = sorted(chains, key=lambda cells: -sum(cell.own_flops for cell in cells))
    cells = [cell for cells in chains for cell in cells]
    bar = Progress("", sum(cell.own_flops for cell in cells), wanted=True, of_bytes=False)
    console = bar.console
    problems: list[str] = []
    with bar, ThreadPoolExecutor(trainer.jobs) as pool:
        todo = {pool.submit(_train_chain, cells, trainer, console) for cells in chains}
        try:
            while True:
                if bar.drawn:
                    with suppress(ConfigError, OSError):  # said where the run's turn comes
                        bar.title(f"{sum(map(ended, cells))}/{len(cells)} runs")
                        bar.at(sum(map(computed_flops, cells)))
                if not todo:
                    return problems
                done, todo = wait(todo, timeout=_POLL, return_when=FIRST_COMPLETED)
                for future in done:
                    problems += future.result()
                if done:
                    try:
                        changed()
                    except Exception as error:  # what draws must not end days of training
                        console.print(f"not drawn: {error}", style="yellow", soft_wrap=True)
        except KeyboardInterrupt:
            trainer.stop()
            pool.shutdown(cancel_futures=True)
            raise


def check_runs(cells: Sequence[Cell], devices: int) -> None:
    """Raises ConfigError or DataError where runs cannot be, before the first of them starts: a
    cause that they share once, with the names of those that have it."""
    blends: dict[str, Blend] = {}
    causes: dict[str, list[str]] = {}
    for cell in cells:
        try:
            check_settings(cell.config, devices)
            check_machine(cell.config)
            data = cell.config.data
            key = data.model_dump_json()
            if key not in blends:
                blends[key] = open_data(data)
            check_data(cell.config, blends[key], devices)
        except InputError as error:
            causes.setdefault(str(error), []).append(cell.name)
    if causes:
        lines = [
            line if len(names) == len(cells) else f"{line} (in {', '.join(names)})"
            for line, names in causes.items()
        ]
        raise ConfigError("; ".join(lines))


def _train_chain(cells: list[Cell], trainer: Trainer, console: Console) -> list[str]:
    problems = []
    for cell in cells:
        if trainer.stopping.is_set():
            break
        started, already = time.monotonic(), False
        try:
            already = state(cell) in ("done", "diverged")
            problem = None if already else _train(cells[0], cell, trainer)
            if trainer.stopping.is_set() and not ended(cell):
                console.print(f"{cell.name}: stopped", highlight=False, soft_wrap=True)
                break
            if problem is None and state(cell) == "diverged":
                problem = f"{cell.name}: diverged; it is left out of the fit"
        except Exception as error:  # of one run's files: the others go on
            if (line := told(error)) is None:
                raise
            problem = f"{cell.name}: {line}"
        if problem:
            problems.append(problem)
            console.print(problem, style="yellow", highlight=False, soft_wrap=True)
        elif not already and not console.is_terminal:
            seconds = time.monotonic() - started
            console.print(f"{cell.name}: loss {reached(cell):.4f}, {seconds:.0f} s", soft_wrap=True)
    return problems


def _train(trunk: Cell, cell: Cell, trainer: Trainer) -> str | None:
    """Train a run to its end; returns what went wrong, or None."""
    while True:
        while held(cell.run_dir):  # by ranks that outlived a killed sweep
            if trainer.stopping.wait(_POLL):
                return None
        if state(cell) in ("done", "diverged"):
            return None
        if cell.fork_step is not None and not cell.run_dir.exists():
            fork(trunk.run_dir, cell.fork_step, cell.run_dir)
        code = trainer.train(cell.config_path, log_path(cell))
        if trainer.stopping.is_set():
            return None
        if code and state(cell) not in ("running", "diverged"):
            return f"{cell.name}: failed with exit code {code}; see {log_path(cell)}"


def slurm_script(sweep: Sweep, jobs: int, devices: int) -> str:
    """An array with one task a chain, `jobs` at a time, each on `devices` GPUs of one node."""
    command = [sys.executable, "-m", "sparse_gpt", "sweep", "run", str(real(sweep.path))]
    command += ["--out", str(real(sweep.out)), "--devices", str(devices)]
    return f"""#!/bin/bash
#SBATCH --job-name={sweep.path.stem}
#SBATCH --array=0-{len(sweep.chains) - 1}%{jobs}
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node={devices}
#SBATCH --requeue
#SBATCH --output={real(sweep.out)}/logs/slurm-%A_%a.out
cd {shlex.quote(os.getcwd())}
exec {shlex.join(command)} --chain "$SLURM_ARRAY_TASK_ID"
"""


def submit_array(sweep: Sweep, jobs: int, devices: int) -> str:
    """Write the array's script into the sweep's folder and give it to Slurm; returns its answer."""
    (sweep.out / "logs").mkdir(parents=True, exist_ok=True)
    write_configs(sweep)
    return submit(sweep.out / "sweep.sbatch", slurm_script(sweep, jobs, devices))
