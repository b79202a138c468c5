"""Jobs for Slurm, against commands that stand for a Slurm's."""

import os
import shlex
import subprocess

import pytest

from sparse_gpt.cluster.launcher import RANK
from sparse_gpt.cluster.slurm import submit, train_script
from sparse_gpt.errors import ConfigError


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


def test_a_script_is_one_that_bash_reads_whatever_the_words_in_it(tmp_path, monkeypatch):
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    words = ["--config", "my run.yaml", "data.blend={a: 1, b: 2}", "run_dir=$HOME"]
    script = train_script(folder / "run", 1, 2, None, words)
    assert "--time" not in script
    lines = script.splitlines()
    assert [shlex.split(line)[1:] for line in lines if line.startswith("cd ")] == [[str(folder)]]
    [srun] = [shlex.split(line) for line in lines if line.startswith("srun ")]
    assert srun[-len(words) - 2 :] == ["-m", RANK, *words]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0


def test_what_sbatch_refuses_is_said(tmp_path, monkeypatch):
    sbatch = tmp_path / "tools/sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text("#!/bin/sh\necho 'invalid partition' >&2; exit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", f"{sbatch.parent}:{os.environ['PATH']}")
    path = tmp_path / "new/job.sbatch"
    with pytest.raises(ConfigError, match=r"job\.sbatch: sbatch refused it: invalid partition$"):
        submit(path, "#!/bin/bash\n")
    assert path.read_text() == "#!/bin/bash\n"
