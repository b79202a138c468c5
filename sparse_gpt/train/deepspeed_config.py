"""RunConfig to the JSON that `deepspeed.initialize` gets.

What DeepSpeed would leave to chance is set here (fp32 gradient accumulation, the optimizer itself);
what it would silently ignore or override is refused."""

import difflib
from collections.abc import Mapping
from typing import Any

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.config import merge

# DeepSpeed ignores an unknown key at the top level, so a typing error would train another run.
_NATIVE_KEYS = {
    "aio",
    "comms_logger",
    "communication_data_type",
    "data_types",
    "disable_allgather",
    "disable_python_gc",
    "dump_state",
    "flops_profiler",
    "gradient_allreduce_op",
    "gradient_predivide_factor",
    "log_level",
    "memory_breakdown",
    "prescale_gradients",
    "steps_per_print",
    "timers",
    "wall_clock_breakdown",
    "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer",
    "zero_optimization",
}


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The JSON that `deepspeed.initialize` gets: the run's own values with native keys over them.

    Raises ConfigError for a native key that DeepSpeed would ignore or that contradicts the run.
    """
    run: dict[str, Any] = {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": config.grad_accum(world_size),
        "gradient_clipping": config.optimizer.grad_clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }
    for key, value in config.deepspeed.items():
        _check_native(key, value, run)
    defaults = {
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,  # the run's own log says it better
        "zero_allow_untested_optimizer": True,
        # Offloaded too the optimizer stays torch's: DeepSpeed's own does not resume exactly.
        "zero_force_ds_cpu_optimizer": False,
    }
    merged = merge(merge(defaults, config.deepspeed), run)
    for section, key in (
        ("zero_optimization", "compute_grad_norm"),
        ("bf16", "check_grad_overflow"),
    ):
        if not config.deepspeed.get(section, {}).get(key, True):
            raise ConfigError(
                f"deepspeed.{section}.{key}: false would let NaN into the weights; leave it out"
            )
    if merged["zero_optimization"]["stage"] == 3 and config.guard.checksum_every:
        raise ConfigError(
            "guard.checksum_every: ZeRO-3 keeps one copy of the weights, so there are no replicas "
            "to compare; use 0, or deepspeed.zero_optimization.stage: 2"
        )
    if merged["zero_optimization"]["stage"] == 3 and config.compile:
        raise ConfigError(
            "compile: ZeRO-3 gathers the weights of each part in hooks that a compiled block "
            "cannot run; use deepspeed.zero_optimization.stage: 2, or compile: false"
        )
    for part in ("offload_optimizer", "offload_param"):
        offload = merged["zero_optimization"].get(part) or {}
        if offload.get("device", "none") not in ("none", "cpu"):
            raise ConfigError(
                f"deepspeed.zero_optimization.{part}.device: {offload['device']} has not been "
                "tried with exact resume; use cpu"
            )
    if config.compile and config.activation_checkpointing == "selective":
        raise ConfigError(
            "activation_checkpointing: selective recomputes inside a block, which compile makes "
            "one piece; use full, or compile: false"
        )
    if merged["zero_optimization"]["stage"] == 0 and config.precision != "fp32":
        # DeepSpeed 0.19.8 takes a phantom AdamW step at initialisation in this combination.
        raise ConfigError(
            f"deepspeed.zero_optimization.stage: 0 trains wrongly in {config.precision}; use 1"
        )
    return merged


def _check_native(key: str, value: Any, run: Mapping[str, Any]) -> None:
    if key in ("optimizer", "scheduler", "compile", "checkpoint", "activation_checkpointing"):
        ours = "schedule" if key == "scheduler" else key
        raise ConfigError(f"deepspeed.{key}: is the run's own; set `{ours}` of the run instead")
    if key in run:
        pairs = value.items() if isinstance(value, Mapping) else [(None, value)]
        for name, given in pairs:
            expected = run[key] if name is None else run[key].get(name, given)
            if given != expected:
                where = f"deepspeed.{key}" + (f".{name}" if name else "")
                raise ConfigError(f"{where}: {given!r} contradicts the run, which has {expected!r}")
    elif key not in _NATIVE_KEYS:
        near = difflib.get_close_matches(key, [*_NATIVE_KEYS, *run], n=1, cutoff=0.5)
        hint = f"; did you mean '{near[0]}'?" if near else ""
        raise ConfigError(f"deepspeed.{key}: is no key that DeepSpeed reads{hint}")
