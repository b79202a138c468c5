"""Where a result came from: commit, versions and hardware, the same for runs and benchmarks."""

import os
import platform
import subprocess
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch


def provenance(device: torch.device | None = None) -> dict[str, Any]:
    """What, besides its configuration, a result computed here and now on `device` depends on.

    Where the source is no checkout, BENCH_COMMIT may say which commit it is a copy of.
    """
    cuda = device is not None and device.type == "cuda"
    packages = ("sparse-gpt", "deepspeed", "numpy", "triton")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "git_dirty": bool(_git("status", "--porcelain")),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            **{name: _version(name) for name in packages},
        },
        "hardware": {
            "device": torch.cuda.get_device_name(device) if cuda else _processor(),
            "cpu_cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "memory_gb": round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9, 1),
        },
    }


def git_commit() -> str | None:
    """The commit of the source, or None where it is no checkout and nobody says."""
    return _git("rev-parse", "HEAD") or os.environ.get("BENCH_COMMIT")


def _git(*arguments: str) -> str | None:
    """What git says of the source, or None where this is no checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    for line in names.read_text().splitlines() if names.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
