"""The folder of a run: its resolved config and where it came from.

config.yaml  provenance.json  metrics.jsonl  vocab.tiktoken  tensorboard/  checkpoints/  incidents/
"""

import json
import os
import shutil
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import xxhash
from pydantic import Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from sparse_gpt.config.load import load_config, to_yaml
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.data import Blend
from sparse_gpt.data.vocabulary import VOCAB_FILE
from sparse_gpt.errors import ConfigError
from sparse_gpt.files import lock, locked, publish, publish_bytes, publish_text, temporary, to_json
from sparse_gpt.provenance import git_commit, provenance
from sparse_gpt.schema import checked
from sparse_gpt.train.checkpoint.manifest import damage, read_manifest, tag_of, tags
from sparse_gpt.train.distributed import World
from sparse_gpt.train.schedule import jump

# What says how long, how loudly or how fast a run goes on, not what a good step computes (but for
# rounding). Micro-batches and ZeRO's options may change too.
MAY_CHANGE = {
    *("duration", "checkpoint", "log", "eval", "fault", "guard", "run_dir", "compile", "parallel")
}


def what_computes(config: RunConfig) -> dict[str, Any]:
    """The sections of a run, without the keys in them that may change.

    Nor the data's, which may move: their hash counts.
    """
    native = {key: v for key, v in config.deepspeed.items() if key != "zero_optimization"}
    return {
        **config.model_dump(mode="json", exclude={"data"}),
        "batch": config.batch.global_tokens,
        "deepspeed": native,
    }


def config_hash(config: RunConfig) -> str:
    """A hash of what the run computes: equal for runs that may resume each other."""
    kept = {k: v for k, v in what_computes(config).items() if k not in MAY_CHANGE}
    return xxhash.xxh3_128_hexdigest(json.dumps(kept, sort_keys=True).encode())


def origin(config: RunConfig, data_manifest_hash: str) -> dict[str, str | None]:
    """What a checkpoint says of where it came from."""
    return {
        "config_hash": config_hash(config),
        "data_manifest_hash": data_manifest_hash,
        "git_commit": git_commit(),
    }


def finished(config: RunConfig) -> bool:
    """Whether the newest checkpoint in `run_dir` is the last that this configuration asks for, and
    whole. Raises ConfigError where it cannot be read."""
    checkpoints = Path(config.run_dir) / "checkpoints"
    newest = next(iter(tags(checkpoints)), None)
    manifest = read_manifest(checkpoints / newest) if newest else None
    if newest is None or manifest is None or manifest["step"] < config.total_steps:
        return False
    with os.scandir(checkpoints / newest) as files:
        stats = [(file.name, file.stat(follow_symlinks=False)) for file in files]
    stamp = tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))
    return _is_whole(checkpoints / newest, stamp)


@lru_cache(maxsize=4096)
def _is_whole(checkpoint: Path, stamp: tuple[tuple[str, int, int], ...]) -> bool:
    """Hashes the files once for each stamp of theirs: a sweep asks about all its runs at a time,
    again and again."""
    manifest = read_manifest(checkpoint) or {}
    return damage(checkpoint, manifest, manifest["files"]) is None


def open_run_dir(
    config: RunConfig,
    world: World,
    blend: Blend,
    step: int,
    preflight: dict[str, Any],
    started_from: dict[str, Any] | None = None,
) -> Path:
    """Make the folder, or enter it again, and record this start after `step` completed steps.

    started_from: where the weights of its first step came from, if they are not new.
    """
    folder = Path(config.run_dir)
    if world.rank == 0:
        folder.mkdir(parents=True, exist_ok=True)
        before = read_provenance(folder) if (folder / "config.yaml").exists() else {}
        if before and step and (said := jump(step, load_config(folder / "config.yaml"), config)):
            print(f"warning: {folder}: {said}", file=sys.stderr, flush=True)
        start = {"step": step, **_this_start(world), "preflight": preflight}
        came_from = read_manifest(folder / "checkpoints" / tag_of(step))
        if came_from and came_from["data_manifest_hash"] != blend.hash:
            start["data_change"] = {
                "sample": came_from["samples"],  # the first of the new data
                "from": came_from["data_manifest_hash"],
                "to": blend.hash,
            }
        made_with = blend.sources[0].dataset
        beside = made_with.train.folder / VOCAB_FILE
        if beside.exists():  # for who wants text of the model, wherever the shards are by then
            publish_bytes(folder / VOCAB_FILE, beside.read_bytes())
        record = {
            **before,
            "data_manifest_hash": blend.hash,
            "vocab_hash": blend.vocab_hash,
            "tokenizer": made_with.manifest.tokenizer,
            "starts": [*before.get("starts", []), start],
        }
        if started_from:
            record["started_from"] = started_from
        publish_text(folder / "provenance.json", to_json(record) + "\n")
        publish_text(folder / "config.yaml", to_yaml(config))
    return folder


