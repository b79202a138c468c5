"""RunConfig to the JSON that `deepspeed.initialize` gets.

What DeepSpeed would leave to chance is set here: fp32 gradient accumulation, the optimizer itself.
Native keys are read by DeepSpeed's own classes before anything is judged or planned: it takes "3",
"off" and 1 for 3, false and true.
"""

import os
from functools import cache
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, BeforeValidator, Field, ValidationError, create_model

from sparse_gpt.config.explain import explain
from sparse_gpt.config.schema import RunConfig, Section
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.config import merge

DEFAULT_STAGE = 1


def import_deepspeed() -> Any:
    """DeepSpeed, which else tells what it finds, and on a CPU looks for other devices."""
    cpu = not torch.cuda.is_available() and "DS_ACCELERATOR" not in os.environ
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    try:
        import deepspeed
    finally:
        if cpu:  # a job that is started from here may run where there are GPUs
            del os.environ["DS_ACCELERATOR"]
    deepspeed.utils.logger.setLevel("ERROR")
    return deepspeed


@cache
def _native_form() -> type[BaseModel]:
    """The native keys there may be. DeepSpeed ignores others at the top level, so that a typing
    error would train another run, and takes what is not in a section of its own as it is: there
    "false" would be true."""
    import_deepspeed()
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.utils.config import DeepSpeedThroughputTimerConfig

    any_case = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)
    dtype, count = Literal["fp32", "fp16", "bf16"], Annotated[int, Field(gt=0)]
    return _form(
        aio=_form(
            block_size=count,
            queue_depth=count,
            intra_op_parallelism=count,
            single_submit=bool,
            overlap_events=bool,
            use_gds=bool,
        ),
        bf16=DeepSpeedBF16Config,
        comms_logger=CommsLoggerConfig,
        communication_data_type=Annotated[dtype, any_case],
        data_types=_form(
            grad_accum_dtype=dtype,
            param_dtype=dtype,
            buffer_dtype=dtype,
            keep_in_fp32_modules=Literal["auto"] | list[str],
        ),
        disable_allgather=bool,
        disable_python_gc=bool,
        dump_state=bool,
        flops_profiler=_form(
            enabled=bool,
            recompute_fwd_factor=float,
            profile_step=count,
            module_depth=int,
            top_modules=count,
            detailed=bool,
            output_file=str,
        ),
        fp16=DeepSpeedFP16Config,
        gradient_accumulation_steps=int,
        gradient_allreduce_op=Annotated[Literal["mean", "sum"], any_case],
        gradient_clipping=float,
        gradient_predivide_factor=Annotated[float, Field(gt=0)],
        log_level=Annotated[Literal["debug", "info", "warning", "error", "critical"], any_case],
        memory_breakdown=bool,
        prescale_gradients=bool,
        steps_per_print=count,
        timers=_form(throughput=DeepSpeedThroughputTimerConfig),
        train_batch_size=int,
        train_micro_batch_size_per_gpu=int,
        wall_clock_breakdown=bool,
        zero_allow_untested_optimizer=bool,
        zero_force_ds_cpu_optimizer=bool,
        zero_optimization=DeepSpeedZeroConfig,
    )


def _form(**keys: Any) -> type[BaseModel]:
    """A mapping that may have these keys, each of its type."""
    fields: dict[str, Any] = {key: (of_key, None) for key, of_key in keys.items()}
    return create_model("Native", __base__=Section, **fields)


def native_settings(config: RunConfig) -> dict[str, Any]:
    """The run's native keys as DeepSpeed reads them: "auto" is left out, as its own default. Raises
    ConfigError for what it does not read."""
    if not config.deepspeed:
        return {}
    given, zero = dict(config.deepspeed), config.deepspeed.get("zero_optimization")
    if isinstance(zero, dict):
        given["zero_optimization"] = {"stage": DEFAULT_STAGE, **zero}
    form = _native_form()
    try:
        read = form.model_validate(given)
    except ValidationError as error:
        raise ConfigError(f"deepspeed.{explain(error, form)}") from None
    native = read.model_dump(mode="json", exclude_unset=True, by_alias=True)
    if isinstance(zero, dict):
        section = native["zero_optimization"]
        section["stage"] = read.model_dump()["zero_optimization"]["stage"]
        if zero.get("overlap_comm", "auto") == "auto":
            del section["overlap_comm"]  # which follows from the stage
    return native


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
        "data_types": {"param_dtype": config.precision},
    }


def deepspeed_config(config: RunConfig, world_size: int) -> dict[str, Any]:
    """The JSON that `deepspeed.initialize` gets: native keys over our defaults, the run's own over
    both. checks.py says which native keys may be."""
    defaults = {
        "zero_optimization": {"stage": DEFAULT_STAGE},
        "data_types": {"grad_accum_dtype": "fp32"},
        "steps_per_print": 2**31,  # the run's own log says it better
        "zero_allow_untested_optimizer": True,
        # Offloaded too the optimizer stays torch's: DeepSpeed's own does not resume exactly.
        "zero_force_ds_cpu_optimizer": False,
    }
    return merge(merge(defaults, native_settings(config)), own_settings(config, world_size))


def check_whole(config: RunConfig, world_size: int) -> None:
    """Raises ConfigError for what DeepSpeed does not take together."""
    if not config.deepspeed:
        return
    import_deepspeed()
    from deepspeed.runtime.config import DeepSpeedConfig

    whole = deepspeed_config(config, world_size)
    of_one_rank = whole["train_batch_size"] // world_size  # there is no group yet
    try:
        DeepSpeedConfig({**whole, "train_batch_size": of_one_rank})
    except (ValueError, AssertionError) as error:
        raise ConfigError(f"deepspeed: DeepSpeed refuses it: {error}") from None
