"""Where to run: this machine or the hosts of a hostfile. Builds the launcher's command line."""

import os
import shlex
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from launch.errors import ConfigError

TRAIN = Path(__file__).with_name("train.py")


@dataclass(frozen=True)
class Launch:
    """A command that starts the ranks, and what its environment has beyond this one."""

    world_size: int
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    hosts: tuple[str, ...] = ()  # of a hostfile

    @property
    def remote(self) -> bool:
        """Whether the ranks run on other hosts; DeepSpeed starts those of a single host here."""
        return len(self.hosts) > 1

    @property
    def arguments(self) -> list[str]:
        """What train.py gets."""
        return self.command[self.command.index(str(TRAIN)) + 1 :]

    def __str__(self) -> str:
        """A line for a shell: the command after the environment that it needs beyond this one."""
        settings = [f"{name}={shlex.quote(value)}" for name, value in self.environment.items()]
        return " ".join([*settings, shlex.join(self.command)])


def on_this_machine(devices: int | None, arguments: Sequence[str]) -> Launch:
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
    options = [*which, "--master_port", str(_free_port())]
    return Launch(devices, _deepspeed(options, arguments), environment)


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


def on_hosts(hostfile: Path, arguments: Sequence[str]) -> Launch:
    """Every slot of a DeepSpeed hostfile (`name slots=8` a line), reached through pdsh and ssh."""
    slots = _slots(hostfile)
    command = _deepspeed(["--hostfile", str(hostfile.resolve())], arguments)
    return Launch(sum(slots.values()), command, hosts=tuple(slots))


def _deepspeed(options: list[str], arguments: Sequence[str]) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--quiet"]
    return [*runner, *options, str(TRAIN), *arguments]


def _slots(hostfile: Path) -> dict[str, int]:
    try:
        lines = hostfile.read_text().splitlines()
    except OSError as error:
        raise ConfigError(f"{hostfile}: {error.strerror}; give the path of a hostfile") from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        name, _, count = line.partition(" slots=")
        if not name.strip() or not count.strip().isdigit():
            raise ConfigError(f"{hostfile}:{number}: is not `name slots=N`: {line!r}")
        if name.strip() in slots:
            raise ConfigError(f"{hostfile}:{number}: names {name.strip()} twice; add up its slots")
        slots[name.strip()] = int(count)
    if not slots:
        raise ConfigError(f"{hostfile}: names no host; write `name slots=N`, one a line")
    return slots


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
