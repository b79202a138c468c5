"""Who this process is among the ranks, and the few things that ranks say to each other."""

import ctypes
import datetime
import errno
import os
import re
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from sparse_gpt.errors import ConfigError, told
from sparse_gpt.train.gpus import known_gpu

PREEMPTED = 75  # exit code of a run that saved and stopped because it was told to (EX_TEMPFAIL)
# DeepSpeed's launcher looks at its ranks once a second and passes on the first failure that it
# meets: a rank that another's end has stopped waits so long, lest it be taken for the cause.
WITNESS_WAITS = 2.0  # seconds


@dataclass(frozen=True)
class World:
    """This process among the ranks of a job."""

    rank: int
    local_rank: int
    size: int
    device: torch.device

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of one device in half precision; None where it is not known."""
        if self.device.type != "cuda":
            return None
        known = known_gpu(torch.cuda.get_device_name(self.device))
        return known.peak_flops if known else None

    def sum(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor summed over the ranks; stays on its device."""
        total = value.detach().clone()
        dist.all_reduce(total)
        return total

    def mean(self, value: torch.Tensor) -> torch.Tensor:
        """A tensor averaged over the ranks; stays on its device."""
        return self.sum(value) / self.size

    def from_rank_0(self, value: Callable[[], Any]) -> Any:
        """What rank 0 finds by calling `value`, on every rank; or the error that is the user's to
        mend, as a ConfigError on every rank, so that none is left waiting and has more to say."""
        box: list[Any] = [None, None]
        if self.rank == 0:
            try:
                box[0] = value()
            except Exception as error:
                box[1] = told(error)
                if box[1] is None:
                    raise
        dist.broadcast_object_list(box, src=0, device=self.device)
        if box[1] is not None:
            raise ConfigError(box[1])
        return box[0]


def read_environment() -> tuple[int, int, int]:
    """(rank, local rank, world size) from deepspeed, torchrun or srun; (0, 0, 1) by hand.

    srun sets neither RANK nor MASTER_ADDR: they follow from its own variables, with the first
    host of the allocation as the meeting point.
    """
    env = os.environ
    if "RANK" not in env and "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]
        env.setdefault("MASTER_ADDR", _first_host(env["SLURM_JOB_NODELIST"]))
        # One port a job, so that jobs that share a node do not meet.
        env.setdefault("MASTER_PORT", str(20_000 + int(env["SLURM_JOB_ID"]) % 20_000))
    elif "RANK" not in env:
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            env["MASTER_PORT"] = str(free.getsockname()[1])
    return int(env["RANK"]), int(env["LOCAL_RANK"]), int(env["WORLD_SIZE"])


def join_world(timeout_seconds: float = 600) -> World:
    """Meet the other ranks: NCCL on GPUs, gloo on CPUs. DeepSpeed builds on this group.

    Raises ConfigError where another program listens on the port at which they meet.
    """
    rank, local_rank, size = read_environment()
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_memory()
    backend = "nccl" if device.type == "cuda" else "gloo"
    timeout = datetime.timedelta(seconds=timeout_seconds)
    try:
        if os.environ["MASTER_ADDR"] == "127.0.0.1" and "TORCHELASTIC_RUN_ID" not in os.environ:
            os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
            store = _loopback_store(rank, size, timeout)
            dist.init_process_group(
                backend, store=store, rank=rank, world_size=size, timeout=timeout
            )
        else:
            dist.init_process_group(backend, timeout=timeout)
    except (OSError, dist.DistError) as error:
        if getattr(error, "errno", None) != errno.EADDRINUSE and "EADDRINUSE" not in str(error):
            raise
        raise ConfigError(
            f"port {os.environ['MASTER_PORT']} of {socket.gethostname()} is taken by another "
            "program, and the ranks were to meet there; give another (--master-port)"
        ) from None
    return World(rank, local_rank, size, device)


def _loopback_store(rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """Where the ranks of one host meet. torch's own would listen on every interface."""
    port, listening = int(os.environ["MASTER_PORT"]), None
    if rank == 0:
        with socket.create_server(("127.0.0.1", port), backlog=max(128, size)) as server:
            listening = server.detach()  # the store closes it
    return dist.TCPStore(  # type: ignore[attr-defined]
        "127.0.0.1", port, size, rank == 0, timeout, multi_tenant=True, master_listen_fd=listening
    )


def limit_waiting(seconds: float) -> None:
    """Let no collective wait longer for another rank, in whatever groups there are by now.

    ZeRO's clone of the world group has 30 minutes of its own, whatever the world group has.
    """
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=seconds), group)


def lost_peer(error: BaseException) -> str | None:
    """One line about an error that another rank's end or silence caused; None for any other."""
    text = str(error).partition("\n")[0]
    if not isinstance(error, dist.DistError) and "/gloo/" not in text:
        return None
    what = re.sub(r"^\[/\S+\] ", "", text).partition(". This is")[0]  # no source line, no advice
    rank, _, _ = read_environment()
    return f"rank {rank} on {socket.gethostname()}: another rank is lost or hangs ({what})"


def end_with_launcher() -> None:
    """End this rank when `sparse-gpt train` ends, even by SIGKILL: it holds our standard input.

    DeepSpeed's launchers pass no death on. Elsewhere standard input says nothing of a launcher.
    """
    if os.environ.get("SPARSE_GPT_HOLDS_STDIN") == "1":

        def wait() -> None:
            while os.read(0, 1):
                pass
            os._exit(1)

        threading.Thread(target=wait, daemon=True).start()


def keep_freed_memory() -> None:
    """glibc hands buffers as large as logits back to the kernel at every free, and page-faults them
    in again: kept, a step on the CPU takes about four fifths of the time."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)


def _first_host(nodelist: str) -> str:
    """The first host of Slurm's compressed list: `gpu[07-09,12],login` -> `gpu07`."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]
