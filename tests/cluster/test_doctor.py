import json
import resource
import shutil
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace

import psutil
import pytest
import torch

from sparse_gpt.cluster import doctor
from sparse_gpt.cluster.doctor import examine
from sparse_gpt.cluster.this_machine import cores


def test_doctor_finds_what_training_needs(command):
    found = {row["what"]: row for row in json.loads(command("doctor", "--json").stdout)}
    assert found["deepspeed"]["status"] == "ok"
    assert found["GPU"]["fix"]


@pytest.fixture
def finding(no_gpu):
    """What is found of something."""

    def look(what):
        [found] = [found for found in examine() if found.what == what]
        return found

    return look


def test_a_machine_that_trains_has_no_problem(finding):
    assert all(found.status != "problem" for found in examine())
    assert finding("torch").found == torch.__version__
    assert finding("CPU cores").found == str(cores())
    assert finding("grouped product").found == "fp32 grouped_mm, bf16 grouped_mm"


def test_a_missing_package_is_a_problem_that_ends_the_command(command, finding, monkeypatch):
    def version(name):
        if name == "tiktoken":
            raise PackageNotFoundError(name)
        return "1.0"

    monkeypatch.setattr(doctor, "version", version)
    assert (finding("tiktoken").status, finding("torch").status) == ("problem", "ok")
    assert "pip install" in finding("tiktoken").fix
    done = command("doctor")
    assert done.returncode == 1
    assert "problem" in done.stdout
    assert "is not installed" in done.stdout


def test_what_limits_is_a_note(finding, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=int(5e8)))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=int(3e9)))
    monkeypatch.setattr(resource, "getrlimit", lambda what: (256, 256))
    limits = ("C compiler", "memory free", "disk free here", "shared memory", "open files")
    for what in limits:
        assert finding(what).status == "note", what
        assert finding(what).fix, what
    assert finding("memory free").found == "3.0 GB"
    assert finding("open files").found == "256"


def test_a_gpu_is_described(finding, monkeypatch):
    memory = SimpleNamespace(total_memory=int(80e9))
    for name, value in {
        "is_available": True,
        "device_count": 1,
        "get_device_properties": memory,
        "get_device_name": "NVIDIA H100 80GB HBM3",
        "is_bf16_supported": False,
        "get_device_capability": (8, 0),
    }.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: False)
    found = finding("GPU 0")
    assert found.found == "NVIDIA H100 80GB HBM3, 80 GB, without bf16"
    assert found.fix == "precision=fp16"
    assert finding("NCCL").status == "problem"
    product = finding("grouped product")
    assert (product.status, product.found) == ("note", "fp32 loop, bf16 loop")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    product = finding("grouped product")
    assert (product.status, product.found) == ("ok", "fp32 loop, bf16 grouped_mm")


def test_gpus_that_are_unlike_or_apart_are_noted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU of kind {index // 2}")
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda a, b: a // 2 == b // 2)
    unlike, apart = doctor._among_gpus(4)
    assert unlike.found == "are not alike: GPU of kind 0, GPU of kind 1"
    assert apart.found == "none between 0-2, 0-3, 1-2, 1-3"
    assert [*doctor._among_gpus(2)] == []
