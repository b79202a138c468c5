"""Scripts for Slurm, and handing them over."""

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_gpt.cluster.launcher import RANK
from sparse_gpt.errors import ConfigError
from sparse_gpt.files import publish_text, real
from sparse_gpt.train.distributed import PREEMPTED

_NOTICE = 120  # seconds before the time limit in which ranks save a checkpoint


def train_script(
    run_dir: Path, nodes: int, devices: int, time_limit: str | None, arguments: Sequence[str]
) -> str:
    """A job of `nodes` × `devices` ranks that srun starts, and that queues itself again.

    Slurm signals the ranks before the time limit and at preemption. They all end within seconds of
    each other; `--wait` ends those that a lost one leaves hanging. (With --kill-on-bad-exit the
    first rank that ends after the checkpoint would have the others killed, and srun report that.)
    """
    limit = f"#SBATCH --time={time_limit}\n" if time_limit else ""
    return f"""#!/bin/bash
#SBATCH --job-name={run_dir.name}
#SBATCH --nodes={nodes}
#SBATCH --ntasks-per-node={devices}
#SBATCH --gpus-per-node={devices}
{limit}#SBATCH --signal=USR1@{_NOTICE}
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output={real(run_dir)}/slurm-%j.out
cd {shlex.quote(os.getcwd())}
srun --kill-on-bad-exit=0 --wait=60 {shlex.join([sys.executable, "-u", "-m", RANK, *arguments])}
code=$?
if [ "$code" -eq {PREEMPTED} ]; then scontrol requeue "$SLURM_JOB_ID"; fi
exit "$code"
"""


def submit(path: Path, script: str) -> str:
    """Write `script` to `path` and give it to Slurm; returns its answer. Raises ConfigError."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError("--slurm: there is no sbatch here; run this on a login node of Slurm")
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_text(path, script)
    done = subprocess.run([sbatch, str(path)], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"{path}: sbatch refused it: {done.stderr.strip()}")
    return done.stdout.strip()
