"""Do ranks of this machine reach each other? Some are started, and talk as a run's do.

This file, run as a module, is one of them.
"""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import suppress
from typing import Any

import torch
import torch.distributed as dist

from sparse_gpt.train.distributed import World, join_world
from sparse_gpt.train.preflight import link_milliseconds

_PATIENCE = 120.0  # seconds from the start of ranks to their end


class LinksBroken(Exception):
    """Ranks that did not reach each other; the first line says what one of them saw."""


def talk(ranks: int) -> dict[str, Any]:
    """Start `ranks` here; the `backend` that they used, and milliseconds as of
    `train.preflight.link_milliseconds`. Raises LinksBroken."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "MASTER_PORT": port}
        meet = {name: str(value) for name, value in own.items()} | {"MASTER_ADDR": "127.0.0.1"}
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", "sparse_gpt.cluster.links"],
                env={**os.environ, **meet},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    deadline = time.monotonic() + _PATIENCE
    said = []
    try:
        for rank, process in enumerate(processes):
            out, errors = process.communicate(timeout=max(0.0, deadline - time.monotonic()))
            if process.returncode:
                lines = errors.strip().splitlines() or [f"exit code {process.returncode}"]
                raise LinksBroken(f"rank {rank}: {lines[-1]}")
            said.append(out)
    except subprocess.TimeoutExpired:
        raise LinksBroken(f"{ranks} ranks did not meet in {_PATIENCE:.0f} s") from None
    finally:
        for process in processes:
            process.kill()
            with suppress(ValueError):  # its pipes are closed already
                process.communicate()
    found: dict[str, Any] = json.loads(said[0].splitlines()[-1])
    return found


def _check(world: World) -> None:
    """Raises RuntimeError if what arrives is not what was sent."""
    ranks = torch.arange(world.size, device=world.device)
    arrived = torch.empty_like(ranks)
    dist.all_to_all_single(arrived, ranks + world.size * world.rank)
    if not torch.equal(arrived, world.size * ranks + world.rank):
        raise RuntimeError(f"all-to-all brought {arrived.tolist()}")
    total = world.sum(ranks[-1:] + 1).item()
    if total != world.size**2:
        raise RuntimeError(f"all-reduce made {total} of {world.size} times {world.size}")


def main() -> None:
    world = join_world(_PATIENCE / 2)
    _check(world)
    found = {"backend": dist.get_backend(), **link_milliseconds(world.device)}
    dist.barrier()
    print(json.dumps(found), flush=True)
    os._exit(0)  # as in train/rank.py


if __name__ == "__main__":
    main()
