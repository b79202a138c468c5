"""RunConfig to the JSON that `deepspeed.initialize` gets.

What DeepSpeed would leave to chance is set here: fp32 gradient accumulation, the optimizer itself.
"""

from typing import Any

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.config import merge

# DeepSpeed ignores an unknown key at the top level, so a typing error would train another run.
NATIVE_KEYS = {
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


def own_settings(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The DeepSpeed settings that follow from the run; a native key may only repeat them.

    Raises ConfigError if `world_size` ranks cannot share a batch.
    """
    return {
        "train_batch_size": config.global_batch,
        "train_micro_batch_size_per_gpu": config.batch.micro_batch,
        "gradient_accumulation_steps": config.grad_accum(world_size),
        "gradient_clipping": config.optimizer.grad_clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "fp16": {"enabled": config.precision == "fp16"},
    }


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The JSON that `deepspeed.initialize` gets: native keys over our defaults, the run's own over
    both. checks.py says which native keys may be."""
    defaults = {
        "zero_optimization": {"stage": 1},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,  # the run's own log says it better
        "zero_allow_untested_optimizer": True,
        # Offloaded too the optimizer stays torch's: DeepSpeed's own does not resume exactly.
        "zero_force_ds_cpu_optimizer": False,
    }
    return merge(merge(defaults, config.deepspeed), own_settings(config, world_size))
