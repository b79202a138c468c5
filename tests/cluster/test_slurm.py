"""Jobs for Slurm, against commands that stand for a Slurm's."""

import os

from sparse_gpt.cluster.launcher import RANK


def test_a_slurm_job_is_written_submitted_and_queues_itself_again(
    command, run_file, tmp_path, monkeypatch
):
    options = ("--slurm", "--nodes", "2", "--devices", "4", "--time", "12:00:00")
    shown = command("train", run_file, *options, "--dry-run", "batch.micro_batch=2")
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
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for code, requeued in (("75", True), ("1", False), ("0", False)):
        monkeypatch.setenv("CODE", code)
        done = command("train", run_file, *options, "batch.micro_batch=2")
        assert done.returncode == 0, done.stderr
        assert f"-m {RANK} --config {run_file} batch.micro_batch=2\n" in done.stdout
        assert ("scontrol requeue 7\n" in done.stdout) == requeued
        assert done.stdout.endswith(f"job ended with {code}\n")
    assert (tmp_path / "run/train.sbatch").read_text() == shown.stdout.removesuffix("\n")

    monkeypatch.setenv("PATH", str(tmp_path))
    refused = command("train", run_file, *options, "batch.micro_batch=2")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: --slurm: there is no sbatch here")
