"""Decides before every update whether it may happen: alike on all ranks, as they all see one loss
and one gradient norm.

A step whose loss or gradient is NaN or Inf changes nothing: not the weights, not the optimizer, not
the running statistics. By policy neither does a spike, a loss or a gradient norm far above those
of the last good steps. Skipped steps count as steps and have used their samples.

ZeRO-1 to 3 leave an update out where the gradient norm that they compute is Inf, and wait for the
device to know it; the guard adds Inf to that norm, and no further wait. With ZeRO-0 the update is
left out on the device, by the switch that torch's own loss scaling uses.
"""

import math
import socket
import statistics
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from sparse_gpt.config.schema import GuardConfig
from sparse_gpt.train.checkpoint.zero_state import Share
from sparse_gpt.train.distributed import World


class RunStopped(Exception):
    """The run must not go on; the message is one line for whoever runs it. All ranks raise it."""


class Guard:
    """Watches the steps of one DeepSpeed engine.

    skipped   steps without an update, over the whole run
    in_a_row  bad steps since the last good one; a step taken back by a rollback does not end it
    trouble   why the last step was skipped, None if it was applied
    spiked    whether that was for a spike
    norm      of the last step's gradient over all ranks before clipping, `()`, on the device
    """

    def __init__(self, config: GuardConfig, world: World, deepspeed: Any) -> None:
        self.config, self.world, self.deepspeed = config, world, deepspeed
        self.optimizer = deepspeed.optimizer
        self.skipped = self.in_a_row = 0
        self.trouble: str | None = None
        self.spiked = False
        self.loss = self.norm = torch.zeros((), device=world.device)
        self._last_bad = 0
        self._measured = (0.0, 0.0)
        self._window: deque[tuple[float, float]] = deque(maxlen=config.window)
        self._sharded = not isinstance(self.optimizer, torch.optim.Optimizer)
        if not self._sharded:
            deepspeed.clip_fp32_gradients = self._clip
        else:
            self._join_norm()
            self._scaler = getattr(self.optimizer, "loss_scaler", None)  # ZeRO-1 in bf16 has none
            self._scale = 1.0
            if self._scaler is not None and self._scaler.dynamic:
                self._scaler.raise_error_at_min_scale = False  # that is counted here

    def state(self) -> dict[str, Any]:
        """What a resumed run goes on with, as JSON holds it exactly."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "window": list(self._window),
        }

    def load(self, state: dict[str, Any]) -> None:
        """The inverse of `state`; a longer window than the configuration's loses its oldest."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]
        self._window.extend((loss, norm) for loss, norm in state["window"])

    def before_update(self, loss: torch.Tensor, step: int) -> None:
        """Called with the mean loss of all ranks, after the last backward pass of step `step`.

        Raises RunStopped if it is time to compare the replicas and they differ.
        """
        every = self.config.checksum_every
        if every and (step + 1) % every == 0:
            compare_replicas(self.deepspeed.module, self.world, step + 1)
        self.loss, self.spiked = loss, False
        self.norm = loss.new_tensor(math.inf)  # fp16 overflow: DeepSpeed then computes none
        if self._sharded:
            if self._scaler is not None:
                self._scale = self._scaler.loss_scale
        else:
            norm = gradient_norm(list(self.deepspeed.module.parameters()), self.world)
            bad = ~torch.isfinite(norm + self._penalty(self.world.mean(norm)))
            self.norm = norm
            self.optimizer.found_inf = bad.float()

    def after_update(self, step: int) -> bool:
        """Count step `step`; returns whether its update was made."""
        if self._sharded:
            applied = bool(self.deepspeed.was_step_applied())
        else:
            applied = not self.optimizer.found_inf.item()
        if applied:
            self.trouble = None
            if step >= self._last_bad:
                self.in_a_row = 0
            if self.config.spike != "ignore":
                self._window.append(self._measured)
            return True
        self.skipped += 1
        loss, norm = float(self.loss), float(self.norm)
        finite = math.isfinite(loss)
        if finite and self._sharded and self._overflow_is_usual():
            self.trouble = f"gradients overflow at loss scale {self._scale:.0f}"
            return False
        self.in_a_row, self._last_bad = self.in_a_row + 1, step
        kind = "spike" if self.spiked else "not finite"
        self.trouble = f"loss {loss:.4g}, gradient norm {norm:.4g}: {kind}"
        return False

    def _overflow_is_usual(self) -> bool:
        """In fp16 the scale is found by trying: an overflow lowers it, unless it is the lowest."""
        scaler = self._scaler
        if scaler is None or not scaler.dynamic:
            return False
        return not self.spiked and self._scale > scaler.min_scale

    def _join_norm(self) -> None:
        """Put the guard's penalty into the norm by which DeepSpeed decides."""
        optimizer = self.optimizer
        if hasattr(optimizer, "scaled_global_norm"):  # ZeRO-1 and 2
            scaled_norm = optimizer.scaled_global_norm

            def judged_norm() -> torch.Tensor:
                norm: torch.Tensor = scaled_norm()
                return norm + self._penalty(norm / self._scale)

            optimizer.scaled_global_norm = judged_norm
        elif hasattr(optimizer, "get_grads_for_norm"):  # ZeRO-1 in bf16
            from deepspeed.runtime.utils import get_global_norm_of_tensors
            from deepspeed.utils.groups import _get_expert_parallel_group

            grads_for_norm = optimizer.get_grads_for_norm

            def judged_grads(for_clipping: bool = False) -> Any:
                found = grads_for_norm(for_clipping)
                if for_clipping:
                    return found
                grads, of_shares = found
                # Its norm is hidden in its step: taken here once more. -1 stands for NaN and Inf.
                norms = [get_global_norm_of_tensors(grads)]
                for group, shares in of_shares.items():
                    among = _get_expert_parallel_group(group)
                    norms.append(get_global_norm_of_tensors(shares, moe_ep_group=among))
                found_norms = torch.stack(norms)
                norm = torch.where(found_norms < 0, torch.inf, found_norms).norm()
                return [*grads, self._penalty(norm).reshape(1)], of_shares

            optimizer.get_grads_for_norm = judged_grads
        else:
            from deepspeed.runtime.utils import combine_grad_norm_groups

            norms_of_groups = optimizer._get_norm_groups

            def judged_norms() -> list[torch.Tensor]:
                norms = norms_of_groups()
                penalty = self._penalty(combine_grad_norm_groups(norms) / self._scale)
                return [norm + penalty for norm in norms]

            optimizer._get_norm_groups = judged_norms

    def _clip(self) -> None:
        """ZeRO-0's clipping. DeepSpeed's own takes the mean of the ranks' norms for that of all."""
        parameters = self.deepspeed.module.parameters()
        limit = self.deepspeed.gradient_clipping()
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, self.norm)

    def _penalty(self, norm: torch.Tensor) -> torch.Tensor:
        """Inf, `()`, if the update must not happen for its loss or as a spike; else 0."""
        self.norm = norm
        bad = ~torch.isfinite(self.loss)
        if self.config.spike != "ignore":
            loss, norm_value = torch.stack((self.loss, norm)).tolist()
            self._measured = (loss, norm_value)
            self.spiked = math.isfinite(loss + norm_value) and self._is_spike()
            bad = bad | self.spiked
        return torch.where(bad, math.inf, 0.0)

    def _is_spike(self) -> bool:
        if len(self._window) < self.config.window:
            return False
        return any(
            value > statistics.fmean(seen) + self.config.threshold * statistics.pstdev(seen)
            for value, seen in zip(self._measured, zip(*self._window, strict=True), strict=True)
        )


