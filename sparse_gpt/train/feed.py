"""The data that a run's configuration names, and whether they last for the run."""

from collections.abc import Iterator

import torch

from sparse_gpt.config.schema import DataConfig, RunConfig
from sparse_gpt.data import (
    Batch,
    Batches,
    Blend,
    Split,
    evaluation,
    open_blend,
    open_shards,
    prefetched,
)
from sparse_gpt.train.distributed import World


def open_data(config: DataConfig) -> Blend:
    """Open `data.path` or `data.blend`. Raises DataError."""
    if config.blend is not None:
        return open_blend({path: source.weight for path, source in config.blend.items()})
    assert config.path is not None
    return Blend.of_one(open_shards(config.path))


def train_batches(
    config: RunConfig, blend: Blend, world_size: int, rank: int = 0, start: int = 0
) -> Batches:
    """This rank's share of the training data from sample `start` on."""
    return Batches(
        blend,
        seq_len=config.model.max_seq_len,
        global_batch=config.global_batch,
        seed=config.seed,
        rank=rank,
        world_size=world_size,
        start=start,
        documents=config.model.document_mask,
        pin=torch.cuda.is_available(),
    )


def read_from(config: RunConfig, blend: Blend, world: World, start: int) -> Iterator[Batch]:
    """This rank's batches from sample `start` on, read ahead."""
    return prefetched(iter(train_batches(config, blend, world.size, world.rank, start)))


def held_out(config: RunConfig, split: Split, world_size: int, rank: int = 0) -> Iterator[Batch]:
    """This rank's share of one pass over a held-out split: the same windows at any world size."""
    return held_out_of(config, split, config.eval.max_tokens, world_size, rank)


def held_out_of(
    config: RunConfig, split: Split, max_tokens: int | None, world_size: int = 1, rank: int = 0
) -> Iterator[Batch]:
    """The same of `max_tokens` of the split, or of all."""
    return evaluation(
        split,
        config.model.max_seq_len,
        config.batch.micro_batch * world_size,
        rank,
        world_size,
        max_tokens=max_tokens,
        documents=config.model.document_mask,
    )
