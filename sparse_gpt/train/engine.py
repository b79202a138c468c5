"""RunConfig -> DeepSpeed's configuration -> engine, and one optimizer step on it.

What DeepSpeed would leave to chance is set here (fp32 gradient accumulation, the optimizer itself);
what it would silently ignore or override is refused.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from sparse_gpt.config.schema import OptimizerConfig, RunConfig
from sparse_gpt.data import Batch
from sparse_gpt.model.ffn import UltraEfficientSparseFFN
from sparse_gpt.model.gpt import GPT
from sparse_gpt.model.width import lr_multipliers, transfer_width
from sparse_gpt.train.deepspeed_config import deepspeed_config, import_deepspeed
from sparse_gpt.train.distributed import World
from sparse_gpt.train.guard import Guard
from sparse_gpt.train.schedule import learning_rate
from sparse_gpt.train.statistics import RunningStatistics

if TYPE_CHECKING:  # loads DeepSpeed
    from sparse_gpt.train.exchange import Traffic


class Engine:
    """A model under DeepSpeed with its optimizer: takes steps, knows their learning rate.

    new: whether the model's weights are new, so that `width_transfer` scales them.
    """

    def __init__(
        self, config: RunConfig, model: GPT, world: World, total_steps: int, new: bool = True
    ) -> None:
        deepspeed = import_deepspeed()
        if world.device.type == "cpu":
            # Its all-reduce in shared memory is compiled at the first launch (a minute), under a
            # lock file that a kill leaves behind and every later launch waits for. gloo does it.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        self.config, self.world, self.total_steps = config, world, total_steps
        # ZeRO-3 gathers the weights of a sparse FFN's many small parts at once.
        whole = [m for m in model.modules() if isinstance(m, UltraEfficientSparseFFN)]
        if whole:
            deepspeed.utils.set_z3_leaf_modules(model, [UltraEfficientSparseFFN])
        saved = model.state_dict().keys()
        if config.optimizer.width_transfer and new:
            transfer_width(model)
        model.recompute(config.activation_checkpointing)
        self.traffic: Traffic | None = None
        ranks = config.parallel.blocks
        if isinstance(ranks, int) and ranks > 1:
            from sparse_gpt.train.exchange import optimizer_groups, share_blocks

            self.traffic = share_blocks(model, ranks, world)
        groups = parameter_groups(model, config.optimizer)
        if self.traffic:
            groups = optimizer_groups(groups)
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.optimizer.lr,
            betas=config.optimizer.betas,
            eps=config.optimizer.eps,
            fused=True,
        )
        native = deepspeed_config(config, world.size)
        with contextlib.redirect_stdout(io.StringIO()):  # every rank would print what it compiled
            self.deepspeed, *_ = deepspeed.initialize(
                model=model, optimizer=optimizer, config=native
            )
        self.module: nn.Module = self.deepspeed.module
        if config.compile:
            for block in self.module.get_submodule("blocks").children():
                # In place, so parameters keep their names. Blocks are alike and share the code;
                # every batch has the same shape.
                block.compile(dynamic=False)
        # Buffers that are saved. (DeepSpeed has moved them only now.)
        self.statistics = RunningStatistics(self.module, saved, world)
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
        self.statistics.begin()
        if self.traffic:
            self.traffic.begin()
        for micro_batch in micro_batches:
            micro_loss = self.deepspeed(*micro_batch)
            self.deepspeed.backward(micro_loss)
            loss += micro_loss.detach()
            if self.deepspeed.is_gradient_accumulation_boundary():
                loss = self.world.mean(loss / len(micro_batches))
                self.guard.before_update(loss, step)
            self.deepspeed.step()
        applied = self.guard.after_update(step)
        self.statistics.end(applied)
        return loss, lr, self.guard.norm

    def evaluate(self, batches: Iterable[Batch]) -> float:
        """Mean loss a target over all ranks' batches, padding left out.

        Every rank must bring the same number of batches (ZeRO-3 gathers weights in each).
        """
        self.deepspeed.eval()
        total = summed_loss(self.deepspeed, batches, self.world.device)
        self.deepspeed.train()
        loss_sum, count = self.world.sum(total).tolist()
        return float(loss_sum / count)

    def exchanged(self) -> dict[str, float]:
        """`perf/exchange_ms` and `perf/exchange_bytes`: of the last step's rows on their way to
        blocks and back, the mean of all ranks; nothing where blocks are not shared. Collective.
        Waits for the device."""
        if self.traffic is None:
            return {}
        own = torch.tensor(
            [self.traffic.milliseconds, self.traffic.bytes],
            dtype=torch.float64,
            device=self.world.device,
        )
        milliseconds, sent = self.world.mean(own).tolist()
        return {"perf/exchange_ms": milliseconds, "perf/exchange_bytes": sent}

    def statistics_and_scale(self) -> dict[str, dict[str, Any]]:
        """A copy of what a checkpoint holds once: running statistics, and fp16's loss scale."""
        scaler = vars(self.deepspeed.optimizer.loss_scaler) if self._scales_loss else {}
        numbers = {key: value for key, value in scaler.items() if isinstance(value, int | float)}
        return {"statistics": self.statistics.copies(), "loss_scale": numbers}

    def set_statistics_and_scale(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Take over what `statistics_and_scale` copied. Raises KeyError for another model's."""
        self.statistics.load(saved["statistics"])
        if self._scales_loss:
            vars(self.deepspeed.optimizer.loss_scaler).update(saved["loss_scale"])

    @property
    def _scales_loss(self) -> bool:
        return self.config.precision == "fp16"


def new_model(config: RunConfig, world: World) -> GPT:
    """A model with new weights; where blocks are shared, with this rank's of each dictionary."""
    ranks = config.parallel.blocks
    if not isinstance(ranks, int) or ranks == 1:
        return GPT(config.model)
    import_deepspeed()
    from sparse_gpt.train.exchange import sharing

    with sharing(ranks, world):
        return GPT(config.model)


@torch.no_grad()
def summed_loss(
    model: Callable[..., torch.Tensor], batches: Iterable[Batch], device: torch.device
) -> torch.Tensor:
    """The loss of a model's targets, summed, and how many they are, float64 `(2,)` on `device`."""
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch in batches:
        batch = batch.to(device)
        count = (batch.targets != -100).sum()
        loss = model(batch.tokens, batch.targets, batch.documents)
        # A batch that is all padding has no mean.
        total += torch.stack((torch.where(count > 0, loss * count, 0), count))
    return total


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
