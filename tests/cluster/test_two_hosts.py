"""`--hostfile` over two hosts: network namespaces joined by a cable, entered instead of by ssh."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from ranks import (
    ENVIRONMENT,
    ROOT,
    exact,
    finish,
    metrics,
    processes_of,
    start,
    start_ranks,
    until,
    until_gone,
)

from sparse_gpt.train.metrics_file import read_metrics

BUSY = 60.0  # seconds that a busy machine may take besides
HOSTS = tuple(f"sgtest-{os.getpid()}-{name}" for name in "ab")  # tests may run side by side

SSH = f"""#!{sys.executable}
# ssh [-o OPTION] HOST COMMAND...: the command gets neither our environment nor our standard input,
# and does not end with what has started it.
import os, sys
words = sys.argv[3:] if sys.argv[1] == "-o" else sys.argv[1:]
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.setsid()
enter = ["ip", "netns", "exec", words[0], "sh", "-c", " ".join(words[1:])]
os.execvpe("ip", enter, {{"PATH": os.environ["PATH"], "HOME": "/nonexistent"}})
"""

PDSH = f"""#!{sys.executable}
# pdsh -S -f N -w HOST,HOST COMMAND...: on every host at once, %n its number; the worst exit code.
import subprocess, sys
hosts, command = sys.argv[5].split(","), " ".join(sys.argv[6:])
commands = [["ssh", host, command.replace("%n", str(n))] for n, host in enumerate(hosts)]
started = [subprocess.Popen(command) for command in commands]
sys.exit(max(process.wait() % 256 for process in started))
"""


def ip(*arguments):
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def cluster(tmp_path, run_file, monkeypatch):
    """A hostfile of two hosts with a rank each; the commands run in `tmp_path`."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("making network namespaces takes root and the ip command (iproute2)")
    try:
        ip("netns", "add", HOSTS[0])
    except subprocess.CalledProcessError as error:
        pytest.skip(f"no network namespaces here: {error.stderr.decode().strip()}")
    ip("netns", "add", HOSTS[1])
    ip(
        "link",
        "add",
        "cable",
        "netns",
        HOSTS[0],
        "type",
        "veth",
        "peer",
        "cable",
        "netns",
        HOSTS[1],
    )
    for number, host in enumerate(HOSTS, 1):
        ip("-n", host, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
        ip("-n", host, "link", "set", "cable", "up")
        ip("-n", host, "link", "set", "lo", "up")
    tools = tmp_path / "tools"
    tools.mkdir()
    for name, text in {"ssh": SSH, "pdsh": PDSH}.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setitem(ENVIRONMENT, "PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setitem(ENVIRONMENT, "PYTHONPATH", f"{tmp_path}:{ROOT}")
    for name in ("config", "data", "launch"):  # a user's own, which must not be taken for ours
        (tmp_path / f"{name}.py").write_text(f"raise SystemExit('{name}.py was imported')\n")
    # What ssh does not pass on, DeepSpeed reads here: gloo must be told the cable's name.
    names = ("OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "DS_ACCELERATOR")
    lines = [f"{name}={ENVIRONMENT[name]}\n" for name in names]
    (tmp_path / ".deepspeed_env").write_text("".join([*lines, "GLOO_SOCKET_IFNAME=cable\n"]))
    (tmp_path / "hosts").write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    yield tmp_path / "hosts"
    for rank in processes_of(run_file):
        rank.kill()
    for host in HOSTS:
        subprocess.run(["ip", "netns", "del", host], capture_output=True)


def start_training(cluster, run_file, *overrides, run="run"):
    """The command, in training: at least two steps are logged."""
    overrides = (*overrides, f"run_dir={cluster.parent / run}")
    command = [sys.executable, "-m", "sparse_gpt", "train", run_file, *overrides]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    process = start([*command, "--hostfile", cluster], cwd=cluster.parent, **output)
    until(lambda: len(read_metrics(cluster.parent / run)) > 2, process)
    return process


def ended(process, run_file):
    """Its output, once it has ended and left nothing on any host."""
    output, _ = process.communicate(timeout=300)
    until_gone(run_file)
    return output


@pytest.mark.long
def test_two_hosts_train_as_one_and_stop_on_a_signal(cluster, run_file, tmp_path):
    constant = "schedule.final_lr_ratio=1"  # then a step does not depend on the run's length
    process = start_training(cluster, run_file, constant, "duration.steps=100000")
    process.send_signal(signal.SIGUSR1)
    output = ended(process, run_file)
    assert process.returncode == 75, output
    ours = [row.get("train/loss") for row in metrics(tmp_path / "run")]
    one = (constant, f"duration.steps={len(ours) - 1}", f"run_dir={tmp_path / 'one'}")
    finish(start_ranks(run_file, *one))
    assert ours == [row.get("train/loss") for row in metrics(tmp_path / "one")]


@pytest.mark.long
@pytest.mark.parametrize("stop", [[signal.SIGUSR1], [signal.SIGTERM, signal.SIGTERM]])
def test_of_two_jobs_on_the_same_hosts_one_is_stopped_and_the_other_is_as_if_alone(
    cluster, run_file, tmp_path, stop
):
    """Stopped after a checkpoint, or at once."""
    other = shutil.copy(run_file, tmp_path / "other.yaml")
    goes_on = ("schedule.final_lr_ratio=1", "duration.steps=150")
    try:
        first = start_training(cluster, run_file, "duration.steps=100000", run="first")
        second = start_training(cluster, other, *goes_on, run="second")
        for number in stop:
            first.send_signal(number)
            time.sleep(0.2)
        until(lambda: first.poll() is not None, second)
        reached = read_metrics(tmp_path / "second")[-1]["step"]
        output = ended(first, run_file)
        assert first.returncode == (75 if len(stop) == 1 else 130), output
        output = ended(second, other)
        assert second.returncode == 0, output
    finally:
        for rank in processes_of(other):
            rank.kill()
    assert 2 < reached < 150
    finish(start_ranks(run_file, *goes_on, f"run_dir={tmp_path / 'alone'}"))
    assert exact(tmp_path / "second") == exact(tmp_path / "alone")


@pytest.mark.long
def test_a_cut_cable_ends_both_hosts_within_the_set_time(cluster, run_file, tmp_path):
    options = ("fault.timeout_seconds=6", "duration.steps=100000")
    process = start_training(cluster, run_file, *options)
    ip("-n", HOSTS[1], "link", "set", "cable", "down")
    cut = time.monotonic()
    output = ended(process, run_file)
    assert time.monotonic() - cut < 6 + 10 + BUSY
    assert process.returncode == 1
    lost = [line for line in output.splitlines() if "another rank is lost or hangs" in line]
    assert sorted(line.split(" on ")[0] for line in lost) == ["error: rank 0", "error: rank 1"]
    assert "Traceback" not in output


SHARED = ("parallel.blocks=2", "schedule.final_lr_ratio=1")  # each host has half of the blocks


@pytest.mark.long
@pytest.mark.parametrize("fault", ["kill", "stop", "cut"])
def test_blocks_shared_by_two_hosts_outlive_a_fault(cluster, run_file, tmp_path, fault):
    """A rank that is killed or stopped, a cable that is cut: all end within the set time, and the
    run goes on from its checkpoint as one that was never disturbed."""
    options = (*SHARED, "fault.timeout_seconds=8")
    process = start_training(cluster, run_file, *options, "duration.steps=100000")
    until(lambda: (tmp_path / "run/checkpoints/latest").exists(), process)
    ranks = [
        p for p in processes_of(run_file) if p.cmdline()[1:4] == ["-u", "-m", "sparse_gpt.train"]
    ]
    began = time.monotonic()
    if fault == "cut":
        ip("-n", HOSTS[1], "link", "set", "cable", "down")
    else:
        ranks[-1].send_signal(signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
    until(lambda: process.poll() is not None, start(["sleep", "100000"]), 8 + 30 + 10 + BUSY)
    assert time.monotonic() - began < 8 + 30 + 10 + BUSY
    output = ended(process, run_file)
    assert process.returncode == 1
    assert "Traceback" not in output
    assert output.count("another rank is lost") <= 2, output
    if fault == "cut":
        ip("-n", HOSTS[1], "link", "set", "cable", "up")
    reached = int((tmp_path / "run/checkpoints/latest").read_text().removeprefix("step-"))
    last = (*options, f"duration.steps={reached + 8}")
    command = [sys.executable, "-m", "sparse_gpt", "train", run_file, *last]
    output = subprocess.run(
        [*map(str, command), f"run_dir={tmp_path / 'run'}", "--hostfile", str(cluster)],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert output.returncode == 0, output.stderr
    finish(start_ranks(run_file, *last, f"run_dir={tmp_path / 'alone'}"))
    assert exact(tmp_path / "run") == exact(tmp_path / "alone")
