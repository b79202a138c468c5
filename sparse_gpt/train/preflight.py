"""Before the first step: whether all ranks are of one mind, and how fast they talk.

Another version, configuration or data set on one host of many trains something that no record
describes, or fails hours later; here it is one line that names the host.
"""

import hashlib
import platform
import shutil
import socket
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from sparse_gpt.config.load import to_yaml
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checkpoint.zero_state import BYTES_PER_PARAMETER
from sparse_gpt.train.distributed import World

_MEGABYTES = 4  # of what is timed


@dataclass(frozen=True)
class Facts:
    """What must be equal on every rank, and what each has."""

    alike: dict[str, str]
    host: str
    disk_free: int  # bytes, where run_dir is
    memory_free: int  # bytes


def preflight(
    config: RunConfig, world: World, data_manifest_hash: str, parameters: int
) -> dict[str, Any]:
    """Compare the ranks; returns what provenance.json keeps of it. Collective.

    parameters: of the model, for the size of a checkpoint. Raises ConfigError, the same on every
    rank, that names the odd host out or the full disk.
    """
    facts: list[Any] = [None] * world.size
    dist.all_gather_object(facts, facts_here(config, data_manifest_hash))
    complaint = odd_one_out(facts) or full_disk(facts, config.run_dir, parameters)
    if complaint:
        raise ConfigError(complaint)
    return {
        "hosts": list(dict.fromkeys(each.host for each in facts)),
        "disk_free_gb": round(min(each.disk_free for each in facts) / 1e9, 1),
        "memory_free_gb": round(min(each.memory_free for each in facts) / 1e9, 1),
        **link_milliseconds(world.device),
    }


def facts_here(config: RunConfig, data_manifest_hash: str) -> Facts:
    """What this rank is made of."""
    folder = Path(config.run_dir).absolute()
    while not folder.exists():
        folder = folder.parent
    return Facts(
        alike={
            "python": platform.python_version(),
            "torch": torch.__version__,
            "deepspeed": version("deepspeed"),
            "sparse-gpt": _source_hash(),
            "the configuration": hashlib.sha256(to_yaml(config).encode()).hexdigest()[:12],
            "the data": data_manifest_hash,
        },
        host=socket.gethostname(),
        disk_free=shutil.disk_usage(folder).free,
        memory_free=psutil.virtual_memory().available,
    )


def odd_one_out(facts: Sequence[Facts]) -> str | None:
    """One line about the first rank that differs from most (of two: from rank 0), or None."""
    for what in facts[0].alike:
        found = [each.alike[what] for each in facts]
        [(usual, count)] = Counter(found).most_common(1)
        for rank, value in enumerate(found):
            if value != usual:
                return (
                    f"{facts[rank].host}: rank {rank} has another {what.removeprefix('the ')}: "
                    f"{value}, where {count} of {len(facts)} ranks have {usual}; "
                    "make that host like the others"
                )
    return None


def full_disk(facts: Sequence[Facts], run_dir: str, parameters: int) -> str | None:
    """One line about the first rank whose disk takes no whole checkpoint, or None."""
    needed = parameters * BYTES_PER_PARAMETER
    for rank, each in enumerate(facts):
        if each.disk_free < needed:
            return (
                f"run_dir: {run_dir} has {each.disk_free / 1e9:.2f} GB free on {each.host} "
                f"(rank {rank}), one checkpoint takes {needed / 1e9:.2f} GB; free some, or move it"
            )
    return None


def _source_hash() -> str:
    """Of this project's own Python files: a commit says nothing of an edited checkout."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def link_milliseconds(device: torch.device) -> dict[str, float]:
    """How long 4 MB take, summed over all ranks and exchanged between them, connections made
    before. Collective."""
    message = torch.zeros(_MEGABYTES * 250_000 // dist.get_world_size(), device=device)
    message = message.repeat(dist.get_world_size())
    arrived = torch.empty_like(message)

    def milliseconds(collective: Callable[[], Any]) -> float:
        collective()
        dist.barrier()
        started = time.perf_counter()
        collective()
        arrived[0].item()  # waits for the device
        return round((time.perf_counter() - started) * 1e3, 2)

    return {
        f"all_reduce_{_MEGABYTES}mb_ms": milliseconds(lambda: dist.all_reduce(message)),
        f"all_to_all_{_MEGABYTES}mb_ms": milliseconds(
            lambda: dist.all_to_all_single(arrived, message)
        ),
    }
