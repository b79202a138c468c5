"""What this machine has, and what will not work on it, with the fix."""

import os
import resource
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import psutil
import torch

from sparse_gpt.cluster.links import LinksBroken, talk
from sparse_gpt.model.ffn.grouped import chosen_product
from sparse_gpt.train.precision import DTYPES


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    what: str
    status: Literal["ok", "note", "problem"]  # a note limits; a problem stops training
    found: str
    fix: str = ""


def examine(ranks: int | None = None) -> list[Finding]:
    """Look at software, devices, memory and disk, and let `ranks` talk: by default one on each of
    several GPUs."""
    ranks = ranks or torch.cuda.device_count()
    together = [_together(ranks)] if ranks > 1 else []
    return [*_software(), *_devices(), *together, _products(), *_resources()]


def _software() -> Iterator[Finding]:
    python = sys.version.split()[0]
    yield Finding("Python", "ok" if sys.version_info >= (3, 10) else "problem", python, "use 3.10+")
    for name in ("torch", "deepspeed", "datasets", "tiktoken", "tensorboard"):
        try:
            yield Finding(name, "ok", version(name))
        except PackageNotFoundError:
            fix = "pip install -c constraints.txt -e ."
            yield Finding(name, "problem", "is not installed", fix)
    compiler = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
    if compiler:
        yield Finding("C compiler", "ok", compiler)
    else:
        fix = "install gcc, or set CC"
        yield Finding("C compiler", "note", "none: no torch.compile, no CPU offload", fix)


def _devices() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        why = "none visible to torch: training runs on the CPU (gloo, fp32)"
        if torch.version.cuda is None:
            fix = "with an NVIDIA GPU here, install a CUDA build of torch"
        else:
            fix = "with an NVIDIA GPU here, check nvidia-smi and CUDA_VISIBLE_DEVICES"
        yield Finding("GPU", "note", why, fix)
        return
    for index in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(index).total_memory / 1e9
        name = f"{torch.cuda.get_device_name(index)}, {memory:.0f} GB"
        if torch.cuda.is_bf16_supported():
            yield Finding(f"GPU {index}", "ok", name)
        else:
            yield Finding(f"GPU {index}", "note", f"{name}, without bf16", "precision=fp16")
    if torch.distributed.is_nccl_available():
        number = torch.cuda.nccl.version()
        yield Finding("NCCL", "ok", ".".join(map(str, number)))
    else:
        fix = "install a CUDA build of torch for Linux"
        yield Finding("NCCL", "problem", "this torch was built without it", fix)
    yield from _among_gpus(torch.cuda.device_count())


def _among_gpus(count: int) -> Iterator[Finding]:
    names = {torch.cuda.get_device_name(index) for index in range(count)}
    if len(names) > 1:
        fix = "choose with CUDA_VISIBLE_DEVICES: all ranks go at the slowest one's pace"
        yield Finding("GPUs", "note", f"are not alike: {', '.join(sorted(names))}", fix)
    apart = [
        f"{a}-{b}"
        for a in range(count)
        for b in range(a + 1, count)
        if not torch.cuda.can_device_access_peer(a, b)
    ]
    if apart:
        fix = "what they send goes through the host's memory: plan with --network's speed"
        yield Finding("GPU links", "note", f"none between {', '.join(apart)}", fix)


def _together(ranks: int) -> Finding:
    try:
        found = talk(ranks)
    except LinksBroken as error:
        fix = "NCCL_DEBUG=INFO says more; try NCCL_P2P_DISABLE=1, NCCL_SOCKET_IFNAME"
        if not torch.cuda.is_available():
            fix = "is 127.0.0.1 reachable, and is there memory for the ranks?"
        return Finding("ranks", "problem", str(error), fix)
    times = "all-reduce {all_reduce_4mb_ms} ms, all-to-all {all_to_all_4mb_ms} ms".format(**found)
    return Finding("ranks", "ok", f"{ranks} over {found['backend']}, 4 MB: {times}")


def _products() -> Finding:
    """Of rows with the blocks of a dictionary: at once, or block by block."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: chosen_product(device, DTYPES[name]) for name in ("fp32", "bf16")}
    text = ", ".join(f"{name} {product}" for name, product in found.items())
    fix = "ffn=default is slower here: bf16 wants a GPU of compute capability 9.0"
    return Finding("grouped product", "note" if found["bf16"] == "loop" else "ok", text, fix)


def _resources() -> Iterator[Finding]:
    cores = len(psutil.Process().cpu_affinity() or [])
    yield Finding("CPU cores", "ok", str(cores))
    memory = psutil.virtual_memory().available / 1e9
    fix = "the quickstart needs about 4 GB free"
    yield Finding("memory free", "ok" if memory > 4 else "note", f"{memory:.1f} GB", fix)
    disk = shutil.disk_usage(".").free / 1e9
    fix = "a checkpoint takes 16 bytes a parameter: move run_dir to a larger disk"
    yield Finding("disk free here", "ok" if disk > 10 else "note", f"{disk:.1f} GB", fix)
    if os.path.isdir("/dev/shm"):
        shared = shutil.disk_usage("/dev/shm").free / 1e9
        fix = "start the container with --shm-size=8g (NCCL and workers use it)"
        yield Finding("shared memory", "ok" if shared > 1 else "note", f"{shared:.1f} GB", fix)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    fix = "ulimit -n 65536"
    yield Finding("open files", "ok" if limit >= 1024 else "note", str(limit), fix)
