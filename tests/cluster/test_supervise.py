"""Signals, kills and hangs of a real job: how the command ends, what it says, what it leaves."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from ranks import metrics, processes_of, start, until, until_gone

from sparse_gpt.cluster.launcher import Launch
from sparse_gpt.cluster.supervise import supervise
from sparse_gpt.train.metrics_file import read_metrics

BUSY = 60.0  # seconds that a busy machine may take besides


def start_training(run_file, *arguments):
    """The command, in training: at least two steps are logged."""
    command = [sys.executable, "-m", "sparse_gpt", "train", run_file, "--devices", "2"]
    process = start(
        [*command, "duration.steps=100000", "checkpoint.every=5", *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    until(lambda: len(read_metrics(run_file.parent / "run")) > 2, process)
    return process


def job(run_file):
    """The processes of the run, by what they are: 0 and 1 (ranks), launcher, runner, command."""
    kinds = {}
    for process in processes_of(run_file):
        line = process.cmdline()
        ranks = [int(part[-1]) for part in line if part.startswith("--local_rank=")]
        module = line[line.index("-m") + 1] if "-m" in line else None
        names = {"deepspeed.launcher.launch": "launcher", "deepspeed.launcher.runner": "runner"}
        kinds[ranks[0] if ranks else names.get(module, "command")] = process
    return kinds


def starts(run_dir):
    return json.loads((run_dir / "provenance.json").read_text())["starts"]


def end(process, run_file, seconds=300):
    """(exit code, lines on stderr) of a command that ends, leaving nothing."""
    try:
        _, errors = process.communicate(timeout=seconds)
    finally:
        until_gone(run_file)
    return process.returncode, errors.splitlines()


@pytest.mark.parametrize(
    "number",
    [
        signal.SIGINT,
        *(pytest.param(n, marks=pytest.mark.long) for n in (signal.SIGTERM, signal.SIGUSR1)),
    ],
)
def test_a_signal_saves_a_checkpoint_and_ends_with_75(run_file, number):
    process = start_training(run_file, "checkpoint.every=100000")
    process.send_signal(number)
    code, errors = end(process, run_file)
    assert code == 75
    again = f"to go on: sparse-gpt train {run_file} --devices 2 duration.steps=100000"
    assert f"stopped by {number.name} after a checkpoint; {again}" in errors[-1]
    assert not [line for line in errors if "[ERROR]" in line or "Traceback" in line]
    last = metrics(run_file.parent / "run")[-1]["step"]
    assert (run_file.parent / "run/checkpoints/latest").read_text() == f"step-{last:08}"


@pytest.mark.long
def test_a_closed_terminal_saves_a_checkpoint(run_file):
    child, terminal = pty.fork()
    if child == 0:
        words = ["train", str(run_file), "--devices", "2", "duration.steps=100000"]
        os.execv(sys.executable, [sys.executable, "-m", "sparse_gpt", *words])
    said = b""
    while b" 3/100000" not in said:
        try:
            said += os.read(terminal, 1000)
        except OSError:  # it has ended
            pytest.fail(said.decode())
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 75
    until_gone(run_file)
    last = metrics(run_file.parent / "run")[-1]["step"]
    assert (run_file.parent / "run/checkpoints/latest").read_text() == f"step-{last:08}"


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_or_control_c_ends_even_a_hung_job_at_once(run_file, number):
    """Long before the 600 seconds that it would have for a checkpoint."""
    process = start_training(run_file)
    hung = job(run_file)[1]
    hung.suspend()
    process.send_signal(number)
    until(lambda: is_pending(signal.SIGTERM, hung), process)  # it was heard, and passed on
    process.send_signal(number)
    assert end(process, run_file, BUSY)[0] == 130


def is_pending(number, process):
    """Whether a signal waits for a process, as for one that is suspended."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    [pending] = [line.split()[1] for line in status.splitlines() if line.startswith("ShdPnd")]
    return int(pending, 16) >> (number - 1) & 1


