"""One way to take a step on a cluster, a ZeRO stage with blocks over so many ranks: what it needs
of a rank's memory, the micro-batch that fits, and what it sends."""

from dataclasses import asdict, dataclass
from typing import Any

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.plan.memory import DeviceType, Memory, estimate, reuse_distance, shared_by
from sparse_gpt.plan.step import (
    Cluster,
    StepCost,
    exchange_cost,
    gathered_elements,
    reduced_elements,
    step_cost,
)
from sparse_gpt.train.deepspeed_config import native_settings
from sparse_gpt.train.precision import DTYPES

RESERVED = 2 * 2**30
"""Bytes of a device left free: context, NCCL's buffers, fragmentation."""

_WIDTHS = {"fp32": 4, "fp16": 2, "bf16": 2}  # as DeepSpeed names types


@dataclass(frozen=True)
class Stage:
    """A rank's memory; the largest micro-batch that fits, None if none does; a step's seconds and
    traffic."""

    memory: Memory
    fits: bool
    largest_micro_batch: int | None
    step: StepCost

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        largest = {"fits": self.fits, "largest_micro_batch": self.largest_micro_batch}
        return {**memory, **largest, "step": asdict(self.step)}


def stage_of(
    config: RunConfig, stage: int, memory: int, cluster: Cluster, products_seconds: float
) -> Stage:
    """The run in ZeRO `stage`; in ZeRO-3 its blocks are not shared. `memory`: bytes of a GPU."""
    needed = estimate(config, cluster.gpus, stage)
    best = largest_micro_batch(config, cluster.gpus, stage, memory)
    step = step_of(config, stage, cluster, products_seconds)
    return Stage(needed, fits(needed, memory), best, step)


def step_of(
    config: RunConfig, stage: int, cluster: Cluster, products_seconds: float = 0.0
) -> StepCost:
    """A step's seconds and traffic, of the run in ZeRO `stage`."""
    counts = parameter_counts(config.model)
    ranks = shared_by(config) if stage < 3 else 1
    micro_batches = config.grad_accum(cluster.gpus)
    width = DTYPES[config.precision].itemsize
    wire = _WIDTHS.get(native_settings(config).get("communication_data_type", ""), width)

    def moved(parameters: int, among: Cluster, seconds: float = 0.0) -> StepCost:
        reuse = reuse_distance(config)
        gathered = width * gathered_elements(parameters, stage, micro_batches, reuse)
        reduced = wire * reduced_elements(parameters, stage, micro_batches)
        return step_cost(among, seconds, gathered, reduced)

    if ranks == 1:
        return moved(counts.total, cluster, products_seconds)
    spectral = config.dictionary
    assert spectral is not None
    layers = config.model.n_layer
    exchange = exchange_cost(
        cluster,
        ranks,
        rows=config.batch.global_tokens // cluster.gpus * spectral.top_k * layers,
        calls=layers * micro_batches,
        d_model=config.model.d_model,
        width=width,
        blocks=spectral.blocks,
        again=config.activation_checkpointing != "none",
    )
    shared = moved(counts.dictionaries // ranks, cluster.replicas(ranks))
    return moved(counts.total - counts.dictionaries, cluster, products_seconds) + shared + exchange


def fits(memory: Memory, available: int) -> bool:
    """Whether a rank with `available` bytes can have it."""
    return memory.total + RESERVED <= available


def largest_micro_batch(
    config: RunConfig, gpus: int, stage: int, available: int, device: DeviceType = "cuda"
) -> int | None:
    """The largest power of two that divides a rank's share of a step and fits; None if none does.

    `available`: bytes of a GPU.
    """
    local, size, best = config.global_batch // gpus, 1, None
    while local % size == 0 and fits(
        estimate(config, gpus, stage, device, micro_batch=size), available
    ):
        best, size = size, 2 * size
    return best
