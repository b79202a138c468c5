"""A rank under every launcher, and how it ends."""

import os
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT, exact, finish, start_ranks


@pytest.mark.long
def test_torchrun_and_srun_train_as_any_launcher(run_file, tmp_path):
    finish(start_ranks(run_file, f"run_dir={tmp_path / 'plain'}"))
    plain = exact(tmp_path / "plain")
    script = [str(ROOT / "launch/train.py"), "--config", str(run_file)]

    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command = [*torchrun, *script, f"run_dir={tmp_path / 'torchrun'}"]
    subprocess.run(command, env=ENVIRONMENT, check=True, timeout=180, capture_output=True)
    assert exact(tmp_path / "torchrun") == plain

    ranks = []
    for rank in "01":  # what srun sets, without a Slurm
        slurm = {"NTASKS": "2", "PROCID": rank, "LOCALID": rank}
        slurm |= {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "127.0.0.1"}
        env = ENVIRONMENT | {f"SLURM_{name}": value for name, value in slurm.items()}
        command = [sys.executable, *script, f"run_dir={tmp_path / 'srun'}"]
        output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        ranks.append(subprocess.Popen(command, env=env, text=True, **output))
    finish(ranks)
    assert exact(tmp_path / "srun") == plain
