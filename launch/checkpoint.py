"""Checkpoints that are whole or not there.

    checkpoints/step-00000100/   DeepSpeed's files, rng-rank-N.pt, manifest.json
    checkpoints/latest           names the newest, as DeepSpeed's own tools expect

All ranks write into a hidden folder; rank 0 then hashes every file into `manifest.json`, fsyncs,
and renames the folder. What has no valid manifest is not loaded: the one before it is.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from launch.config import ConfigError
from launch.engine import Engine


@dataclass(frozen=True)
class TrainState:
    """All of a run's position: what resumes besides weights, optimizer and random numbers."""

    step: int = 0  # completed optimizer steps
    samples: int = 0  # sequences consumed; the next batch starts here
    guard: dict[str, Any] = field(default_factory=dict)  # `Guard.state()`


def tag_of(step: int) -> str:
    """The name of the checkpoint after `step` completed steps."""
    return f"step-{step:08d}"


def step_of(tag: str) -> int:
    """The inverse of `tag_of`."""
    return int(tag.removeprefix("step-"))


class Checkpoints:
    """The `checkpoints/` folder of a run."""

    def __init__(self, root: Path, engine: Engine) -> None:
        self.root, self.engine, self.config = root, engine, engine.config.checkpoint
        self.world = engine.world

    def save(self, state: TrainState) -> None:
        """Save all ranks' states under `step-N`. Collective: every rank calls it."""
        tag = tag_of(state.step)
        aside = self.root / f".writing-{tag}"
        if self.world.rank == 0:
            for leftover in self.root.glob(".writing-*"):
                shutil.rmtree(leftover)
            (aside / tag).mkdir(parents=True)
        dist.barrier()
        self.engine.deepspeed.save_checkpoint(aside, tag=tag, save_latest=False)
        torch.save(_rng_state(self.world.device), aside / tag / f"rng-rank-{self.world.rank}.pt")
        dist.barrier()
        if self.world.rank == 0:
            self._publish(aside / tag, state)
            shutil.rmtree(aside)  # DeepSpeed left a script of its own there
        dist.barrier()

    def load_newest(self) -> TrainState:
        """Restore the newest whole checkpoint; TrainState() where there is none. Collective.

        Raises ConfigError if it was saved by another number of ranks.
        """
        found = self.world.from_rank_0(self._newest_whole)
        if found is None:
            return TrainState()
        tag, manifest = found
        if manifest["world_size"] != self.world.size:
            raise ConfigError(
                f"{self.root / tag}: was saved by {manifest['world_size']} ranks, this run has "
                f"{self.world.size}; resume it with {manifest['world_size']}"
            )
        # The rank's own optimizer state is a pickle; the manifest says it is the one we wrote.
        self.engine.deepspeed.load_checkpoint(self.root, tag=tag)
        rng = torch.load(self.root / tag / f"rng-rank-{self.world.rank}.pt", weights_only=True)
        _set_rng_state(rng, self.world.device)
        return TrainState(**manifest["state"])

    def _publish(self, folder: Path, state: TrainState) -> None:
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        manifest = {
            "state": asdict(state),
            "world_size": self.world.size,
            "files": {str(path.relative_to(folder)): _sync_and_hash(path) for path in files},
        }
        _write_synced(folder / "manifest.json", json.dumps(manifest, indent=1))
        _sync_folder(folder)
        target = self.root / folder.name
        folder.rename(target)
        _sync_folder(self.root)
        _write_synced(self.root / "latest.tmp", folder.name)
        (self.root / "latest.tmp").rename(self.root / "latest")
        _sync_folder(self.root)
        for old in self._tags()[self.config.keep_last :]:
            if step_of(old) not in self.config.at:
                shutil.rmtree(self.root / old)

    def _tags(self) -> list[str]:
        """Newest first."""
        return sorted((path.name for path in self.root.glob("step-*")), reverse=True)

    def _newest_whole(self) -> tuple[str, dict[str, Any]] | None:
        for tag in self._tags():
            damage, manifest = _read_manifest(self.root / tag)
            if damage is None:
                return tag, manifest
            print(f"{self.root / tag}: {damage}; set aside, trying the one before", file=sys.stderr)
            (self.root / tag).rename(self.root / f"damaged-{tag}")
        return None


def _read_manifest(folder: Path) -> tuple[str | None, dict[str, Any]]:
    """(what is wrong or None, the manifest)"""
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        for name, expected in manifest["files"].items():
            if _hash(folder / name) != expected:
                return f"{name} is damaged", {}
        return None, manifest
    except (OSError, ValueError, KeyError) as error:
        return f"is not whole ({error})", {}


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return _hash(path)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _rng_state(device: torch.device) -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def _set_rng_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"], device)
