"""RunConfig: one YAML file says everything about a run.

A file may inherit from another (`base: tiny-dense.yaml`, relative to it) and the command line may
override any key (`optimizer.lr=1e-3`). Whatever is wrong ends in one ConfigError naming the key.
"""

import math
import typing
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationInfo,
    field_validator,
    model_validator,
)

from sparse_gpt.errors import ConfigError
from sparse_gpt.model.config import DictionaryConfig, ModelConfig, Part, Probability


class Section(Part):
    """A part of a run file: exact types besides, but that whole numbers may be written as 1e9."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any, info: ValidationInfo) -> Any:
        annotation = cls.model_fields[str(info.field_name)].annotation
        takes_int = int in (typing.get_args(annotation) or (annotation,))
        whole = isinstance(value, float) and value.is_integer() and abs(value) < 2**53
        return int(value) if takes_int and whole else value


def _exactly_one(*names: str) -> Any:
    """The validator that wants one of these keys given."""

    def check(section: Section) -> Section:
        given = [name for name in names if getattr(section, name) is not None]
        if len(given) == 1:
            return section
        found = " and ".join(given) or "none"
        raise ValueError(f"give exactly one of {', '.join(names)}; here is {found}")

    return model_validator(mode="after")(check)


Weight = Annotated[float, Field(gt=0)]


class SourceConfig(Section):
    """A source of a blend; a number alone is its weight."""

    weight: Weight
    """Its share of the samples is this over the sum of all weights."""
    max_epochs: float | None = Field(None, gt=0)
    """In place of `data.max_epochs`."""


def _weighted(source: Any) -> Any:
    is_number = isinstance(source, int | float) and not isinstance(source, bool)
    return {"weight": source} if is_number else source


Source = Annotated[
    SourceConfig, BeforeValidator(_weighted, json_schema_input_type=Weight | SourceConfig)
]


class DataConfig(Section):
    """What to train on: exactly one of `path` and `blend`. See docs/order.md."""

    path: str | None = None
    """A folder that `sparse-gpt prepare` wrote."""
    blend: dict[str, Source] | None = Field(None, min_length=1)
    """Several such folders, each with its weight."""
    max_epochs: float | None = Field(None, gt=0)
    """A run that would read a source more often is refused; null: no limit."""
    allow_change: bool = False
    """Go on with other data than the run began with."""

    _one = _exactly_one("path", "blend")


class BatchConfig(Section):
    """What one optimizer step takes."""

    global_tokens: int = Field(gt=0, le=10**12)
    """Tokens of one optimizer step, over all ranks; whole sequences of `model.max_seq_len`."""
    micro_batch: int = Field(gt=0, le=10_000_000)
    """Sequences that a rank holds at a time; what is left of its share is accumulated."""


class DurationConfig(Section):
    """How long to train: exactly one of the four."""

    steps: int | None = Field(None, gt=0, le=10**12)
    """Optimizer steps."""
    tokens: int | None = Field(None, gt=0)
    """Training tokens; the last step is whole."""
    flops: float | None = Field(None, gt=0)
    """Training FLOPs of the whole run, logits included; the last step is whole."""

    epochs: float | None = Field(None, gt=0, le=10**6)
    """How often all of `data.path` is read, as far as whole steps go."""

    _one = _exactly_one("steps", "tokens", "flops", "epochs")


class OptimizerConfig(Section):
    """AdamW (Loshchilov & Hutter 2019), decay on matrices only."""

    lr: float = Field(gt=0)
    """Peak learning rate."""
    width_transfer: bool = False
    """muP: `lr` is that of `d_model` 128; weights of another width get what trains them alike."""
    betas: Annotated[tuple[Probability, Probability], Strict(False)] = (0.9, 0.95)
    """Decay, a step, of the running means of the gradient and of its square."""
    eps: float = Field(1e-8, gt=0)
    """Added to the root of that square."""
    weight_decay: float = Field(0.1, ge=0)
    """This, times the learning rate, is the share that a step takes off each weight of a matrix."""
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0: no clipping."""


class ScheduleConfig(Section):
    """Learning rate over the steps."""

    kind: Literal["cosine", "wsd", "linear"] = "cosine"
    """Shape of the fall; `wsd` is constant until it cools down."""
    warmup_steps: int = Field(0, ge=0)
    """Steps of a linear rise to the peak."""
    decay_fraction: float = Field(0.2, gt=0, le=1)
    """The last part of a `wsd` run's steps, where it cools down."""
    final_lr_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the end over the peak."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept, see docs/resume.md."""

    every: int = Field(1000, gt=0)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int = Field(2, gt=0)
    """So many of the newest are kept."""
    keep_every: int | None = Field(None, gt=0)
    """Steps; checkpoints at its multiples are kept for good."""
    at: Annotated[tuple[int, ...], Strict(False)] = ()
    """Further steps to save, kept for good."""


class TraceConfig(Section):
    """Steps to trace, see docs/logging.md."""

    at: int = Field(gt=0)
    """The first of them, as the log counts."""
    steps: int = Field(1, gt=0, le=100)
    """How many."""


