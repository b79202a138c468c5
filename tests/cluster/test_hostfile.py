import pytest

from sparse_gpt.cluster.hostfile import on_hosts
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
    assert launch.arguments == ["--config", "a.yaml"]


@pytest.mark.parametrize("line", ["a slots=", "a slots=x", "a slots=-1", " slots=1", "a=2"])
def test_a_line_that_is_no_host_is_refused(tmp_path, line):
    hosts = tmp_path / "hosts"
    hosts.write_text(f"ok slots=1\n{line}\n")
    with pytest.raises(ConfigError, match=r"hosts:2: is not `name slots=N`: "):
        on_hosts(hosts, [])
