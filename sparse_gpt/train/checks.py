"""Whether a run can be. The command line, `--dry-run` and each rank call `check`; what only the
ranks together can know is in preflight.py."""

import os
import shutil
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig, some
from sparse_gpt.data import Blend
from sparse_gpt.data.batches.batches import count_windows
from sparse_gpt.data.batches.order import blend_counts
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.attention import has_flex
from sparse_gpt.train.deepspeed_config import (
    check_whole,
    deepspeed_config,
    native_settings,
    own_settings,
)
from sparse_gpt.train.feed import held_out, open_data, train_batches
from sparse_gpt.train.run_dir import MAY_CHANGE, read_provenance, what_computes
from sparse_gpt.train.start_from import check_start
from sparse_gpt.train.trackers.follow import check_trackers

_LARGEST_BUCKET = 10**11
_MONITORS = {  # DeepSpeed's own, which know nothing of resumes
    "comet": "there is no tracker of Comet; `log.trackers` of the run has wandb, mlflow and csv",
    "csv_monitor": "set `log.trackers: [csv]` of the run instead",
    "tensorboard": "each run writes it, and `log.trackers` adds wandb, mlflow and csv",
    "wandb": "set `log.trackers: [wandb]` of the run instead",
}
_OFFLOADS = ("offload_optimizer", "offload_param")


def check(config: RunConfig, world_size: int, here: bool = True) -> Blend:
    """Everything that can be known to be wrong before a process group or a folder exists; the data.

    here: whether the ranks run on machines like this one, not from a login node on others. Raises
    ConfigError or DataError.
    """
    check_settings(config, world_size)
    if here:
        check_machine(config)
    blend = open_data(config.data)
    check_data(config, blend, world_size)
    check_run_dir(config, blend)
    check_start(config, blend.vocab_hash)
    return blend


