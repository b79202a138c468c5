"""What the command line would start, here, on the hosts of a hostfile and under Slurm."""

import json
import shlex

from sparse_gpt.cluster.launcher import RANK


def test_a_dry_run_prints_what_would_run_and_touches_nothing(command, run_file):
    before = sorted(run_file.parent.rglob("*"))
    done = command("train", run_file, "--devices", "2", "--dry-run", "optimizer.lr=1e-4")
    assert done.returncode == 0, done.stderr
    assert sorted(run_file.parent.rglob("*")) == before
    line, _, config = done.stdout.partition("\n")
    words = shlex.split(line)
    assert "DS_ACCELERATOR=cpu" in words[: words.index("-m")]
    assert words[-5:] == ["--module", RANK, "--config", str(run_file), "optimizer.lr=1e-4"]
    assert "deepspeed.launcher.runner" in words
    assert json.loads(config)["gradient_accumulation_steps"] == 2
