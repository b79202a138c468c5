import socket

import pytest
import torch
from ranks import sparse_gpt

from sparse_gpt.cluster.launcher import RANK
from sparse_gpt.cluster.this_machine import cores, on_this_machine
from sparse_gpt.errors import ConfigError


@pytest.fixture
def gpus(monkeypatch):
    """Gives this machine so many GPUs."""
    return lambda count: monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


def after(option, command):
    return command[command.index(option) + 1]


def test_without_a_gpu_ranks_share_the_cores(no_gpu, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    one, two = on_this_machine(None, ["--config", "a.yaml"]), on_this_machine(2, [])
    assert (one.world_size, two.world_size) == (1, 2)
    assert after("--num_gpus", two.command) == "2"
    assert two.environment["DS_ACCELERATOR"] == "cpu"
    assert two.environment["OMP_NUM_THREADS"] == str(max(1, cores() // 2))
    assert one.arguments == ["--config", "a.yaml"]
    assert one.command[-4:] == ["--module", RANK, "--config", "a.yaml"]
    assert not one.remote
    monkeypatch.setenv("OMP_NUM_THREADS", "3")  # the user's own counts
    assert on_this_machine(2, []).environment["OMP_NUM_THREADS"] == "3"


def test_by_default_a_rank_a_gpu(gpus, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    gpus(4)
    launch = on_this_machine(None, [])
    assert launch.world_size == 4
    assert after("--num_gpus", launch.command) == "4"
    assert "DS_ACCELERATOR" not in launch.environment
    with pytest.raises(ConfigError, match="--devices 5: this machine has 4 GPUs"):
        on_this_machine(5, [])


def test_of_the_gpus_that_are_visible_the_first_are_taken(gpus, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6, 2,7")
    gpus(3)
    assert after("--include", on_this_machine(2, []).command) == "localhost:6,2"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-8932f937")  # which the launcher cannot take
    gpus(1)
    assert after("--num_gpus", on_this_machine(1, []).command) == "1"


def test_its_port_is_free(no_gpu):
    port = int(after("--master_port", on_this_machine(1, []).command))
    with socket.create_server(("127.0.0.1", port)):
        assert 1024 < port < 65536


def test_a_port_that_is_taken_is_named(run_file):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = sparse_gpt("train", run_file, "--master-port", port)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2
    assert len(errors) == 1
    assert f"port {port} of" in errors[0]
    assert "is taken by another program" in errors[0]
    assert "Traceback" not in done.stderr
