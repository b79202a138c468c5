"""`sparse-gpt plan`: what a run would need and cost on given GPUs, before anything starts."""

from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError, did_you_mean
from sparse_gpt.model.costs import ffn_cost, model_report, parameter_counts, total
from sparse_gpt.plan.memory import Memory, bucket_size, estimate
from sparse_gpt.train.checks import check_settings
from sparse_gpt.train.deepspeed_config import deepspeed_config
from sparse_gpt.train.gpus import GPUS, Gpu

RESERVED = 2 * 2**30
"""Bytes of a GPU left free: context, NCCL's buffers, fragmentation."""

_PARTS = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")


@dataclass(frozen=True)
class Stage:
    """A rank's memory in one ZeRO stage; the largest micro-batch that fits, None if none does."""

    memory: Memory
    fits: bool
    largest_micro_batch: int | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {**memory, "fits": self.fits, "largest_micro_batch": self.largest_micro_batch}


@dataclass(frozen=True)
class Plan:
    """What a run needs and costs; bytes, FLOPs, and days at the assumed `mfu`."""

    gpu: str
    gpus: int
    memory_bytes: int  # of a GPU
    parameters: int
    micro_batch: int
    grad_accum: int
    configured_stage: int
    stages: dict[int, Stage]
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
        return {**vars(self), "stages": stages}


def make_plan(config: RunConfig, gpus: int, gpu: str, mfu: float) -> Plan:
    """Memory by ZeRO stage, the micro-batch to take, FLOPs and days.

    Raises ConfigError for a GPU that is not known or a run that cannot be shared by `gpus`.
    """
    device = _known(gpu)
    check_settings(config, gpus)
    stage = deepspeed_config(config, gpus)["zero_optimization"]["stage"]
    first = 0 if config.precision == "fp32" else 1  # DeepSpeed's ZeRO-0 trains in fp32 alone
    stages = {number: _stage(config, gpus, number, device) for number in range(first, 4)}
    report = model_report(config.model)
    per_token = report.training / report.seq
    steps = config.total_steps
    flops = per_token * config.batch.global_tokens * steps
    again = _recomputed_flops(config) / report.seq * config.batch.global_tokens * steps
    return Plan(
        gpu=gpu,
        gpus=gpus,
        memory_bytes=device.memory,
        parameters=parameter_counts(config.model)[0],
        micro_batch=config.batch.micro_batch,
        grad_accum=config.grad_accum(gpus),
        configured_stage=stage,
        stages=stages,
        steps=steps,
        tokens=steps * config.batch.global_tokens,
        training_flops=flops,
        hardware_flops_at_most=flops + again,
        mfu=mfu,
        days=flops / (gpus * device.peak_flops * mfu) / 86_400,
        warnings=_warnings(config, gpus, device, stage, stages),
    )


def _known(gpu: str) -> Gpu:
    if gpu not in GPUS:
        hint = did_you_mean(gpu.upper(), GPUS)
        raise ConfigError(f"--gpu {gpu}: {hint and hint + ' '}known are {', '.join(GPUS)}")
    return GPUS[gpu]


def _stage(config: RunConfig, gpus: int, stage: int, device: Gpu) -> Stage:
    memory = estimate(config, gpus, stage)
    best = largest_micro_batch(config, gpus, stage, device.memory)
    return Stage(memory, _fits(memory, device.memory), best)


def _fits(memory: Memory, available: int) -> bool:
    return memory.total + RESERVED <= available


def largest_micro_batch(config: RunConfig, gpus: int, stage: int, available: int) -> int | None:
    """The largest power of two that divides a rank's share of a step and fits; None if none does.

    `available`: bytes of a GPU.
    """
    local, size, best = config.global_batch // gpus, 1, None
    while local % size == 0 and _fits(estimate(config, gpus, stage, micro_batch=size), available):
        best, size = size, 2 * size
    return best


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
    config: RunConfig, gpus: int, device: Gpu, stage: int, stages: dict[int, Stage]
) -> list[str]:
    found = []
    own = stages[stage]
    if not own.fits:
        best = own.largest_micro_batch
        fit = [str(number) for number, other in stages.items() if other.largest_micro_batch]
        if best:
            found.append(f"does not fit: set batch.micro_batch to {best}")
        elif fit:
            found.append(f"does not fit in ZeRO-{stage}: use stage {' or '.join(fit)}")
        else:
            found.append("fits in no ZeRO stage: more GPUs, activation_checkpointing, or offload")
    if config.precision == "fp32":
        found.append("precision fp32: the days are those of half precision; use bf16")
    parameters = parameter_counts(config.model)[0]
    if stage and bucket_size(config) > parameters:
        found.append(
            f"deepspeed.zero_optimization.reduce_bucket_size is larger than the model, "
            f"{own.memory.buffers / 2**30:.1f} GiB a rank; "
            f"set it to {max(parameters // 4, 1):,} or so"
        )
    if config.model.ffn.kind == "sparse" and config.activation_checkpointing == "none":
        found.append("the sparse FFN keeps much: activation_checkpointing=selective keeps less")
    return found


def plan_table(plan: Plan) -> Table:
    """A column a ZeRO stage, in GiB of one rank, and what the run costs."""
    flops = f"{plan.training_flops:.3g} training FLOPs"
    if plan.hardware_flops_at_most > plan.training_flops:
        flops += f" (at most {plan.hardware_flops_at_most:.3g} with recomputation)"
    table = Table(
        title=f"A rank's memory in GiB: {plan.parameters:,} parameters, micro-batch "
        f"{plan.micro_batch} × {plan.grad_accum}, on {plan.gpus} × {plan.gpu} "
        f"({plan.memory_bytes / 2**30:.0f} GiB)",
        caption=f"{plan.steps:,} steps, {plan.tokens:,} tokens, {flops}\n"
        f"{plan.days:.3g} days at an assumed MFU of {plan.mfu:.0%}. "
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


def _offloads(plan: Plan) -> bool:
    return any(stage.memory.host for stage in plan.stages.values())
