"""Blocks of dictionaries over ranks: they stay where they are, and tokens travel.

Ranks are taken N by N, neighbours first. Of such a group each rank holds a share of every
dictionary's blocks, with their optimizer state; groups hold replicas of each other. DeepSpeed's
expert parallelism (Rajbhandari et al. 2022, arXiv 2201.05596) does what there is to do besides:
its groups, and gradients that are averaged over replicas alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.model.ffn.routing import Arrived
from sparse_gpt.train.checkpoint.zero_state import Share
from sparse_gpt.train.component_profile import milliseconds, moment
from sparse_gpt.train.distributed import World


@contextmanager
def sharing(ranks: int, world: World) -> Iterator[None]:
    """Dictionaries that are made inside are shared as `share_blocks` does, each as soon as it is
    made: a rank never holds more than one of them whole."""
    traffic = Traffic(world.device)

    def share(_: nn.Module, __: str, part: nn.Module | None) -> None:
        if isinstance(part, BlockDictionary):
            _share(part, ranks, world, traffic)

    handle = register_module_module_registration_hook(share)
    try:
        yield
    finally:
        handle.remove()


def share_blocks(model: nn.Module, ranks: int, world: World) -> Traffic:
    """Leave this rank its share of the blocks of every dictionary of `model`, over each `ranks`
    ranks, and a way for tokens to those of the others. `ranks` divides blocks and world size.

    DeepSpeed makes the groups when it is given the model.
    """
    traffic = Traffic(world.device)
    for part in list(model.modules()):
        if isinstance(part, BlockDictionary) and part.exchange is None:
            _share(part, ranks, world, traffic)
    exchange = next(part for part in model.modules() if isinstance(part, Exchange))
    shared: Traffic = exchange.traffic
    return shared


def _share(part: BlockDictionary, ranks: int, world: World, traffic: Traffic) -> None:
    for name in ("analysis", "synthesis"):
        whole: Tensor = getattr(part, name)
        number = world.rank % ranks
        own = nn.Parameter(whole.detach().chunk(ranks)[number].clone())
        own.allreduce, own.group_name = False, _group_name(ranks)  # type: ignore[attr-defined]
        own.share = Share(  # type: ignore[attr-defined]
            number * own.numel(), world.rank // ranks, world.size // ranks
        )
        setattr(part, name, own)
    part.exchange = Exchange(part.config.blocks, ranks, traffic)


def whole(own: Tensor) -> Tensor:
    """A parameter that is shared, all of it: `(blocks, ...)`. Collective."""
    among = groups._get_expert_parallel_group(own.group_name)  # type: ignore[attr-defined]
    parts = [torch.empty_like(own) for _ in range(dist.get_world_size(among))]
    dist.all_gather(parts, own.detach().contiguous(), group=among)
    return torch.cat(parts)


def optimizer_groups(parameter_groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An optimizer's groups as DeepSpeed wants them: shared blocks in groups of their own."""
    named = [{**group, "name": str(i)} for i, group in enumerate(parameter_groups)]
    split = split_params_into_different_moe_groups_for_optimizer(named)
    return [group for group in split if group["params"]]


def _group_name(ranks: int) -> str:
    """As DeepSpeed calls the groups of so many ranks."""
    return f"ep_size_{ranks}"


class Traffic:
    """What exchanges sent since `begin`, and how long they took; of this rank."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.begin()

    def begin(self) -> None:
        """Forget what was."""
        self.bytes = 0
        self._marks: list[Any] = []

    def mark(self) -> None:
        """Before an exchange and behind it. Waits for nothing."""
        self._marks.append(moment(self.device))

    @property
    def milliseconds(self) -> float:
        """Of all exchanges, those waits included in which others were not there yet. Waits for
        the device."""
        return milliseconds(zip(self._marks[::2], self._marks[1::2], strict=True), self.device)


class Exchange(MoE):  # type: ignore[misc]
    """The ways of one dictionary's rows. It is a `MoE` to be known to DeepSpeed, and has no more of
    one: neither gate nor experts."""

    def __init__(self, blocks: int, ranks: int, traffic: Traffic) -> None:
        nn.Module.__init__(self)
        self.num_experts, self.ep_size, self.traffic = blocks, ranks, traffic
        self.expert_group_name = _group_name(ranks)

    def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
        """Called by DeepSpeed once its own groups are there. Collective."""
        if self.expert_group_name not in groups._get_expert_parallel_group_dict():
            groups._create_expert_and_data_parallel(self.ep_size)
        self.group = groups._get_expert_parallel_group(self.expert_group_name)

    def forward(self, rows: Tensor, gains: Tensor, loads: Tensor) -> Arrived:
        """See `model.ffn.routing.Exchange`. Waits for the device: how many rows come must be known
        where memory is given out."""
        own = self.num_experts // self.ep_size
        self.traffic.mark()
        counts = torch.empty_like(loads)
        dist.all_to_all_single(counts, loads, group=self.group)
        counts = counts.view(self.ep_size, own)
        sent, come = torch.stack((loads.view(self.ep_size, own).sum(1), counts.sum(1))).tolist()
        self.traffic.mark()
        self._count(loads, sent=[own] * self.ep_size)
        each = torch.arange(own, device=rows.device).repeat(self.ep_size)
        blocks = torch.repeat_interleave(each, counts.flatten(), output_size=sum(come))
        arrived, gains = _Way.apply(rows, gains, self, sent, come)  # type: ignore[no-untyped-call]

        def back(y: Tensor) -> Tensor:
            (y,) = _Way.apply(y, None, self, come, sent)  # type: ignore[no-untyped-call]
            return y

        return Arrived(arrived, gains, blocks.unsqueeze(1), back)

    def travel(self, rows: Tensor, sent: list[int], come: list[int]) -> Tensor:
        """`(sum(sent), ...)` -> `(sum(come), ...)`, both in the order of the group's ranks."""
        arrived = rows.new_empty(sum(come), *rows.shape[1:])
        self.traffic.mark()
        dist.all_to_all_single(arrived, rows.contiguous(), come, sent, group=self.group)
        self.traffic.mark()
        self._count(rows, sent)
        return arrived

    def _count(self, rows: Tensor, sent: Sequence[int]) -> None:
        others = sum(sent) - sent[dist.get_rank(self.group)]
        self.traffic.bytes += others * rows[:1].numel() * rows.itemsize if len(rows) else 0


class _Way(torch.autograd.Function):
    """Rows, and gains where there are, on their way; their gradients take it back."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        gains: Tensor | None,
        exchange: Exchange,
        sent: list[int],
        come: list[int],
    ) -> tuple[Tensor, ...]:
        ctx.exchange, ctx.sent, ctx.come = exchange, sent, come
        own = (rows,) if gains is None else (rows, gains)
        return tuple(exchange.travel(tensor, sent, come) for tensor in own)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        back = [ctx.exchange.travel(grad, ctx.come, ctx.sent) for grad in grads]
        return (back[0], back[1] if len(back) > 1 else None, None, None, None)
