"""What a checkpoint says of itself: its name, its position, its files."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from sparse_gpt.files import publish_text


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


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's `manifest.json` says; None if it is not as `write_manifest` left it."""
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        return manifest if manifest.pop("hash") == _hash_of(manifest) else None
    except (OSError, ValueError, AttributeError, TypeError, KeyError):
        return None


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Publish a checkpoint's `manifest.json`, with a hash of itself: a flipped bit is found."""
    sealed = {**manifest, "hash": _hash_of(manifest)}
    publish_text(folder / "manifest.json", json.dumps(sealed, indent=1))


def _hash_of(manifest: Mapping[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
