"""What a checkpoint says of itself: its name, its position, its files."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import xxhash

from sparse_gpt.errors import DataError
from sparse_gpt.files import read_sealed, write_sealed


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


def tags(root: Path) -> list[str]:
    """The checkpoints in a folder, newest first; what else lies there, a copy say, is none."""
    return sorted((p.name for p in root.glob("step-*") if p.name[5:].isdigit()), reverse=True)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's `manifest.json` says; None if it is not as `write_manifest` left it."""
    path = folder / "manifest.json"
    try:
        manifest = read_sealed(path)
        del manifest["hash"]
        return manifest
    except OSError:
        return None
    except DataError:
        return _read_0_1(path)


def damage(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """What is wrong with those of a checkpoint's files; None if they are as they were written."""
    for name in names:
        try:
            if file_hash(folder / name) != manifest["files"][name]:
                return f"{name} is damaged"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


def file_hash(path: Path) -> str:
    """What a manifest says of a file: xxh3_128, hex."""
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Publish a checkpoint's `manifest.json`, sealed: a flipped bit is found."""
    write_sealed(folder / "manifest.json", manifest)


def _read_0_1(path: Path) -> dict[str, Any] | None:
    """As version 0.1 sealed it, so that its runs go on."""
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        digest = manifest.pop("hash")
        whole = xxhash.xxh3_128_hexdigest(json.dumps(manifest, sort_keys=True).encode())
    except (ValueError, AttributeError, TypeError, KeyError):
        return None
    return manifest if digest == whole else None
