"""What the command line would start, here, on the hosts of a hostfile and under Slurm."""

import json
import os
import shlex

from ranks import ENVIRONMENT, sparse_gpt

from sparse_gpt.cluster.launcher import RANK


def test_a_dry_run_prints_what_would_run_and_touches_nothing(run_file):
    before = sorted(run_file.parent.rglob("*"))
    done = sparse_gpt("train", run_file, "--devices", "2", "--dry-run", "optimizer.lr=1e-4")
    assert done.returncode == 0, done.stderr
    assert sorted(run_file.parent.rglob("*")) == before
    line, _, config = done.stdout.partition("\n")
    words = shlex.split(line)
    assert "DS_ACCELERATOR=cpu" in words[: words.index("-m")]
    assert words[-5:] == ["--module", RANK, "--config", str(run_file), "optimizer.lr=1e-4"]
    assert "deepspeed.launcher.runner" in words
    assert json.loads(config)["gradient_accumulation_steps"] == 2


def test_a_hostfile_is_the_launchers(run_file, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nnode1 slots=2\nnode2 slots=2\n")
    done = sparse_gpt("train", run_file, "--hostfile", hosts, "--dry-run", "batch.micro_batch=2")
    assert done.returncode == 0, done.stderr
    assert f"--hostfile {hosts} " in done.stdout
    assert '"train_batch_size": 16' in done.stdout
    assert '"gradient_accumulation_steps": 2' in done.stdout
    for text, message in (
        ("node1\n", f"{hosts}:1: is not `name slots=N`: 'node1'"),
        ("", f"{hosts}: names no host"),
        ("a slots=1\na slots=1\n", f"{hosts}:2: names a twice"),
    ):
        hosts.write_text(text)
        done = sparse_gpt("train", run_file, "--hostfile", hosts)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}")


def test_a_slurm_job_is_written_submitted_and_queues_itself_again(run_file, tmp_path, monkeypatch):
    options = ("--slurm", "--nodes", "2", "--devices", "4", "--time", "12:00:00")
    shown = sparse_gpt("train", run_file, *options, "--dry-run", "batch.micro_batch=2")
    assert shown.returncode == 0, shown.stderr
    for line in (
        "--nodes=2",
        "--ntasks-per-node=4",
        "--gpus-per-node=4",
        "--time=12:00:00",
        "--signal=USR1@120",
        "--requeue",
        "--open-mode=append",
    ):
        assert f"#SBATCH {line}\n" in shown.stdout
    assert not (tmp_path / "run").exists()

    tools = tmp_path / "tools"  # a Slurm whose ranks end with a given exit code
    tools.mkdir()
    for name, text in {
        "sbatch": 'bash "$1"; echo "job ended with $?"',
        "srun": 'echo "srun $*"; exit $CODE',
        "scontrol": 'echo "scontrol $*"',
    }.items():
        (tools / name).write_text(f"#!/bin/sh\n{text}\n")
        (tools / name).chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setitem(ENVIRONMENT, "SLURM_JOB_ID", "7")
    for code, requeued in (("75", True), ("1", False), ("0", False)):
        monkeypatch.setitem(ENVIRONMENT, "CODE", code)
        done = sparse_gpt("train", run_file, *options, "batch.micro_batch=2")
        assert done.returncode == 0, done.stderr
        assert f"-m {RANK} --config {run_file} batch.micro_batch=2\n" in done.stdout
        assert ("scontrol requeue 7\n" in done.stdout) == requeued
        assert done.stdout.endswith(f"job ended with {code}\n")
    assert (tmp_path / "run/train.sbatch").read_text() == shown.stdout.removesuffix("\n")

    monkeypatch.setitem(ENVIRONMENT, "PATH", str(tmp_path))
    refused = sparse_gpt("train", run_file, *options, "batch.micro_batch=2")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --slurm: there is no sbatch here")


def test_options_that_contradict_each_other_are_refused(run_file, tmp_path):
    for options in (
        ["--slurm"],
        ["--slurm", "--devices", "1", "--restarts", "1"],
        ["--nodes", "2"],
        ["--devices", "1", "--hostfile", str(tmp_path)],
    ):
        done = sparse_gpt("train", run_file, *options)
        assert done.returncode == 2
        assert done.stderr.startswith("error: --")
        assert done.stderr.count("\n") == 1
