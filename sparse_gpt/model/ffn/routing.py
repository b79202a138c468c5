"""Which blocks of a dictionary a token is given, without a look at any other token."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Route(torch.autograd.Function):
    """Energies e = softmax(logits) of the `top_k` blocks of largest e + balance.

    logits `(tokens, blocks)`, balance `(blocks,)` float32 without gradient. Energies float32
    `(tokens, top_k)`, blocks int64 alike. The maximum is taken top_k times, three times as fast
    on a CPU as torch's topk at 64 blocks. Backward nothing is added up by index.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, balance: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        energies = logits.float().softmax(-1)
        scores, found = energies + balance, []
        for _ in range(top_k):
            found.append(scores.argmax(-1, keepdim=True))
            scores.scatter_(-1, found[-1], float("-inf"))
        blocks = torch.cat(found, -1)
        ctx.save_for_backward(energies, blocks)
        ctx.mark_non_differentiable(blocks)
        ctx.dtype = logits.dtype
        return energies.gather(-1, blocks), blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        energies, blocks = ctx.saved_tensors
        mean = (grad * energies.gather(-1, blocks)).sum(-1, keepdim=True)
        grads = torch.zeros_like(energies).scatter(-1, blocks, grad)  # a token's blocks differ
        return (energies * (grads - mean)).to(ctx.dtype), None, None


class Places(NamedTuple):
    """Where tokens stand when they are sorted by block; a token of k blocks has k rows.

    order: int64 `(tokens · k,)`, of each row its place among the choices, token by token, so that
    order // k is its token: blocks in order, tokens in order in each.
    rows: int64 `(tokens, k)`, the inverse: each token's rows.
    ends: int32 `(blocks,)`, behind each block's last row.
    """

    order: Tensor
    rows: Tensor
    ends: Tensor

    @classmethod
    def of(cls, chosen: Tensor, blocks: int) -> Places:
        """Of the blocks that tokens chose, int64 `(tokens, k)`. Asks nothing of the device."""
        in_order, order = chosen.flatten().sort(stable=True)
        rows = torch.empty_like(order)
        rows.scatter_(0, order, torch.arange(len(order), device=order.device))
        each = torch.arange(blocks, device=order.device)
        ends = torch.searchsorted(in_order, each, right=True, out_int32=True)
        return cls(order, rows.view(chosen.shape), ends)

    def loads(self) -> Tensor:
        """Rows of each block, int64 `(blocks,)`."""
        return self.ends.long().diff(prepend=self.ends.new_zeros(1))
