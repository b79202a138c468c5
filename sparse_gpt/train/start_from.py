"""A new run whose weights are another model's: a checkpoint's, or those of a GPT-2 of transformers.

The optimizer is new and the first step is 0. Where the source is dense and the run's model sparse,
its FFNs are fitted to the dense ones first.
"""

import copy
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.data import Blend
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.config import DenseFFNConfig, ModelConfig
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train.checkpoint.manifest import tags
from sparse_gpt.train.checkpoint.named import find, load_model
from sparse_gpt.train.distributed import World
from sparse_gpt.train.feed import train_batches
from sparse_gpt.train.run_dir import read_provenance

# Adam's steps after the closed form, each on a batch of FIT_TOKENS.
FIT_STEPS, FIT_TOKENS = 100, 8192


def begins_anew(config: RunConfig) -> bool:
    """Whether the run takes its weights from `start_from` now: it has no checkpoint yet."""
    return bool(config.start_from) and not tags(Path(config.run_dir) / "checkpoints")


def check_start(config: RunConfig, vocab_hash: str) -> None:
    """Raises ConfigError where there is nothing to start from, or its shapes or vocabulary are not
    the run's, which it names."""
    if not begins_anew(config):
        return
    assert config.start_from
    if _is_folder_of_transformers(config.start_from):
        source = _transformers_config(config.start_from)
    else:
        run, _ = find(config.start_from)
        source = load_config(run / "config.yaml").model
        known = read_provenance(run).get("vocab_hash")
        if known not in (None, vocab_hash):
            raise ConfigError(
                f"start_from: {run} was trained in another vocabulary than that of the data"
            )
    for key in ("vocab_size", "max_seq_len", "d_model", "n_layer", "n_head"):
        ours, theirs = getattr(config.model, key), getattr(source, key)
        if ours != theirs:
            raise ConfigError(f"start_from: {config.start_from} has {key} {theirs}, model {ours}")
    same = {"exclude": {"dropout", "fan_in_init"}}
    if isinstance(source.ffn, DenseFFNConfig):
        return
    if config.model.ffn.model_dump(**same) != source.ffn.model_dump(**same):  # type: ignore[arg-type]
        raise ConfigError(
            f"start_from: {config.start_from} has another sparse FFN than model.ffn; set that one"
        )


def starting_model(config: RunConfig, blend: Blend, world: World) -> GPT:
    """The model of `config` with the weights of `start_from`, in fp32, the same on every rank."""
    model = GPT(config.model)
    if world.rank == 0:
        source = _source(config)
        if config.model.ffn.kind != source.config.ffn.kind:
            source = _fitted(source, config, blend)
        model.load_state_dict(source.state_dict())
    for value in model.state_dict().values():
        shared = value.to(world.device)
        dist.broadcast(shared, src=0)
        value.copy_(shared)
    return model


def origin_of(config: RunConfig) -> dict[str, Any]:
    """What the run's provenance says of where its weights came from."""
    assert config.start_from
    if _is_folder_of_transformers(config.start_from):
        return {"transformers": config.start_from}
    run, step = find(config.start_from)
    return {"run": str(run), "step": step, "provenance": read_provenance(run)}


def _is_folder_of_transformers(name: str) -> bool:
    return (Path(name) / "config.json").exists()


def _transformers_config(folder: str) -> ModelConfig:
    try:
        from sparse_gpt.huggingface.convert import read_config
    except ImportError:
        raise ConfigError(
            f"start_from: reading {folder} needs: pip install 'sparse-gpt[hf]'"
        ) from None
    try:
        return read_config(folder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"start_from: {folder}: {str(error).splitlines()[0]}") from None


def _source(config: RunConfig) -> GPT:
    assert config.start_from
    if not _is_folder_of_transformers(config.start_from):
        return load_model(*find(config.start_from))
    from sparse_gpt.huggingface.convert import read_model

    try:
        return read_model(config.start_from)
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"start_from: {config.start_from}: {str(error).splitlines()[0]}"
        ) from None


def _fitted(source: GPT, config: RunConfig, blend: Blend) -> GPT:
    """A dense model with the run's sparse FFNs, fitted to its own on the run's data."""
    from sparse_gpt.huggingface import fit_to_dense, replace_ffn
    from sparse_gpt.huggingface.convert import from_transformers, to_transformers

    dense = to_transformers(source, end_of_text=0)
    model = replace_ffn(copy.deepcopy(dense), config.model.ffn)  # type: ignore[arg-type]
    errors = fit_to_dense(model, dense, _batches(config, blend), FIT_STEPS)
    worst = max(error.after for error in errors.values())
    print(f"start_from: FFNs fitted, {worst:.3f} of a layer's variance is left at most", flush=True)
    return from_transformers(model)


def _batches(config: RunConfig, blend: Blend) -> Iterator[Tensor]:
    rows = max(1, FIT_TOKENS // config.model.max_seq_len)
    every = (batch.tokens for batch in train_batches(config, blend, world_size=1))
    seen = islice(every, FIT_STEPS * -(-rows // config.global_batch))
    pool = torch.cat(list(seen))
    return iter(pool.split(rows))
