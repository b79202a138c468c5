"""RunConfig -> DeepSpeed's configuration -> engine, and one optimizer step on it.

What DeepSpeed would leave to chance is set here (fp32 gradient accumulation, the optimizer itself);
what it would silently ignore or override is refused.
"""

import contextlib
import difflib
import io
import os
import shutil
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import ValidationError
from torch import nn

from data import Batch
from launch.config import OptimizerConfig, RunConfig
from launch.errors import ConfigError
from launch.guard import Guard
from launch.schedule import learning_rate
from launch.world import World
from sparse_gpt import GPT, UltraEfficientSparseFFN
from sparse_gpt.attention import has_flex
from sparse_gpt.config import merge
from sparse_gpt.width import lr_multipliers, transfer_width

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


class Engine:
    """A new model under DeepSpeed with its optimizer: takes steps, knows their learning rate."""

    def __init__(self, config: RunConfig, model: GPT, world: World, total_steps: int) -> None:
        if world.device.type == "cpu":
            os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed looks for others
        import deepspeed
        from deepspeed.utils import logger

        logger.setLevel("ERROR")
        if world.device.type == "cpu":
            # Its all-reduce in shared memory is compiled at the first launch (a minute), under a
            # lock file that a kill leaves behind and every later launch waits for. gloo does it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.world, self.total_steps = config, world, total_steps
        # A fused FFN reads the weights of its parts itself: ZeRO-3 must gather them as a whole.
        whole = [m for m in model.modules() if isinstance(m, UltraEfficientSparseFFN)]
        if whole:
            deepspeed.utils.set_z3_leaf_modules(model, [UltraEfficientSparseFFN])
        saved = model.state_dict().keys()
        if config.optimizer.width_transfer:
            transfer_width(model)
        model.recompute(config.activation_checkpointing)
        groups = parameter_groups(model, config.optimizer)
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        native = deepspeed_config(config, world.size)
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print what it compiled
            try:
                self.deepspeed, *_ = deepspeed.initialize(
                    model=model, optimizer=optimizer, config=native
                )
            except ValidationError as error:
                first = error.errors()[0]
                key = ".".join(map(str, first["loc"]))
                raise ConfigError(f"deepspeed: DeepSpeed refuses {key!r}: {first['msg']}") from None
        self.module: nn.Module = self.deepspeed.module
        if config.compile:
            for block in self.module.get_submodule("blocks").children():
                # In place, so parameters keep their names. Blocks are alike and share the code;
                # every batch has the same shape.
                block.compile(dynamic=False)
        # Buffers that are saved: running scalars. (DeepSpeed has moved them only now.)
        self.statistics = {name: b for name, b in self.module.named_buffers() if name in saved}
        self.guard = Guard(config.guard, world, self.deepspeed)

    def step(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor,
        step: int,
        documents: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, float, torch.Tensor]:
        """The update that follows `step` completed ones, on this rank's share of a global batch.

        tokens, targets: `(global_batch / world_size, seq)` int64, on the device, and with
        `model.document_mask` the documents that they are of. Returns the mean loss of all ranks
        (float32 scalar, on the device), the schedule's learning rate, and the gradient norm over
        all ranks before clipping. `guard` knows whether the update was made. Raises RunStopped if
        the ranks' weights were compared and differ.
        """
        lr = learning_rate(step, self.total_steps, self.config.optimizer.lr, self.config.schedule)
        for group in self.deepspeed.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        size = self.config.batch.micro_batch
        parts = [tokens, targets] if documents is None else [tokens, targets, documents]
        micro_batches = list(zip(*(part.split(size) for part in parts), strict=True))
        loss = torch.zeros((), device=self.world.device)
        statistics = list(self.statistics.values())
        before = torch.stack(statistics) if statistics else None
        for micro_batch in micro_batches:
            micro_loss = self.deepspeed(*micro_batch)
            self.deepspeed.backward(micro_loss)
            loss += micro_loss.detach()
            if self.deepspeed.is_gradient_accumulation_boundary():
                loss = self.world.mean(loss / len(micro_batches))
                self.guard.before_update(loss, step)
            self.deepspeed.step()
        applied = self.guard.after_update(step)
        if before is not None:  # each rank saw other tokens, and a checkpoint holds one copy
            now = self.world.mean(torch.stack(statistics)) if applied else before
            torch._foreach_copy_(statistics, list(now.unbind()))
        return loss, lr, self.guard.norm

    @torch.no_grad()
    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss a target over all ranks' batches, padding left out.

        Every rank must bring the same number of batches (ZeRO-3 gathers weights in each).
        """
        self.deepspeed.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        for batch in batches:
            batch = batch.to(self.world.device)
            count = (batch.targets != -100).sum()
            loss = self.deepspeed(batch.tokens, batch.targets, batch.documents)
            # A batch that is all padding has no mean.
            total += torch.stack((torch.where(count > 0, loss * count, 0), count))
        self.deepspeed.train()
        loss_sum, count = self.world.sum(total).tolist()
        return loss_sum / count

    def statistics_and_scale(self) -> dict[str, dict[str, Any]]:
        """A copy of what a checkpoint holds once: running scalars, and fp16's loss scale."""
        scaler = vars(self.deepspeed.optimizer.loss_scaler) if self._scales_loss else {}
        numbers = {key: value for key, value in scaler.items() if isinstance(value, int | float)}
        copies = {name: b.to("cpu", copy=True) for name, b in self.statistics.items()}
        return {"statistics": copies, "loss_scale": numbers}

    @torch.no_grad()
    def set_statistics_and_scale(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `statistics_and_scale` copied. Raises KeyError for another model's."""
        for name, buffer in self.statistics.items():
            buffer.copy_(saved["statistics"][name])
        if self._scales_loss:
            vars(self.deepspeed.optimizer.loss_scaler).update(saved["loss_scale"])

    @property
    def _scales_loss(self) -> bool:
        return self.config.precision == "fp16"


def parameter_groups(model: GPT, settings: OptimizerConfig) -> list[dict[str, Any]]:
    """Matrices with decay; norms, gains and biases without (as GPT-2's and GPT-3's recipes do).

    Each group has an `lr_multiplier`, 1 unless `width_transfer` is on: its learning rate is that
    multiple of the schedule's. AdamW decays by lr · weight_decay a step; dividing the decay by the
    multiplier keeps that equal over widths, as the optimizer of Yang et al. does (MuAdamW of
    microsoft/mup). Transfer was found to need it (Kosson et al. 2025, arXiv 2510.19093).
    """
    multipliers = lr_multipliers(model) if settings.width_transfer else {}
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        groups.setdefault((p.dim() >= 2, multipliers.get(name, 1.0)), []).append(p)
    return [
        {
            "params": groups[matrices, multiplier],
            "weight_decay": settings.weight_decay / multiplier if matrices else 0.0,
            "lr_multiplier": multiplier,
        }
        for matrices, multiplier in sorted(groups, reverse=True)
    ]