class LogConfig(Section):
    """What `metrics.jsonl`, TensorBoard and other trackers get, see docs/logging.md."""

    every: int = Field(1, gt=0)
    """Steps from one line to the next."""
    profile_every: int = Field(100, gt=0)
    """Steps from one sample of `time/` and `sparsity/` to the next."""
    batch_hash: bool = False
    """Log `data/batch_hash`, of a step's token ids: the same on any ranks."""
    trackers: Annotated[tuple[Literal["wandb", "mlflow", "csv"], ...], Strict(False)] = ()
    """Beside TensorBoard; they get a row once a checkpoint keeps its step."""
    trace: TraceConfig | None = None
    """Profile some steps, for TensorBoard and Perfetto."""


class EvalConfig(Section):
    """Validation on what the data hold out."""

    every: int = Field(500, gt=0)
    """Steps from one to the next; there is one before the first step and after the last."""
    max_tokens: int | None = Field(None, gt=0)
    """Tokens of each source's held-out split; null: all."""


class ParallelConfig(Section):
    """What ranks share besides the batch, see docs/scaling-out.md."""

    blocks: Annotated[int, Field(gt=0)] | Literal["auto"] = 1
    """Ranks over which the blocks of each dictionary are shared: each holds its share of them, and
    tokens travel. `auto`: what `sparse-gpt plan` finds fastest of what fits."""


class FaultConfig(Section):
    """When a rank counts as lost, see docs/multi-node.md."""

    timeout_seconds: float = Field(600, gt=0, le=1e6)
    """Seconds; the silence of one rank for as long ends the run."""


class GuardConfig(Section):
    """What is done about bad steps, see docs/faults.md. NaN and Inf are always skipped."""

    spike: Literal["ignore", "skip", "rollback"] = "ignore"
    """At a loss or gradient norm far above those before: `skip` leaves the step out, `rollback`
    also goes back to the newest checkpoint and on with the data that follow the bad step's."""
    threshold: float = Field(6.0, gt=0)
    """A spike is so many standard deviations above the mean of the window."""
    window: int = Field(100, gt=1)
    """The last so many good steps; before there are as many, there is no spike."""
    stop_after: int = Field(5, gt=0)
    """So many bad steps in a row end the run; the last goes to `incidents/`."""
    checksum_every: int = Field(0, ge=0)
    """Steps between comparisons of the ranks' weights; 0: none."""


class RunConfig(Section):
    """Everything about a run; the same config gives the same losses."""

    run_dir: str
    """Folder of the run; `runs/` and the file's name where none is given."""
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    duration: DurationConfig
    optimizer: OptimizerConfig
    schedule: ScheduleConfig = ScheduleConfig()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Of weights and activations; the optimizer's copy of the weights is always fp32."""
    compile: bool = False
    """`torch.compile` each block: equal but for rounding and dropout's draws."""
    activation_checkpointing: Literal["none", "selective", "full"] = "none"
    """What the backward computes again to save memory: nothing, each block's FFN, each block."""
    start_from: str | None = None
    """Whose weights the run begins with: RUN (its newest whole checkpoint), RUN@STEP, or the
    folder of a GPT-2 of transformers. The optimizer is new and the first step is 0; sparse FFNs are
    fitted to dense ones. null: new weights."""
    parallel: ParallelConfig = ParallelConfig()
    deepspeed: dict[str, Any] = Field({})
    """Native DeepSpeed keys, merged last; what contradicts the run is refused."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    eval: EvalConfig = EvalConfig()
    fault: FaultConfig = FaultConfig()
    guard: GuardConfig = GuardConfig()
    seed: int = Field(0, ge=0, lt=2**43)
    """Of the initial weights, the order of the data and dropout."""

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
    def _epochs_of_one(self) -> "RunConfig":
        if self.duration.epochs is not None and self.data.path is None:
            raise ValueError(
                "duration.epochs: of which source of data.blend? give tokens or steps, and "
                "data.max_epochs, which no source passes"
            )
        return self

    @model_validator(mode="after")
    def _transfers(self) -> "RunConfig":
        if self.optimizer.width_transfer:
            from sparse_gpt.model.width import check_transfers

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

    @property
    def dictionary(self) -> DictionaryConfig | None:
        """Of each FFN; None where the model's have none."""
        spectral = getattr(self.model.ffn, "spectral", None)
        return spectral if isinstance(spectral, DictionaryConfig) else None

    def shareable(self, world_size: int) -> list[int]:
        """Over how many of `world_size` ranks the blocks of a dictionary can be, rising from 1."""
        most = math.gcd(self.dictionary.blocks, world_size) if self.dictionary else 1
        return [n for n in range(1, most + 1) if most % n == 0]

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the whole run. Raises DataError where epochs are asked for of data
        that are not there."""
        duration, per_step = self.duration, self.batch.global_tokens
        if duration.steps is not None:
            return duration.steps
        if duration.tokens is not None:
            return math.ceil(duration.tokens / per_step)
        if duration.epochs is not None:
            from sparse_gpt.data import open_shards
            from sparse_gpt.data.batches.batches import count_windows

            assert self.data.path is not None
            windows = count_windows(open_shards(self.data.path).train, self.model.max_seq_len)
            return max(1, int(duration.epochs * windows / self.global_batch))
        assert duration.flops is not None
        from sparse_gpt.model.costs import model_report  # builds the model's shape, with torch

        report = model_report(self.model)
        return math.ceil(duration.flops / (report.training / report.seq * per_step))


def some(values: list[int]) -> str:
    """The values as text, without the middle of a long list."""
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:6], "…", *texts[-6:]])
