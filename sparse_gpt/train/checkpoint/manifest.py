"""What a checkpoint says of itself: its name, its position, its files.

What is not there and what is not as its hash says is damaged: another checkpoint may take its
place. What cannot be read now may be whole: that is a ConfigError, and nothing is changed.
"""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from sparse_gpt.errors import ConfigError, DataError
from sparse_gpt.files import read_sealed, write_sealed
from sparse_gpt.schema import Natural, checked


@dataclass(frozen=True)
class TrainState:
    """All of a run's position: what resumes besides weights, optimizer and random numbers."""

    step: int = 0  # completed optimizer steps
    samples: int = 0  # sequences consumed; the next batch starts here
    guard: dict[str, Any] = field(default_factory=dict)  # `Guard.state()`


class GuardState(TypedDict):
    """`Guard.state()`."""

    skipped: Natural
    in_a_row: Natural
    window: list[tuple[float, float]]


class Manifest(TypedDict):
    """What `manifest.json` of a checkpoint holds."""

    step: Natural
    samples: NotRequired[Natural]
    guard: NotRequired[GuardState | Annotated[dict[str, Any], Field(max_length=0)]]
    config_hash: NotRequired[str]
    data_manifest_hash: NotRequired[str]
    git_commit: NotRequired[str | None]
    world_size: NotRequired[Annotated[int, Field(strict=True, ge=1)]]
    zero_stage: NotRequired[Annotated[int, Field(strict=True, ge=0, le=3)]]
    files: dict[Annotated[str, Field(pattern=r"^[\w-]+(\.\w+)*$")], str]


_FORM = TypeAdapter(Manifest)


def tag_of(step: int) -> str:
    """The name of the checkpoint after `step` completed steps."""
    return f"step-{step:08d}"


def step_of(tag: str) -> int:
    """The inverse of `tag_of`."""
    return int(tag.removeprefix("step-"))


def tags(root: Path) -> list[str]:
    """The checkpoints in a folder, newest first; what else lies there, a copy say, is none.

    Raises ConfigError where the folder cannot be read.
    """
    try:
        names = os.listdir(root)
    except OSError as error:
        _refuse_unreadable(root, error)
        return []
    return sorted((n for n in names if n.startswith("step-") and n[5:].isdigit()), reverse=True)


def _refuse_unreadable(path: Path, error: OSError) -> None:
    """Raises ConfigError unless the error says that there is no such file."""
    absent = isinstance(error, FileNotFoundError | IsADirectoryError | NotADirectoryError)
    if absent and not any(p.is_symlink() and not p.exists() for p in (path, path.parent)):
        return
    raise ConfigError(
        f"{path}: cannot be read now: {error.strerror}; mend that and start again, nothing was set "
        "aside"
    ) from None


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What a checkpoint's `manifest.json` says; None if it is not as `write_manifest` left it.

    Raises ConfigError where it cannot be read.
    """
    path = folder / "manifest.json"
    try:
        manifest = read_sealed(path)
        del manifest["hash"]
    except OSError as error:
        _refuse_unreadable(path, error)
        return None
    except DataError:
        manifest = _read_0_1(path) or {}
    try:
        checked(_FORM, manifest)
    except ValueError:
        return None
    return manifest


def damage(folder: Path, manifest: Mapping[str, Any], names: Iterable[str]) -> str | None:
    """What is wrong with those of a checkpoint's files; None if they are as they were written.

    Raises ConfigError for one that cannot be read.
    """
    for name in names:
        try:
            if file_hash(folder / name) != manifest["files"][name]:
                return f"{name} is damaged"
        except OSError as error:
            _refuse_unreadable(folder / name, error)
            return f"{name} is missing"
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
    except (ValueError, AttributeError, TypeError, KeyError, RecursionError):
        return None
    return manifest if digest == whole else None
