"""Which blocks of a dictionary a token is given, without a look at any other token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Route(torch.autograd.Function):
    """The `top_k` largest of the energies e = softmax(logits + balance).

    logits `(tokens, blocks)`, balance `(blocks,)` float32 without gradient. Energies `(tokens,
    top_k)`, float32 or wider, and blocks int64 alike. Backward nothing is added up by index.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, balance: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
        balanced = logits.to(torch.promote_types(logits.dtype, torch.float32)) + balance
        energies = balanced.softmax(-1)
        blocks = largest(balanced, top_k)
        ctx.save_for_backward(energies, blocks)
        ctx.mark_non_differentiable(blocks)
        ctx.dtype = logits.dtype
        return energies.gather(-1, blocks), blocks

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        energies, blocks = ctx.saved_tensors
        chosen = energies.gather(-1, blocks)
        mean = (grad * chosen).sum(-1, keepdim=True)
        grads = (energies * -mean).scatter_(-1, blocks, chosen * (grad - mean))
        return grads.to(ctx.dtype), None, None


def largest(scores: Tensor, top_k: int) -> Tensor:
    """Places of the `top_k` largest of each row, int64 `(rows, top_k)`, of float `(rows, n)`,
    which is overwritten.

    A score's last log2 n bits are made its place, counted from the end, and a maximum, which is
    vectorised, brings both: on a CPU three times as fast as argmax and eight times as topk at
    n = 64. Scores that differ in those bits alone are ties; positive ones go to the first.
    """
    n = scores.shape[-1]
    integer = torch.int64 if scores.dtype == torch.float64 else torch.int32
    mask = (1 << (n - 1).bit_length()) - 1
    places = mask - torch.arange(n, dtype=integer, device=scores.device)
    scores.nan_to_num_()  # whose last bits would be no place
    scores.view(integer).bitwise_and_(~mask).bitwise_or_(places)
    found: list[Tensor] = []
    for _ in range(top_k):
        if found:
            scores.scatter_(-1, found[-1], float("-inf"))
        place = scores.amax(-1, keepdim=True).view(integer).bitwise_not().bitwise_and(mask)
        found.append(place.long())
    return torch.cat(found, -1)


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


class Arrived(NamedTuple):
    """The rows that this rank's blocks are to compute, of whatever ranks' tokens.

    rows `(n, d)`; gains float32 or wider `(n, 1)`; blocks int64 `(n, 1)`, counted from this rank's
    first; back: takes `(n, d)` that were made of the rows to where they came from.
    """

    rows: Tensor
    gains: Tensor
    blocks: Tensor
    back: Callable[[Tensor], Tensor]


class Exchange(Protocol):
    """Takes rows to the ranks that hold their blocks; gradients come back on the same ways."""

    def __call__(self, rows: Tensor, gains: Tensor, loads: Tensor) -> Arrived:
        """Rows sorted by block `(n, d)`, their gains `(n, 1)`, and each block's number of rows,
        int64 `(blocks,)`. Every rank must call it, with rows or without."""
