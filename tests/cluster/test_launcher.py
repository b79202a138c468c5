"""What the command line would start."""

import json
import shlex

from sparse_gpt.cluster.launcher import RANK, Launch, deepspeed_command


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


def test_auto_is_a_number_before_ranks_start(command, run_file):
    auto = ("parallel.blocks=auto", "--dry-run")
    done = command("train", run_file, "--devices", "4", *auto)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("parallel.blocks: auto is 1 of 1, 2, 4: a rank has ")
    words = shlex.split(done.stdout.partition("\n")[0])
    assert words[-2:] == ["parallel.blocks=auto", "parallel.blocks=1"]  # the last one counts
    hosts = run_file.with_name("hostfile")
    hosts.write_text("a slots=1\nb slots=1\n")
    done = command("train", run_file, "--hostfile", hosts, *auto)
    assert shlex.split(done.stdout.partition("\n")[0])[-1] == "parallel.blocks=1"
    # A login node is no machine of the job.
    done = command("train", run_file, "--slurm", "--devices", "2", *auto)
    assert (done.returncode, done.stdout) == (2, "")
    assert "here give the number, which sparse-gpt plan tells" in done.stderr


def test_a_launch_is_a_line_for_a_shell():
    command = deepspeed_command(["--num_gpus", "2"], ["--config", "my run.yaml", "seed=1"])
    launch = Launch(2, command, {"OMP_NUM_THREADS": "1", "NOTE": "two words"})
    assert launch.arguments == ["--config", "my run.yaml", "seed=1"]
    assert shlex.split(str(launch)) == ["OMP_NUM_THREADS=1", "NOTE=two words", *command]
    assert [Launch(2, command, hosts=hosts).remote for hosts in ((), ("a",), ("a", "b"))] == [
        False,
        True,
        True,
    ]
