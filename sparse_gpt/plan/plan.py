"""`sparse-gpt plan`: what a run would need and cost on given GPUs, before anything starts."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from rich.table import Table

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError, did_you_mean
from sparse_gpt.model.costs import ffn_cost, model_report, parameter_counts, total
from sparse_gpt.plan.blocks import (
    Sharing,
    best_by_gpus,
    blocks_table,
    fastest,
    sharings,
    with_blocks,
)
from sparse_gpt.plan.memory import bucket_size, shared_by
from sparse_gpt.plan.stage import RESERVED, Stage, stage_of
from sparse_gpt.plan.step import NETWORK, Cluster, StepCost, step_table
from sparse_gpt.progress import duration
from sparse_gpt.train.checks import check_settings
from sparse_gpt.train.deepspeed_config import deepspeed_config
from sparse_gpt.train.gpus import GPUS, PCIE_4, Gpu, measured_gpu

_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Plan:
    """What a run needs and costs; bytes, FLOPs, and days at the assumed `mfu`."""

    gpu: str
    gpus: int
    gpus_per_node: int
    bytes_per_second: float  # of a gather or reduction over all GPUs
    memory_bytes: int  # of a GPU
    peak_flops: float  # FLOP/s of a GPU in half precision
    parameters: int
    active_parameters: int  # a token's
    micro_batch: int
    grad_accum: int
    configured_stage: int
    blocks: int  # ranks over which the stages share the blocks of dictionaries, but ZeRO-3
    stages: dict[int, Stage]
    sharings: dict[int, Sharing]  # in the configured stage, by the number of ranks
    best_blocks: int | None  # the fastest number that fits
    best_blocks_by_gpus: dict[int, int | None]  # on powers of two that can share the batch
    steps: int
    tokens: int
    training_flops: float
    hardware_flops_at_most: float  # with what activation checkpointing computes again
    mfu: float
    days: float
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        stages = {str(number): stage.to_dict() for number, stage in self.stages.items()}
        sharings = {str(number): sharing.to_dict() for number, sharing in self.sharings.items()}
        by_gpus = {str(gpus): best for gpus, best in self.best_blocks_by_gpus.items()}
        own = {"stages": stages, "sharings": sharings, "best_blocks_by_gpus": by_gpus}
        return {**vars(self), **own}


def make_plan(
    config: RunConfig,
    gpus: int,
    gpu: str | None = None,
    mfu: float = 0.4,
    gpus_per_node: int = 8,
    network: float = NETWORK,
    peak_flops: float | None = None,
    memory: int | None = None,
) -> Plan:
    """Memory and a step's traffic by ZeRO stage and by the ranks that share blocks, the micro-batch
    to take, FLOPs and days. Where `parallel.blocks` is `auto`, it is what is fastest.

    `network`: bytes/s a direction that a GPU has between nodes. `peak_flops` and `memory` (bytes)
    go before what is known of the GPU; with both it need not be known. Raises ConfigError for a
    GPU that is not known or a run that cannot be shared by `gpus`.
    """
    name, device = _device(gpu, peak_flops, memory)
    check_settings(with_blocks(config, 1), gpus)
    stage = deepspeed_config(config, gpus)["zero_optimization"]["stage"]
    first = 0 if config.precision == "fp32" else 1  # DeepSpeed's ZeRO-0 trains in fp32 alone
    cluster = Cluster(gpus, gpus_per_node, device.link, network)
    report = model_report(config.model)
    steps = config.total_steps
    flops_of_step = report.training / report.seq * config.batch.global_tokens
    seconds = flops_of_step / (gpus * device.peak_flops * mfu)
    shared = sharings(config, device.memory, cluster, seconds)
    best = fastest(shared)
    if config.parallel.blocks == "auto":
        config = with_blocks(config, best or max(shared))
    check_settings(config, gpus)
    stages = {
        number: stage_of(config, number, device.memory, cluster, seconds)
        for number in range(first, 4)
    }
    parameters = parameter_counts(config.model)
    again = _recomputed_flops(config) / report.seq * config.batch.global_tokens * steps
    return Plan(
        gpu=name,
        gpus=gpus,
        gpus_per_node=gpus_per_node,
        bytes_per_second=cluster.bandwidth,
        memory_bytes=device.memory,
        peak_flops=device.peak_flops,
        parameters=parameters.total,
        active_parameters=parameters.active,
        micro_batch=config.batch.micro_batch,
        grad_accum=config.grad_accum(gpus),
        configured_stage=stage,
        blocks=shared_by(config),
        stages=stages,
        sharings=shared,
        best_blocks=best,
        best_blocks_by_gpus=best_by_gpus(config, device.memory, cluster) if len(shared) > 1 else {},
        steps=steps,
        tokens=steps * config.batch.global_tokens,
        training_flops=flops_of_step * steps,
        hardware_flops_at_most=flops_of_step * steps + again,
        mfu=mfu,
        days=seconds * steps / 86_400,
        warnings=_warnings(config, device, stage, stages, best),
    )


def given_gpu(
    gpu: str | None, peak_tflops: str | None, memory: int | None
) -> tuple[str | None, float | None, int | None]:
    """What `make_plan` takes: a GPU's name, FLOP/s and bytes; those of this machine's where the
    peak is to be measured. Raises ConfigError for a peak that is no positive number."""
    if peak_tflops is None:
        return gpu, None, memory
    if peak_tflops == "measure":
        here = measured_gpu()
        return gpu or here.torch_name, here.peak_flops, memory or here.memory
    try:
        peak = float(peak_tflops)
    except ValueError:
        peak = 0.0
    if not 0 < peak < math.inf:
        raise ConfigError(f"--peak-tflops {peak_tflops}: give a number above 0, or measure")
    return gpu, peak * 1e12, memory


def _device(gpu: str | None, peak_flops: float | None, memory: int | None) -> tuple[str, Gpu]:
    """A GPU of the table, or one of which both numbers are given, and what to call it."""
    if gpu is None and peak_flops is memory is None:
        gpu = "H100"
    known = GPUS.get(gpu or "")
    if known:
        given = peak_flops or memory
        peak, size = peak_flops or known.peak_flops, memory or known.memory
        return f"{gpu}{' (as given)' * bool(given)}", replace(known, peak_flops=peak, memory=size)
    if not peak_flops or not memory:
        hint = did_you_mean(gpu.upper(), GPUS) if gpu else ""
        raise ConfigError(
            f"--gpu {gpu or 'is not given'}: {hint and hint + ' '}known are {', '.join(GPUS)}; "
            "for another give --peak-tflops (a number, or measure) and --memory-gb"
        )
    return gpu or "GPU", Gpu("", memory, peak_flops, PCIE_4)


def _recomputed_flops(config: RunConfig) -> int:
    """Forward FLOPs of a sequence that activation checkpointing adds, at most.

    torch stops recomputing at the last tensor that the backward needs.
    """
    blocks = model_report(config.model).blocks()
    if config.activation_checkpointing == "full":
        return sum(total(block).forward for block in blocks)
    if config.activation_checkpointing == "selective":
        return sum(ffn_cost(block).forward for block in blocks)
    return 0


def _warnings(
    config: RunConfig, device: Gpu, stage: int, stages: dict[int, Stage], blocks: int | None
) -> list[str]:
    found = []
    own = stages[stage]
    if not own.fits:
        best = own.largest_micro_batch
        fit = [str(number) for number, other in stages.items() if other.largest_micro_batch]
        if best:
            found.append(f"does not fit: set batch.micro_batch to {best}")
        elif blocks:
            found.append(f"does not fit: set parallel.blocks to {blocks}")
        elif fit:
            found.append(f"does not fit in ZeRO-{stage}: use stage {' or '.join(fit)}")
        else:
            found.append("fits in no ZeRO stage: more GPUs, activation_checkpointing, or offload")
    parameters = parameter_counts(config.model).total
    much = not own.fits or 2 * own.memory.total > device.memory
    if stage and much and bucket_size(config) > parameters:
        found.append(
            f"deepspeed.zero_optimization.reduce_bucket_size is larger than the model, "
            f"{own.memory.buffers / 2**30:.1f} GiB a rank; "
            f"set it to {max(parameters // 4, 1):,} or so"
        )
    found += _slow_links(config, stage, own.step)
    ffn = config.model.ffn
    keeps_all = config.activation_checkpointing == "none"
    fixed = ffn.kind == "sparse" and config.dictionary is None
    if fixed and 2 * own.memory.activations > device.memory and keeps_all:
        found.append("this sparse FFN keeps much: activation_checkpointing=selective keeps less")
    return found


def _slow_links(config: RunConfig, stage: int, step: StepCost) -> Iterator[str]:
    """The gathers, where they take longer than the products."""
    if step.gather_seconds <= step.products_seconds:
        return
    why = "all weights come twice in a micro-batch" if stage == 3 else "all weights come once"
    if spectral := config.dictionary:
        why += f", all {spectral.blocks} blocks of each layer though a token uses {spectral.top_k}"
    cure = "stage 1 or 2 where it fits, or a larger micro_batch" if stage == 3 else "larger batch"
    yield (
        f"ZeRO-{stage}'s gathers take {step.gather_seconds:.3g} s of a step, its products "
        f"{step.products_seconds:.3g} s: {why}; use {cure}"
    )


def plan_table(plan: Plan) -> Table:
    """A column a ZeRO stage, in GiB of one rank, and what the run costs."""
    parameters = f"{plan.parameters:,} parameters"
    if plan.active_parameters < plan.parameters:
        parameters += f" ({plan.active_parameters:,} active for a token)"
    flops = f"{plan.training_flops:.3g} training FLOPs"
    if plan.hardware_flops_at_most > plan.training_flops:
        flops += f" (at most {plan.hardware_flops_at_most:.3g} with recomputation)"
    table = Table(
        title=f"A rank's memory in GiB: {parameters}, micro-batch "
        f"{plan.micro_batch} × {plan.grad_accum}, on {plan.gpus} × {plan.gpu} "
        f"({plan.memory_bytes / 2**30:.0f} GiB)"
        + (f", blocks over {plan.blocks} ranks (but in ZeRO-3)" if plan.blocks > 1 else ""),
        caption=f"{plan.steps:,} steps, {plan.tokens:,} tokens, {flops}\n"
        f"{duration(86_400 * plan.days)} at an assumed MFU of {plan.mfu:.0%} of a peak of "
        f"{plan.peak_flops / 1e12:.4g} TFLOP/s. "
        f"{RESERVED / 2**30:.0f} GiB are left for context, NCCL and fragmentation.",
    )
    table.add_column("")
    for stage in plan.stages:
        own = " (this run)" if stage == plan.configured_stage else ""
        table.add_column(f"ZeRO-{stage}{own}", justify="right")
    rows = [(part, part) for part in _PARTS]
    rows += [("total", "total"), *([("host", "in RAM")] if _offloads(plan) else [])]
    for key, name in rows:
        cells = [f"{getattr(stage.memory, key) / 2**30:.2f}" for stage in plan.stages.values()]
        table.add_row(name, *cells, style="bold" if key == "total" else "")
    stages = plan.stages.values()
    table.add_row("fits", *("yes" if stage.fits else "no" for stage in stages))
    best = [str(stage.largest_micro_batch or "none") for stage in stages]
    table.add_row("largest micro-batch", *best)
    return table


def plan_steps(plan: Plan) -> Table:
    """What a step takes, a column a ZeRO stage."""
    steps = {number: stage.step for number, stage in plan.stages.items()}
    title = (
        f"A step: products at an MFU of {plan.mfu:.0%}, links at {plan.bytes_per_second / 1e9:.0f} "
        f"GB/s ({plan.gpus_per_node} GPUs a node)"
    )
    return step_table(steps, plan.configured_stage, title)


def plan_blocks(plan: Plan) -> Table:
    """Memory and a step, a row a number of ranks that share the blocks of dictionaries."""
    return blocks_table(plan.sharings, plan.configured_stage, plan.best_blocks_by_gpus)


def _offloads(plan: Plan) -> bool:
    return any(stage.memory.host for stage in plan.stages.values())
