"""RunConfig: one YAML file says everything about a run.

A file may inherit from another (`base: tiny-dense.yaml`, relative to it) and the command line may
override any key (`optimizer.lr=1e-3`). Whatever is wrong ends in one ConfigError naming the key.
"""

import difflib
import math
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    Strict,
    ValidationError,
    model_validator,
)

from launch.errors import ConfigError
from sparse_gpt import ModelConfig
from sparse_gpt.width import check_transfers


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
    """Learning rate over the steps, see `launch.schedule`."""

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
    """What `launch.guard` does about bad steps. NaN and Inf are always skipped."""

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
                f"{world_size} ranks cannot share equally; possible ranks: {_some(sizes)}"
            )
        local = total // world_size
        if local % micro:
            sizes = [m for m in range(1, local + 1) if local % m == 0]
            raise ConfigError(
                f"batch.micro_batch {micro} does not divide the {local} sequences that each of "
                f"{world_size} ranks takes a step; possible values: {_some(sizes)}"
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Read a run file, apply `key.sub=value` overrides and check everything.

    `run_dir` defaults to `runs/<name of the file>`. Raises ConfigError.
    """
    path = Path(path)
    return build_config(path, {"run_dir": f"runs/{path.stem}", **read_yaml(path)}, overrides)


def build_config(path: Path, tree: dict[str, Any], overrides: Sequence[str] = ()) -> RunConfig:
    """The run that `tree`, found in the file `path`, and the overrides on it describe.

    Raises ConfigError.
    """
    tree = _inherit(path, tree, seen=())
    for override in overrides:
        _apply(tree, override)
    try:
        return RunConfig(**tree)
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, RunConfig)}") from None


def to_yaml(config: RunConfig) -> str:
    """The resolved configuration, which `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


class _Loader(yaml.SafeLoader):
    """YAML in which 3e-4 is a number (YAML 1.1 wants 3.0e-4 and takes the rest for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def _parse(text: str) -> Any:
    return yaml.load(text, _Loader)  # a SafeLoader: plain data only


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds. Raises ConfigError."""
    try:
        tree = _parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give the path of a run file") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise ConfigError(f"{where}: is not YAML: {getattr(error, 'problem', error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds no `key: value` lines")
    return tree


def _inherit(path: Path, tree: dict[str, Any], seen: tuple[Path, ...]) -> dict[str, Any]:
    """`tree`, found in `path`, over the file that its `base` names."""
    if path.resolve() in seen:
        raise ConfigError(f"{path}: inherits from itself through `base`")
    if "base" not in tree:
        return dict(tree)
    base = path.parent / str(tree["base"])
    own = {key: value for key, value in tree.items() if key != "base"}
    return _merge(_inherit(base, read_yaml(base), (*seen, path.resolve())), own)


_DATA = {"path", "blend"}  # of the data section; one is given, whole, and replaces what was before


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping.

    A name where a mapping could stand is its preset (`ffn: paper` is `ffn: {preset: paper}`), so
    that one of its keys can be overridden.
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if key in ("model", "ffn") and isinstance(old, str):
            old = {"preset": old}
        # Of the duration's keys only one may stand: an inherited one must go.
        if isinstance(value, dict) and isinstance(old, dict) and key != "duration":
            if key == "data" and value.keys() & _DATA:
                old = {name: v for name, v in old.items() if name not in _DATA}
            value = _merge(old, value)
        merged[key] = value
    return merged


def _apply(tree: dict[str, Any], override: str) -> None:
    keys, equals, text = override.partition("=")
    if not equals or not all(keys.split(".")):
        raise ConfigError(f"'{override}': an override is written key=value or section.key=value")
    try:
        value = _parse(text)
    except yaml.YAMLError:
        raise ConfigError(f"'{override}': the value is not YAML; quote it") from None
    for key in reversed(keys.split(".")):
        value = {key: value}
    merged = _merge(tree, value)
    tree.clear()
    tree.update(merged)


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """The first complaint of pydantic as one line, with the nearest name for an unknown key."""
    errors = error.errors(include_url=False)
    first = errors[0]
    key = ".".join(str(part) for part in _path(root, first["loc"]))
    if first["type"] == "extra_forbidden":
        *section, name = _path(root, first["loc"])
        names = sorted(set(_field_names(root, section)))
        near = difflib.get_close_matches(str(name), names, n=1, cutoff=0.5)
        what = f"unknown key; did you mean '{near[0]}'?" if near else "unknown key"
        what += "" if near else f"; known here: {', '.join(names)}"
    elif first["type"] == "missing":
        what = "is missing"
    else:
        what = first["msg"].removeprefix("Value error, ")
        if first["type"] != "value_error":
            what = f"{what[0].lower()}{what[1:]}, got {first['input']!r}"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{key}: {what}{more}" if key else f"{what}{more}"


def _path(root: type[BaseModel], loc: tuple[int | str, ...]) -> list[int | str]:
    """The place of an error as its author wrote it: without pydantic's tags of union members."""
    path: list[int | str] = []
    for part in loc[:-1]:
        names = set(_field_names(root, path))
        if isinstance(part, int) or part in names or _ANY in names:
            path.append(part)
    return [*path, *loc[-1:]]


def _field_names(model: Any, section: Sequence[int | str]) -> Iterator[str]:
    """Names of the keys that may stand in `section`, a path below `model`; _ANY in a mapping."""
    for branch in _models(model):
        if typing.get_origin(branch) is dict:
            if not section:
                yield _ANY
            else:
                yield from _field_names(typing.get_args(branch)[1], section[1:])
        elif not section:
            yield from branch.model_fields
        elif section[0] in branch.model_fields:
            annotation = branch.model_fields[str(section[0])].annotation
            yield from _field_names(annotation, section[1:])


_ANY = "*"


def _models(annotation: Any) -> list[Any]:
    """The models and mappings among what an annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if typing.get_origin(annotation) is dict:
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, Annotated):
        return [model for arg in typing.get_args(annotation) for model in _models(arg)]
    return []


def _some(values: list[int]) -> str:
    """The values as text, without the middle of a long list."""
    texts = [str(value) for value in values]
    return ", ".join(texts if len(texts) <= 12 else [*texts[:6], "…", *texts[-6:]])
