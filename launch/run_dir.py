"""The folder of a run: its resolved config and where it came from.

config.yaml  provenance.json  metrics.jsonl  tensorboard/  checkpoints/
"""

import json
import os
import platform
import subprocess
import sys
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

from launch.checkpoint import step_of
from launch.config import ConfigError, RunConfig, load_config, to_yaml
from launch.costs import model_report
from launch.world import World

# What says how long, how loudly or how fast a run goes on, not what it computes (but for rounding).
_MAY_CHANGE = {"duration", "checkpoint", "log", "eval", "run_dir", "compile"}


def check_run_dir(config: RunConfig, data_manifest_hash: str) -> None:
    """Raises ConfigError if `run_dir` holds a run of another configuration or other data."""
    folder = Path(config.run_dir)
    saved = folder / "config.yaml"
    if not saved.exists():
        return
    before, now = load_config(saved).model_dump(), config.model_dump()
    changed = [key for key in now if before[key] != now[key] and key not in _MAY_CHANGE]
    if changed:
        raise ConfigError(
            f"{saved}: holds a run with another {', '.join(changed)}; "
            "choose another run_dir, or remove that folder"
        )
    if _read_provenance(folder)["data_manifest_hash"] != data_manifest_hash:
        raise ConfigError(
            f"{config.data.path}: is not the data that {folder} was trained on; "
            "choose another run_dir, or give the data of before"
        )


def finished(config: RunConfig) -> bool:
    """Whether the newest checkpoint in `run_dir` is the last that this configuration asks for."""
    latest = Path(config.run_dir) / "checkpoints/latest"
    if not latest.exists():
        return False
    report = model_report(config.model)
    return step_of(latest.read_text()) >= config.total_steps(report.training / report.seq)


def open_run_dir(config: RunConfig, world: World, data_manifest_hash: str, step: int) -> Path:
    """Make the folder, or enter it again, and record this start after `step` completed steps."""
    folder = Path(config.run_dir)
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        starts = _read_provenance(folder)["starts"] if (folder / "config.yaml").exists() else []
        provenance = {
            "data_manifest_hash": data_manifest_hash,
            "starts": [*starts, {"step": step, **_this_start(world)}],
        }
        _write(folder / "provenance.json", json.dumps(provenance, indent=1) + "\n")
        _write(folder / "config.yaml", to_yaml(config))
    return folder


def _read_provenance(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "provenance.json").read_text())
    return found


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.tmp")
    aside.write_text(text)
    aside.rename(path)


def _this_start(world: World) -> dict[str, Any]:
    cuda = world.device.type == "cuda"
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain")),
        "versions": {
            "python": sys.version.split()[0],
            **{name: version(name) for name in ("sparse-gpt", "torch", "deepspeed", "numpy")},
        },
        "hardware": {
            "device": torch.cuda.get_device_name(world.device) if cuda else _processor(),
            "world_size": world.size,
            "cpu_cores": os.cpu_count(),
            "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        },
    }


def _git(*arguments: str) -> str | None:
    """What git says of the source, or None where this is no checkout."""
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _processor() -> str:
    names = Path("/proc/cpuinfo")
    for line in names.read_text().splitlines() if names.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