def check_settings(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError for settings that cannot be together, whatever the data and the machine:
    a batch that ranks cannot share, what DeepSpeed would ignore, override or do wrongly."""
    for key in config.deepspeed:
        if key in ("optimizer", "scheduler", "compile", "checkpoint", "activation_checkpointing"):
            ours = "schedule" if key == "scheduler" else key
            raise ConfigError(f"deepspeed.{key}: is the run's own; set `{ours}` of the run instead")
        if key in _MONITORS:
            raise ConfigError(f"deepspeed.{key}: is not used: {_MONITORS[key]}")
    if trace := config.log.trace:
        last, steps = trace.at + trace.steps - 1, config.total_steps
        if last > steps:
            raise ConfigError(f"log.trace: step {last} is past the {steps} of the run")
    native = native_settings(config)
    _check_own(native, own_settings(config, world_size))
    for section, key in (
        ("zero_optimization", "compute_grad_norm"),
        ("bf16", "check_grad_overflow"),
    ):
        if not native.get(section, {}).get(key, True):
            raise ConfigError(
                f"deepspeed.{section}.{key}: false would let NaN into the weights; leave it out"
            )
    zero = deepspeed_config(config, world_size)["zero_optimization"]
    _check_parallel(config, world_size, zero)
    if zero["stage"] == 3 and config.guard.checksum_every:
        raise ConfigError(
            "guard.checksum_every: ZeRO-3 keeps one copy of the weights, so there are no replicas "
            "to compare; use 0, or deepspeed.zero_optimization.stage: 2"
        )
    if zero["stage"] == 3 and config.compile:
        raise ConfigError(
            "compile: ZeRO-3 gathers the weights of each part in hooks that a compiled block "
            "cannot run; use deepspeed.zero_optimization.stage: 2, or compile: false"
        )
    if (bucket := zero.get("reduce_bucket_size", 0)) > _LARGEST_BUCKET:
        raise ConfigError(
            f"deepspeed.zero_optimization.reduce_bucket_size: {bucket} elements are allocated, "
            "and no device holds them; the model's parameters are enough"
        )
    for part in _OFFLOADS:
        device = (zero.get(part) or {}).get("device", "none")
        if device not in ("none", "cpu"):
            raise ConfigError(
                f"deepspeed.zero_optimization.{part}.device: {device} has not been "
                "tried with exact resume; use cpu"
            )
    if config.compile and config.activation_checkpointing == "selective":
        raise ConfigError(
            "activation_checkpointing: selective recomputes inside a block, which compile makes "
            "one piece; use full, or compile: false"
        )
    if zero["stage"] == 0 and config.precision != "fp32":
        # DeepSpeed 0.19.8 takes a phantom AdamW step at initialisation in this combination.
        raise ConfigError(
            f"deepspeed.zero_optimization.stage: 0 trains wrongly in {config.precision}; use 1"
        )
    check_whole(config, world_size)


def _check_parallel(config: RunConfig, world_size: int, zero: Mapping[str, Any]) -> None:
    """Raises ConfigError where blocks cannot be shared as the run says."""
    ranks = config.parallel.blocks
    if ranks == 1:
        return
    if ranks == "auto":
        raise ConfigError(
            "parallel.blocks: auto is chosen by sparse-gpt train before it starts ranks; here give "
            "the number, which sparse-gpt plan tells"
        )
    if config.dictionary is None:
        raise ConfigError(
            f"parallel.blocks: {ranks}, but this model's FFN has no blocks to share (the preset "
            "`default` has); use 1"
        )
    for what, number in (
        ("blocks of a dictionary", config.dictionary.blocks),
        ("ranks", world_size),
    ):
        if number % ranks:
            raise ConfigError(
                f"parallel.blocks: {ranks} does not divide the {number} {what}; possible: "
                f"{some(config.shareable(world_size))}"
            )
    if zero["stage"] == 3:
        raise ConfigError(
            "parallel.blocks: DeepSpeed's ZeRO-3 does not take layers that are shared already; use "
            "deepspeed.zero_optimization.stage: 1 or 2, where each rank then holds "
            f"1/{ranks} of the blocks, or parallel.blocks: 1"
        )
    for key in ("contiguous_gradients", "reduce_scatter"):
        if zero["stage"] and not zero.get(key, True):
            raise ConfigError(
                f"deepspeed.zero_optimization.{key}: false does not go with parallel.blocks; leave "
                "it out"
            )


def _check_own(native: Mapping[str, Any], run: Mapping[str, Any]) -> None:
    """Raises ConfigError where a native key contradicts what follows from the run."""
    for key in native.keys() & run.keys():
        value, own = native[key], run[key]
        pairs = value.items() if isinstance(value, Mapping) else [(None, value)]
        for name, given in pairs:
            expected = own if name is None else own.get(name, given)
            if given != expected:
                where = f"deepspeed.{key}" + (f".{name}" if name else "")
                raise ConfigError(f"{where}: {given!r} contradicts the run, which has {expected!r}")


def check_machine(config: RunConfig) -> None:
    """Raises ConfigError for what the devices, compilers and packages of this machine cannot do."""
    check_compiler(config)
    check_trackers(config.log)
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ConfigError("precision: fp16 needs a GPU; on the CPU use fp32 or bf16")


def check_data(config: RunConfig, blend: Blend, world_size: int) -> None:
    """Raises ConfigError or DataError if the data are not for this model, or too few."""
    if config.model.vocab_size != blend.vocab_size:
        raise ConfigError(
            f"model.vocab_size: {config.model.vocab_size} is not the {blend.vocab_size} of the "
            f"vocabulary that {blend.sources[0].folder} was made with; set it to that"
        )
    train_batches(config, blend, world_size)
    check_epochs(config, blend)
    for source in blend.sources:
        if source.dataset.held_out.n_tokens:
            held_out(config, source.dataset.held_out, world_size)


def check_epochs(config: RunConfig, blend: Blend) -> None:
    """Raises ConfigError if the run would read a source more often than its `max_epochs`."""
    given = config.data.blend or {}
    seq_len, quotas = config.model.max_seq_len, blend.quotas
    windows = [count_windows(source.dataset.train, seq_len) for source in blend.sources]
    own = [given[source.folder].max_epochs if given else None for source in blend.sources]
    caps = [epochs or config.data.max_epochs for epochs in own]
    if not any(caps):
        return
    steps = config.total_steps

    def read(source: int, after: int) -> int:
        return int(blend_counts(after * config.global_batch, quotas, config.seed)[source])

    fits = [steps] * len(caps)  # so many steps of the run does each source last for
    for number, cap in enumerate(caps):
        if cap:
            limit = int(cap * windows[number])
            fits[number] = bisect_right(range(1, steps + 1), limit, key=partial(read, number))
    fit = min(fits)
    if fit == steps:
        return
    scarce = fits.index(fit)
    folder, smaller = blend.sources[scarce].folder, ""
    if len(given) > 1 and fit:
        share = fit / steps * quotas[scarce] / quotas.sum()
        others = sum(source.weight for path, source in given.items() if path != folder)
        smaller = f", or {steps:,} with a weight under {others * share / (1 - share):.3g}"
    raise ConfigError(
        f"data: {folder} would be read {read(scarce, steps) / windows[scarce]:.2f} times in "
        f"{steps:,} steps, above its max_epochs of {caps[scarce]:g}; {fit:,} steps "
        f"({fit * config.batch.global_tokens:,} tokens) are possible{smaller}"
    )


def check_compiler(config: RunConfig) -> None:
    """Raises ConfigError where what is compiled would fail at the first step, or silently not be.

    Blocks are with `compile`, FlexAttention always.
    """
    cuda = torch.cuda.is_available()
    flex = cuda and config.model.document_mask and has_flex("cuda", config.model)
    if not config.compile and not flex:
        return
    key = "compile" if config.compile else "model.document_mask"
    if os.environ.get("TORCHDYNAMO_DISABLE") == "1":
        raise ConfigError(f"{key}: the environment has TORCHDYNAMO_DISABLE=1; unset it")
    variable, usual = ("CC", ("gcc", "clang")) if cuda else ("CXX", ("g++",))
    names = [os.environ[variable]] if variable in os.environ else usual
    if not any(map(shutil.which, names)):
        raise ConfigError(
            f"{key}: there is no compiler {' or '.join(names)}; install it, or set {variable}"
        )


def _differences(key: str, before: Any, now: Any) -> Iterator[str]:
    """What differs of a section, key by key, with both values."""
    if isinstance(before, Mapping) and isinstance(now, Mapping):
        for name in {**before, **now}:
            yield from _differences(f"{key}.{name}", before.get(name), now.get(name))
    elif before != now:
        key = "batch.global_tokens" if key == "batch" else key
        yield f"{key} was {before} and is {now}"


def check_run_dir(config: RunConfig, blend: Blend) -> None:
    """Raises ConfigError if `run_dir` holds a run of another configuration or other data.

    Other data of the same vocabulary pass with `data.allow_change`.
    """
    folder = Path(config.run_dir)
    saved = folder / "config.yaml"
    if not saved.exists():
        return
    before, now = (what_computes(run) for run in (load_config(saved), config))
    changed = [key for key in now if before[key] != now[key] and key not in MAY_CHANGE]
    if changed:
        pairs = [pair for key in changed for pair in _differences(key, before[key], now[key])]
        raise ConfigError(
            f"{saved}: holds another run: {', '.join(pairs)}; choose another run_dir, with "
            f"start_from={folder} to begin with its weights"
        )
    record, what = read_provenance(folder), config.data.path or "the blend"
    if record.get("vocab_hash") not in (None, blend.vocab_hash):  # None: of an older version
        raise ConfigError(
            f"data: {what} has another vocabulary than {folder} was trained with: the same ids "
            "are other text; choose another run_dir, or prepare the data with that vocabulary"
        )
    if record["data_manifest_hash"] != blend.hash and not config.data.allow_change:
        raise ConfigError(
            f"data: {what} is not the data that {folder} was trained on (manifest "
            f"{record['data_manifest_hash'][:12]}…, now {blend.hash[:12]}…); choose another "
            f"run_dir with start_from={folder}, give the data of before, or set "
            "data.allow_change=true to go on with these"
        )
