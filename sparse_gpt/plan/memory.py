"""Where a rank's memory goes, before anything runs: states by ZeRO stage, activations by tracing.

Activations are not guessed: the model's own forward runs on tensors without storage, and what
autograd keeps for the backward is summed, each storage once. Blocks are alike and all grows with
the micro-batch, so two short traces (one block, two blocks, one sequence) tell it for any size.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.attention import has_flex
from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.model.ffn.routing import Arrived
from sparse_gpt.model.gpt import GPT, padded_vocabulary
from sparse_gpt.model.loss import chunk_size
from sparse_gpt.plan.step import REUSE, kept_gathered
from sparse_gpt.train.deepspeed_config import native_settings
from sparse_gpt.train.precision import DTYPES

_PREFETCH = 50_000_000  # DeepSpeed's default, in elements, as of the bucket below

Recompute = Literal["none", "selective", "full"]
DeviceType = Literal["cpu", "cuda"]


@dataclass(frozen=True)
class Kept:
    """Bytes that the forward of one sequence keeps for the backward."""

    ends: int  # embeddings, the last norm and the head's input
    block: int
    widest: int  # the largest tensor of a block


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the moment of a step when most are in use; `host` is in RAM."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    host: int = 0

    @property
    def total(self) -> int:
        """What the device must hold."""
        parts = (self.parameters, self.gradients, self.optimizer)
        return sum(parts) + self.activations + self.logits + self.buffers


@lru_cache
def trace(
    config: ModelConfig, precision: str, recompute: Recompute, exchanged: bool = False
) -> Kept:
    """What one sequence of full length keeps; allocates nothing and needs no device.

    exchanged: whether tokens travel to the blocks of dictionaries. As many rows then come as go.
    """
    one, widest = _kept(config.model_copy(update={"n_layer": 1}), precision, recompute, exchanged)
    two, _ = _kept(config.model_copy(update={"n_layer": 2}), precision, recompute, exchanged)
    return Kept(ends=2 * one - two, block=two - one, widest=widest)


def _kept(config: ModelConfig, precision: str, what: Recompute, exchanged: bool) -> tuple[int, int]:
    storages: dict[int, tuple[int, Tensor]] = {}  # the tensor, so that no address is used again

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage._cdata] = (storage.nbytes(), tensor)
        return tensor

    with FakeTensorMode(), _default_dtype(DTYPES[precision]):
        model = GPT(config)
        for part in model.modules() if exchanged else ():
            if isinstance(part, BlockDictionary):
                part.exchange = _as_many
        model.recompute(what)
        tokens = torch.zeros(1, config.max_seq_len, dtype=torch.int64)
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(tokens, documents=tokens if config.document_mask else None)
        weights = [*model.parameters(), *model.buffers(), logits]
        for tensor in weights:
            storages.pop(tensor.untyped_storage()._cdata, None)
    sizes = [size for size, _ in storages.values()]
    return sum(sizes), max(sizes)


def _as_many(rows: Tensor, gains: Tensor, loads: Tensor) -> Arrived:
    """A `model.ffn.routing.Exchange` in which others send what this rank sends."""
    blocks = torch.zeros(len(rows), 1, dtype=torch.int64)
    return Arrived(rows.clone(), gains.clone(), blocks, Tensor.clone)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def estimate(
    config: RunConfig,
    world_size: int,
    stage: int,
    device: DeviceType = "cuda",
    micro_batch: int | None = None,
) -> Memory:
    """A rank's memory at its peak in ZeRO `stage`; `micro_batch` sequences, else the config's.

    The blocks of dictionaries are over `parallel.blocks` ranks, a number; in ZeRO-3 over none.
    Left out is what no tensor of the run holds: the device's context, libraries, fragmentation.
    Of a buffer that DeepSpeed allocates and leaves empty, a CPU counts what is written to.
    """
    model, zero = config.model, _zero(config)
    size = micro_batch or config.batch.micro_batch
    accumulates = config.global_batch // world_size > size
    width = DTYPES[config.precision].itemsize
    counts = parameter_counts(model)
    ranks = shared_by(config) if stage < 3 else 1
    # Of what a rank has whole where nothing is shared out by the stage, and of one dictionary.
    parameters = counts.total - counts.dictionaries + counts.dictionaries // ranks
    dictionary = counts.dictionaries // ranks // model.n_layer
    share = -(-counts.total // world_size)
    head = padded_vocabulary(model) * model.d_model
    offload = _on_host(zero, "offload_optimizer") and stage > 0
    offload_param = _on_host(zero, "offload_param") and stage == 3

    # States: float32 masters and two moments. In fp32 ZeRO-1 and 2 copy the masters, ZeRO-0 does
    # not, ZeRO-3 does on a CPU (it takes "cpu" and "cpu:0" for two devices).
    copied = stage in (1, 2) or (stage == 3 and device == "cpu")
    masters = 4 if width < 4 or copied else 0
    optimizer = (masters + 8) * share if stage else (masters + 8) * parameters
    held = parameters if stage < 3 else share
    if stage == 3:
        # A block's FFN comes whole, with all of its dictionary; and what comes again soon stays.
        ahead = max(int(zero.get("stage3_prefetch_bucket_size", _PREFETCH)), dictionary)
        live = max(head + ahead, kept_gathered(parameters, reuse_distance(config)))
        held = (0 if offload_param else share) + min(parameters, live)  # gathered beside its share

    # Gradients between the micro-batches of a step, and when the backward is over.
    whole = parameters * (4 if stage else width)
    between = whole if stage < 2 else 4 * share
    bucket = bucket_size(config)
    if device == "cpu":
        bucket = min(bucket, parameters)
    double = zero.get("overlap_comm", stage == 3) and stage in (1, 2)
    buckets = bucket * (4 if stage == 1 else width) * (2 if double else 1) if stage else 0
    if stage == 2:  # what goes to others is copied on its way, as measured over 4 ranks
        buckets += min(bucket, parameters - min(share, parameters)) * width
    flat = 4 * share if stage else 0  # the partition that the optimizer steps on

    # Activations: all blocks' at the loss; then each block in turn computes its own again.
    if has_flex(device, model):
        # FlexAttention keeps what attention without documents does. Its lists of blocks, shared by
        # all layers, are 1/1000 of a bool for each query and key, and are left out.
        model = model.model_copy(update={"document_mask": False})
    kept = trace(model, config.precision, config.activation_checkpointing, ranks > 1)
    plain = trace(model, config.precision, "none", ranks > 1)
    activations = size * (kept.ends + model.n_layer * kept.block)
    again = size * (plain.block - kept.block)

    tokens, rows = size * model.max_seq_len, padded_vocabulary(model)
    chunk = chunk_size(tokens, rows, torch.device(device))
    head_gradient = head * width  # waits for the embedding's, to the backward's end
    logits = chunk * rows * (4 + width) + 4 * head + (head_gradient if width < 4 else 0)
    # Gradients within a block; those of its dictionary are made in one.
    inside = 2 * size * plain.widest + dictionary * width

    def moment(gradients: int, activations: int, logits: int, buffers: int) -> Memory:
        return Memory(
            parameters=held * width,
            gradients=gradients,
            optimizer=0 if offload else optimizer,
            activations=activations,
            logits=logits,
            buffers=buffers,
            host=optimizer + flat if offload else 0,
        )

    # ZeRO-2 adds a micro-batch's reduced gradients to those before when all are there.
    added = 4 * share if stage == 2 and accumulates else 0
    before = between if accumulates or stage == 3 else 0  # ZeRO-3 keeps them from the start
    # A CPU gives pages to a buffer as it is written, so to buckets when activations are gone.
    early = buckets if device == "cuda" else 0
    moments = (
        moment(before, activations, logits, early if stage == 3 else 0),
        moment(before, activations + again + inside, head_gradient, early),
        moment(between + added, size * kept.ends, 2 * head_gradient, buckets),
        moment(between + (0 if offload else flat), 0, 0, buckets if stage == 3 else 0),
    )
    return max(moments, key=lambda memory: memory.total)


def shared_by(config: RunConfig) -> int:
    """Ranks over which blocks are. Raises ValueError where that is not chosen yet."""
    if config.parallel.blocks == "auto":
        raise ValueError("parallel.blocks is not chosen yet")
    return config.parallel.blocks


def bucket_size(config: RunConfig) -> int:
    """Elements of one of DeepSpeed's reduction buckets."""
    return int(_zero(config).get("reduce_bucket_size", 500_000_000))


def reuse_distance(config: RunConfig) -> int:
    """Elements within which ZeRO-3 keeps gathered weights that come again."""
    return int(_zero(config).get("stage3_max_reuse_distance", REUSE))


def _zero(config: RunConfig) -> dict[str, Any]:
    """What is set of ZeRO."""
    return dict(native_settings(config).get("zero_optimization", {}))


def _on_host(zero: dict[str, Any], part: str) -> bool:
    return bool((zero.get(part) or {}).get("device", "none") != "none")