@torch.no_grad()
def gradient_norm(parameters: Sequence[nn.Parameter], world: World) -> torch.Tensor:
    """Of reduced gradients over all ranks, `()`; collective where parameters are shared."""
    alike: list[torch.Tensor] = []
    squares = torch.zeros((), device=world.device)  # of the shares, each replica its part
    for p in parameters:
        if p.grad is None:
            continue
        if share := Share.of(p):
            squares += p.grad.float().square().sum() / share.replicas
        else:
            alike.append(p.grad)
    norm: torch.Tensor = torch.nn.utils.get_total_norm(alike)
    if any(map(Share.of, parameters)):
        norm = (norm.square() + world.sum(squares)).sqrt()
    return norm


@torch.no_grad()
def compare_replicas(module: nn.Module, world: World, step: int) -> None:
    """Raises RunStopped, on every rank, if the weights differ in a bit between the ranks that have
    them.

    Reads each weight once where it is; one small all-reduce, one wait for the device.
    """
    names, weights = zip(*module.named_parameters(), strict=True)
    integers = {2: torch.int16, 4: torch.int32}
    sums = torch.stack([w.view(integers[w.element_size()]).sum(dtype=torch.int64) for w in weights])
    # A row for each share of a weight; what all have is in the first.
    replicas = [share.replicas if (share := Share.of(w)) else world.size for w in weights]
    rows = [world.rank % (world.size // each) for each in replicas]
    nothing = torch.iinfo(torch.int64).min // 2
    own = sums.new_full((2, max(1, world.size // min(replicas)), len(sums)), nothing)
    columns = torch.arange(len(sums))
    own[:, rows, columns] = torch.stack((sums, -sums))
    dist.all_reduce(own, dist.ReduceOp.MAX)
    differ = ((own[0] != -own[1]) & (own[0] != nothing)).nonzero().tolist()
    if not differ:
        return
    row, column = differ[0]
    found: list[Any] = [None] * world.size
    mine = sums[column].item() if rows[column] == row else None
    dist.all_gather_object(found, (socket.gethostname(), mine))
    having = Counter(checksum for _, checksum in found if checksum is not None)
    [(usual, count)] = having.most_common(1)
    most = 2 * count > replicas[column]  # of two ranks either may be wrong
    odd = [
        f"rank {rank} ({host})"
        for rank, (host, checksum) in enumerate(found)
        if checksum is not None and (not most or checksum != usual)
    ]
    raise RunStopped(
        f"step {step}: {names[column]}"
        + (f" and {len(differ) - 1} more" if len(differ) > 1 else "")
        + f" differ in their bits between replicas; suspect {', '.join(odd)}: test that machine's "
        "memory and device, or leave it out, and run again to go on from the newest checkpoint"
    )
