import re
import socket
from pathlib import Path

import pytest
from deepspeed.launcher.runner import fetch_hostfile

from sparse_gpt.cluster.hostfile import environment_files, on_hosts
from sparse_gpt.errors import ConfigError


def test_a_hostfile_is_the_launchers(command, run_file, tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("# ours\nnode1 slots=2\nnode2 slots=2\n")
    done = command("train", run_file, "--hostfile", hosts, "--dry-run", "batch.micro_batch=2")
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
        done = command("train", run_file, "--hostfile", hosts)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {message}")


def test_hostfile_mistakes_name_the_line(refused, run_file, tmp_path):
    hosts = tmp_path / "hosts"
    assert "No such file" in refused("train", run_file, "--hostfile", hosts)
    hosts.write_text("node1 slots=8\nnode2 slot=8\n")
    assert f"{hosts}:2" in refused("train", run_file, "--hostfile", hosts)


def test_comments_and_blank_lines_are_no_hosts(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("\n# all of them\nnode1 slots=8  # the first\n\n  node2   slots=4\n")
    launch = on_hosts(hosts, ["--config", "a.yaml"])
    assert (launch.world_size, launch.hosts) == (12, ("node1", "node2"))
    assert launch.remote
    assert launch.arguments == ["--job", launch.job, "--config", "a.yaml"]


def test_a_single_other_host_trains_there_and_this_one_here(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("elsewhere.invalid slots=2\n")
    launch = on_hosts(hosts, ["--config", "a.yaml"])
    assert launch.remote
    assert "--force_multi" in launch.command
    for name in ("localhost", "127.0.0.1", socket.gethostname()):
        hosts.write_text(f"{name} slots=2\n")
        assert not on_hosts(hosts, []).remote


def test_a_job_has_its_own_port_and_name(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    launches = [on_hosts(hosts, []) for _ in range(20)]
    assert len({launch.job for launch in launches}) == 20
    ports = [launch.command[launch.command.index("--master_port") + 1] for launch in launches]
    assert len(set(ports)) > 10
    assert "--master_port 4711" in str(on_hosts(hosts, [], 4711))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("\ufeffnode1 slots=1\n", "hosts: begins with a byte-order mark"),
        ("a slots=1\nb slots=0\n", "hosts:2: b has no slots; leave the line out"),
        ("a slots=1\n$(id) slots=1\n", "hosts:2: is not `name slots=N`"),
        ("a;b slots=1\n", "hosts:1: is not `name slots=N`"),
    ],
)
def test_what_would_be_misread_is_refused(tmp_path, text, says):
    hosts = tmp_path / "hosts"
    hosts.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(says)):
        on_hosts(hosts, [])


def test_what_deepspeed_reads_is_read(tmp_path):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1   slots=8 max_slots=8\nnode2\tslots=4\n")
    assert fetch_hostfile(str(hosts)) == {"node1": 8, "node2": 4}
    assert on_hosts(hosts, []).world_size == 12


def test_a_folder_that_a_shell_would_read_otherwise_is_refused(tmp_path, monkeypatch):
    hosts = tmp_path / "hosts"
    hosts.write_text("node1 slots=1\nnode2 slots=1\n")
    (tmp_path / "my runs; $HOME").mkdir()
    monkeypatch.chdir(tmp_path / "my runs; $HOME")
    with pytest.raises(ConfigError, match="the current folder has a name that a shell on the"):
        on_hosts(hosts, [])


def test_settings_for_all_hosts_are_found_and_checked(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    assert environment_files() == []
    (tmp_path / ".deepspeed_env").write_text("A=1\nB=two words\n")
    assert environment_files() == [Path(".deepspeed_env")]
    (tmp_path / ".deepspeed_env").write_text("A=1\n\n")  # on which DeepSpeed would fail
    with pytest.raises(ConfigError, match=r"\.deepspeed_env:2: is not NAME=VALUE"):
        environment_files()


@pytest.mark.parametrize("line", ["a slots=", "a slots=x", "a slots=-1", " slots=1", "a=2"])
def test_a_line_that_is_no_host_is_refused(tmp_path, line):
    hosts = tmp_path / "hosts"
    hosts.write_text(f"ok slots=1\n{line}\n")
    with pytest.raises(ConfigError, match=r"hosts:2: is not `name slots=N`: "):
        on_hosts(hosts, [])
