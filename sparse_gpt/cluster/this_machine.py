"""Ranks on this machine."""

import os
import socket
from collections.abc import Sequence

import torch

from sparse_gpt.cluster.launcher import Launch, deepspeed_command
from sparse_gpt.errors import ConfigError


def on_this_machine(
    devices: int | None, arguments: Sequence[str], master_port: int | None = None
) -> Launch:
    """`devices` ranks here: by default one a GPU, or one on the CPU."""
    gpus = torch.cuda.device_count()
    devices = devices or gpus or 1
    if gpus and devices > gpus:
        raise ConfigError(f"--devices {devices}: this machine has {gpus} GPUs")
    environment = {"PYTHONWARNINGS": os.environ.get("PYTHONWARNINGS", "ignore::FutureWarning")}
    if not gpus:
        environment["DS_ACCELERATOR"] = "cpu"
        environment["OMP_NUM_THREADS"] = os.environ.get(
            "OMP_NUM_THREADS", str(max(1, cores() // devices))
        )
    which = _which(devices) if gpus else ["--num_gpus", str(devices)]
    # DeepSpeed would take /job/hostfile if there is one, and start ranks on other hosts.
    options = ["--hostfile", os.devnull, *which, "--master_port", str(master_port or _free_port())]
    return Launch(devices, deepspeed_command(options, arguments), environment)


def cores() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def _which(devices: int) -> list[str]:
    """The devices to take: told a number alone the launcher ignores CUDA_VISIBLE_DEVICES."""
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if all(name.isdigit() for name in visible):
        return ["--include", f"localhost:{','.join(visible[:devices])}"]
    return ["--num_gpus", str(devices)]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
