"""RunConfig: one YAML file says everything about a run.

A file may inherit from another (`base: tiny-dense.yaml`, relative to it) and the command line may
override any key (`optimizer.lr=1e-3`). Whatever is wrong ends in one ConfigError naming the key.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Strict, model_validator

from sparse_gpt.errors import ConfigError
from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.width import check_transfers


class Section(BaseModel):
    """A part of the configuration: immutable, exact types, no unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class SourceConfig(Section):
    """A source of a blend; a number alone is its weight."""

    weight: float = Field(gt=0)  # its share of the samples is this over the sum of all weights
    max_epochs: float | None = Field(None, gt=0)  # in place of the data's


def _weighted(source: Any) -> Any:
    is_number = isinstance(source, int | float) and not isinstance(source, bool)
    return {"weight": source} if is_number else source


class DataConfig(Section):
    """What to train on: exactly one of `path` and `blend`. See docs/order.md."""

    path: str | None = None  # a folder that `sparse-gpt prepare` wrote
    blend: dict[str, Annotated[SourceConfig, BeforeValidator(_weighted)]] | None = Field(
        None, min_length=1
    )  # several of them
    max_epochs: float | None = Field(None, gt=0)  # a run that would read more often is refused
    allow_change: bool = False  # go on with other data than a run began with

    @model_validator(mode="after")
    def _exactly_one(self) -> "DataConfig":
        given = [name for name in ("path", "blend") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of path, blend; here is {' and '.join(given) or 'none'}"
            )
        return self


class BatchConfig(Section):
    global_tokens: int = Field(gt=0)  # tokens of one optimizer step, over all ranks
    micro_batch: int = Field(gt=0)  # sequences that one rank holds at a time


class DurationConfig(Section):
    """How long to train: exactly one of the three."""

    steps: int | None = Field(None, gt=0)
    tokens: int | None = Field(None, gt=0)
    flops: float | None = Field(None, gt=0)  # training FLOPs of the whole run, logits included

    @model_validator(mode="after")
    def _exactly_one(self) -> "DurationConfig":
        given = [name for name in type(self).model_fields if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"give exactly one of steps, tokens, flops; here is {' and '.join(given) or 'none'}"
            )
        return self


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), decay on matrices only.

    With `width_transfer` (muP, see `sparse_gpt.width`) `lr` is the learning rate of d_model 128,
    and each weight of another width gets what trains it alike.
    """

    lr: float = Field(gt=0)
    width_transfer: bool = False
    betas: Annotated[tuple[float, float], Strict(False)] = (0.9, 0.95)
    eps: float = Field(1e-8, gt=0)
    weight_decay: float = Field(0.1, ge=0)
    grad_clip: float = Field(1.0, ge=0)  # global gradient norm; 0 = no clipping


class ScheduleConfig(Section):
    """Learning rate over the steps, see `train/schedule.py`."""

    kind: Literal["cosine", "wsd", "linear"] = "cosine"
    warmup_steps: int = Field(0, ge=0)
    decay_fraction: float = Field(0.2, gt=0, le=1)  # the last part of a `wsd` run, where it cools
    final_lr_ratio: float = Field(0.1, ge=0, le=1)  # learning rate at the end over the peak


class CheckpointConfig(Section):
    every: int = Field(1000, gt=0)  # steps; the last step is always saved
    keep_last: int = Field(2, gt=0)
    keep_every: int | None = Field(None, gt=0)  # steps whose multiples are kept for good
    at: Annotated[tuple[int, ...], Strict(False)] = ()  # further steps to save, kept for good


class LogConfig(Section):
    every: int = Field(1, gt=0)  # steps
    profile_every: int = Field(100, gt=0)  # steps between samples of time/ and sparsity/
    batch_hash: bool = False  # data/batch_hash: of a step's token ids, the same on any ranks


class EvalConfig(Section):
    every: int = Field(500, gt=0)  # steps; the last step is always evaluated
    max_tokens: int | None = Field(None, gt=0)  # of each source's held-out split; None = all


class FaultConfig(Section):
    timeout_seconds: float = Field(600, gt=0)  # a rank that is silent for so long ends the run


class GuardConfig(Section):
    """What `train/guard.py` does about bad steps. NaN and Inf are always skipped."""

    # A loss or gradient norm far above those before: `skip` leaves the step out, `rollback` also
    # goes back to the newest checkpoint and on with the data that follow the bad step's.
    spike: Literal["ignore", "skip", "rollback"] = "ignore"
    threshold: float = Field(6.0, gt=0)  # a spike: so many standard deviations above the mean of
    window: int = Field(100, gt=1)  # the last so many good steps; before those, there is no spike
    stop_after: int = Field(5, gt=0)  # bad steps in a row; their last one goes to incidents/
    checksum_every: int = Field(0, ge=0)  # steps between comparisons of the ranks' weights; 0 = off


# The weights' dtype at each precision, between the updates of their fp32 masters.
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class RunConfig(Section):
    """Everything about a run; the same config gives the same losses."""

    run_dir: str
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    duration: DurationConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool = False  # torch.compile each block: equal but for rounding and dropout's draws
    activation_checkpointing: Literal["none", "selective", "full"] = "none"  # see GPT.recompute
    deepspeed: dict[str, Any] = {}
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    fault: FaultConfig = FaultConfig()
    guard: GuardConfig = GuardConfig()
    seed: int = 0

    @model_validator(mode="after")
    def _whole_sequences(self) -> "RunConfig":
        tokens, seq_len = self.batch.global_tokens, self.model.max_seq_len
        if tokens % seq_len:
            low = tokens // seq_len * seq_len
            raise ValueError(
                f"batch.global_tokens {tokens} is not a whole number of sequences of "
                f"model.max_seq_len {seq_len}; use {f'{low} or ' if low else ''}{low + seq_len}"
            )
        return self

    @model_validator(mode="after")
    def _transfers(self) -> "RunConfig":
        if self.optimizer.width_transfer:
            try:
                check_transfers(self.model)
            except ValueError as error:
                raise ValueError(f"optimizer.width_transfer: {error}") from None
        return self

    @property
    def global_batch(self) -> int:
        """Sequences of one optimizer step, over all ranks."""
        return self.batch.global_tokens // self.model.max_seq_len

    def grad_accum(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` ranks accumulates for one step.

        Raises ConfigError with the possible values if the division leaves a rest.
        """
        total, micro = self.global_batch, self.batch.micro_batch
        if total % world_size:
            sizes = [w for w in range(1, min(total, 2 * world_size) + 1) if total % w == 0]
            raise ConfigError(
                f"batch.global_tokens {self.batch.global_tokens} is {total} sequences, which "
                f"{world_size} ranks cannot share equally; possible ranks: {some(sizes)}"
            )
        local = total // world_size
        if local % micro:
            sizes = [m for m in range(1, local + 1) if local % m == 0]
            raise ConfigError(
                f"batch.micro_batch {micro} does not divide the {local} sequences that each of "
                f"{world_size} ranks takes a step; possible values: {some(sizes)}"
            )
        return local // micro

    def total_steps(self, training_flops_per_token: float) -> int:
        """Optimizer steps of the whole run."""
        duration, per_step = self.duration, self.batch.global_tokens
        if duration.steps is not None:
            return duration.steps
        if duration.tokens is not None:
            return math.ceil(duration.tokens / per_step)
        assert duration.flops is not None
        return math.ceil(duration.flops / (training_flops_per_token * per_step))


def some(values: list[int]) -> str:
    """The values as text, without the middle of a long list."""
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:6], "…", *texts[-6:]])