def hold(folder: Path) -> None:
    """Keep other processes from training in `folder` until this one ends, however it ends.

    Raises ConfigError if another one does already, or the folder cannot be made or written.
    """
    place = folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for place in (folder, folder / "checkpoints"):
            if os.path.lexists(place):
                with tempfile.TemporaryFile(dir=place):
                    pass
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"run_dir: {place} cannot be made or written: {reason}") from None
    for _ in range(20):  # a look by `held` takes the lock for a moment
        try:
            lock(folder / ".lock")  # given back by the process's end
        except BlockingIOError:
            time.sleep(0.05)
        else:
            return
    raise ConfigError(f"{folder}: another process trains this run; wait for it, or end it")


def held(folder: Path) -> bool:
    """Whether a process trains in `folder` now. Raises OSError where that cannot be known."""
    try:
        with locked(folder / ".lock", shared=True):
            return False
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True


def fork(trunk: Path, step: int, folder: Path) -> None:
    """Make `folder` the run that `trunk` was after `step` steps; it appears whole or not at all.

    The two share the checkpoint's files, where the file system lets them. Raises ConfigError where
    the trunk has no such checkpoint.
    """
    checkpoint = trunk / "checkpoints" / tag_of(step)
    if not checkpoint.exists():
        raise ConfigError(f"{checkpoint}: is not there; the run that forks from it needs it")
    aside = temporary(folder)
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(checkpoint, aside / "checkpoints" / tag_of(step), copy_function=_link)
    (aside / "checkpoints/latest").write_text(tag_of(step))
    if (trunk / VOCAB_FILE).exists():
        shutil.copy(trunk / VOCAB_FILE, aside)
    for name in ("config.yaml", "metrics.jsonl"):  # rows after the step go when it starts
        shutil.copy(trunk / name, aside / name)
    record = {**read_provenance(trunk), "forked_from": {"run": str(trunk), "step": step}}
    publish_text(aside / "provenance.json", to_json(record) + "\n")
    publish(folder)


def _link(file: str, name: str) -> None:
    try:
        os.link(file, name)
    except OSError:  # to another disk, or where there are no hard links
        shutil.copy2(file, name)


def read_provenance(folder: Path) -> dict[str, Any]:
    """What a run's `provenance.json` says. Raises ConfigError where it is not as it was written."""
    path = folder / "provenance.json"
    try:
        found: dict[str, Any] = json.loads(path.read_text())
        checked(_PROVENANCE, found)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ConfigError(
            f"{path}: is missing or damaged ({reason}), so what this run was trained on is not "
            "known; put it back, or choose another run_dir"
        ) from None
    return found


class Provenance(TypedDict):
    """Of a run: what it was trained on, and each time that it was started."""

    data_manifest_hash: str
    vocab_hash: NotRequired[str]  # not in those of 0.1
    tokenizer: NotRequired[dict[str, Any]]
    starts: Annotated[list[dict[str, Any]], Field(min_length=1)]
    started_from: NotRequired[dict[str, Any]]
    forked_from: NotRequired[dict[str, Any]]
    exported: NotRequired[dict[str, Any]]


_PROVENANCE = TypeAdapter(Provenance)


def _this_start(world: World) -> dict[str, Any]:
    start = provenance(world.device)
    start["hardware"]["world_size"] = world.size
    return start