@pytest.mark.long
def test_what_listens_is_the_jobs_own_on_loopback_and_none_outlives_a_killed_command(run_file):
    process = start_training(run_file)
    heard = {}
    for kind, one in job(run_file).items():
        listening = [s.laddr for s in one.net_connections() if s.status == psutil.CONN_LISTEN]
        assert {address.ip for address in listening} <= {"127.0.0.1"}
        heard[kind] = {address.port for address in listening}
    [port] = [
        int(word.removeprefix("--master_port="))
        for word in job(run_file)["launcher"].cmdline()
        if word.startswith("--master_port=")
    ]
    assert port in heard[0]
    assert {kind for kind, ports in heard.items() if ports} == {0, 1}  # ranks alone
    process.kill()
    assert end(process, run_file)[0] == -signal.SIGKILL


@pytest.mark.long
def test_a_killed_launcher_leaves_no_ranks(run_file):
    process = start_training(run_file)
    job(run_file)["launcher"].kill()
    code, errors = end(process, run_file)
    assert code == 1
    assert errors[-1] == "error: the deepspeed launcher was killed; its ranks are ended"


def test_a_killed_rank_is_named_and_the_run_started_again(run_file):
    process = start_training(run_file, "--restarts", "1")
    run_dir = run_file.parent / "run"
    with (run_dir / "metrics.jsonl").open() as record:  # the next start makes a new file
        job(run_file)[1].kill()
        until(lambda: len(starts(run_dir)) == 2, process)
        reached = len(record.readlines())
    until(lambda: len(read_metrics(run_dir)) > reached + 1, process)
    job(run_file)[0].kill()
    code, errors = end(process, run_file)
    assert code == 1
    killed = "was killed by SIGKILL (out of memory?)"
    assert f"rank 1 {killed}; restart 1 of 1 in 1 s" in errors
    assert errors[-1] == f"error: rank 0 {killed} (after 1 restart)"
    lost = [line.split(" on ")[0] for line in errors if "another rank is lost or hangs" in line]
    assert lost == ["error: rank 0", "error: rank 1"]


@pytest.mark.parametrize(("code", "starts"), [(0, 1), (1, 2), (2, 1), (75, 1)])
def test_no_restart_where_it_cannot_help(tmp_path, capfd, code, starts):
    launch = Launch(1, ["sh", "-c", f"echo started; exit {code}"])
    assert supervise(launch, tmp_path, restarts=5, patience=10) == code
    output, errors = capfd.readouterr()
    assert output.count("started") == starts
    if code == 1:
        assert errors.splitlines()[-1] == (
            "error: a rank failed with exit code 1; what it says is above, again before the first "
            "step: another restart would not help (after 1 restart)"
        )


@pytest.mark.long
def test_a_hung_rank_ends_the_run_within_the_set_time(run_file):
    process = start_training(run_file, "fault.timeout_seconds=5")
    stopped = time.monotonic()
    job(run_file)[1].suspend()
    code, errors = end(process, run_file)
    assert code == 1
    assert time.monotonic() - stopped < 5 + 10 + BUSY  # 10: in which it may say why
    [line] = [line for line in errors if "another rank is lost or hangs" in line]
    assert line.startswith("error: rank 0 on ")
    assert "rank 0 failed with exit code 1" in errors[-1]


@pytest.mark.long
@pytest.mark.parametrize("lost", ["deleted", "moved away"])
def test_a_run_whose_folder_is_lost_ends_in_one_line_and_does_not_begin_anew(run_file, lost):
    process = start_training(run_file, "--restarts", "2")
    run_dir = run_file.parent / "run"
    shutil.rmtree(run_dir) if lost == "deleted" else run_dir.rename(run_file.parent / "moved")
    code, errors = end(process, run_file)
    assert code == 2
    [line] = [line for line in errors if "launch.py" not in line]  # of DeepSpeed's log
    assert line.startswith(f"error: {run_dir}: was deleted or moved away while it trained; ")
    assert not run_dir.exists()
