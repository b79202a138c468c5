"""launch/slurm.sbatch as sbatch runs it: no Slurm here, but stand-ins that start its ranks."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import ROOT, metrics

from sparse_gpt.cluster.slurm import train_script

FILE = ROOT / "launch/slurm.sbatch"

SBATCH = rf"""#!{sys.executable}
# sbatch [--OPTION=VALUE...] SCRIPT [ARGUMENT...]: the job's stays, here and now, to its exit code.
import os, re, subprocess, sys
from pathlib import Path

KNOWN = '''job-name nodes ntasks-per-node gpus-per-node cpus-per-task time signal requeue
    open-mode output'''.split()
given = [word for word in sys.argv[1:] if word.startswith("--")]
script, *arguments = sys.argv[1 + len(given):]
text = Path(script).read_text()
head = re.match(r"(#.*\n|\n)*", text)[0]  # sbatch looks no further than the first command
words = re.findall("^#SBATCH (.*)$", head, re.M) + given
asked = dict(re.fullmatch(r"--([a-z-]+)=?(\S*)", word).groups() for word in words)
assert set(asked) <= set(KNOWN), asked
job = str(os.getpid())
env = os.environ | {{
    "SLURM_JOB_ID": job,
    "SLURM_NTASKS": str(int(asked["nodes"]) * int(asked["ntasks-per-node"])),
    "SLURM_CPUS_PER_TASK": asked["cpus-per-task"],
    "SLURM_JOB_NODELIST": "127.0.0.1",
}}
copy, again = Path("slurm_script"), Path(f"requeue-{{job}}")
copy.write_text(text)
output = asked["output"].replace("%x", asked["job-name"]).replace("%j", job)
while True:
    with open(output, {{"append": "a"}}[asked["open-mode"]]) as out:
        code = subprocess.call(["bash", copy, *arguments], env=env, stdout=out, stderr=out)
    if not again.exists():
        sys.exit(code)
    again.unlink()
"""

SRUN = f"""#!{sys.executable}
# srun --OPTION=VALUE... COMMAND...: its tasks, to their highest exit code; passes SIGUSR1 on.
import os, signal, subprocess, sys
from pathlib import Path

start = sys.argv.index("python")
options, command = sys.argv[1:start], sys.argv[start:]
assert options == ["--kill-on-bad-exit=0", "--wait=60", "--cpus-per-task=8"], options
tasks = []
signal.signal(signal.SIGUSR1, lambda *_: [task.send_signal(signal.SIGUSR1) for task in tasks])
for number in range(int(os.environ["SLURM_NTASKS"])):
    place = {{"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}}
    tasks.append(subprocess.Popen(command, env=os.environ | place))
Path("srun.pid").write_text(str(os.getpid()))
sys.exit(max(task.wait() for task in tasks))
"""

SCONTROL = """#!/bin/sh
[ "$1" = requeue ] && touch "requeue-$2"
"""


@pytest.fixture
def sbatch(tmp_path, shell):
    """Submits the file for two ranks of one node from a folder of its own; returns the process."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    env = shell | {"PATH": f"{tools}:{shell['PATH']}"}

    def submit(*arguments):
        command = ["sbatch", "--nodes=1", "--ntasks-per-node=2", str(FILE), *arguments]
        return subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)

    return submit


def test_it_is_what_the_command_writes():
    """But for the names, what else a cluster asks for, and comments."""
    text = FILE.read_text()
    written = train_script(Path("run"), 4, 8, "24:00:00", ["--config", "run.yaml"])
    own = {"#SBATCH --job-name", "#SBATCH --output"}
    for line in written.splitlines():
        if line.startswith("#SBATCH") and line.split("=")[0] not in own:
            assert f"\n{line}\n" in text
    launch = re.search(r"^(srun --\S+ --\S+) .* (-u -m \S+ --config) ", written, re.M)
    joined = text.replace(" \\\n ", "")
    assert re.search(rf"^{launch[1]} .* python {launch[2]} \"\$@\"$", joined, re.M)
    end = written.index("code=$?")
    for line in written[end:].splitlines():
        assert f"\n{line}\n" in text


def test_a_job_trains_is_told_to_stop_and_goes_on(sbatch, long_run_file, wait_for_steps, tmp_path):
    job = sbatch(str(long_run_file), "checkpoint.every=1000")
    wait_for_steps(job, tmp_path / "run")
    os.kill(int((tmp_path / "srun.pid").read_text()), signal.SIGUSR1)
    assert job.wait(300) == 0
    steps = [row["step"] for row in metrics(tmp_path / "run") if "train/loss" in row]
    assert steps == list(range(1, 61))
    output = (tmp_path / f"slurm-sparse-gpt-{job.pid}.out").read_text()
    (stopped,) = re.findall(r"^stopped on a signal after step (\d+); start it again", output, re.M)
    seen = [int(step) for step in re.findall(r"^step +(\d+)/60 +loss", output, re.M)]
    assert seen == steps  # of both stays: the second does not do the first's again
    assert 3 <= int(stopped) < 60


def test_without_a_run_file_it_says_what_it_wants(sbatch, tmp_path):
    job = sbatch()
    assert job.wait(60) != 0
    output = (tmp_path / f"slurm-sparse-gpt-{job.pid}.out").read_text()
    assert output.endswith("usage: sbatch launch/slurm.sbatch CONFIG [key=value...]\n")
