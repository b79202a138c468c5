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


def test_ranks_that_cannot_begin_say_one_line_together(run_file):
    """A rank that another's end or absence has stopped adds no traceback and no frames of C++."""
    (run_file.parent / "run").mkdir()
    (run_file.parent / "run/tensorboard").write_text("a file")
    ranks = start_ranks(run_file)
    outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2]
    assert outputs == [f"error: {run_file.parent / 'run/tensorboard'}: File exists\n", ""]


def test_a_rank_that_finds_no_other_says_one_line(run_file):
    ranks = start_ranks(run_file, "fault.timeout_seconds=1")
    ranks[0].kill()
    said = ranks[1].communicate(timeout=300)[0]
    assert ranks[1].returncode == 1
    [line] = said.splitlines()
    assert line.startswith("error: rank 1 on ")
    assert "another rank is lost or hangs (" in line
