"""The projection by cuBLAS, dense or in two block-diagonal factors, and its backward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def _blocks(x: Tensor, weight: Tensor) -> Tensor:
    """`(tokens, d)` as `(blocks, tokens, block)`."""
    return x.view(len(x), len(weight), -1).transpose(0, 1)


def _middle(v: Tensor, first: Tensor) -> Tensor:
    """What the second factor multiplies, `(blocks, tokens, block)`: see SparseFactorLinear."""
    y = torch.bmm(_blocks(v, first), first).permute(1, 2, 0)
    return y.reshape(len(v), len(first), -1).transpose(0, 1)


def forward(v: Tensor, weights: list[Tensor]) -> Tensor:
    """z `(tokens, d)` from v `(tokens, d)`; weights is one dense matrix or two factors."""
    weights = [w.to(v.dtype) for w in weights]
    if len(weights) == 1:
        return F.linear(v, weights[0])
    first, second = weights
    return torch.bmm(_middle(v, first), second).transpose(0, 1).reshape(v.shape)


def backward(dz: Tensor, v: Tensor, weights: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Gradients of v `(tokens, d)` and of each weight."""
    weights = [w.to(v.dtype) for w in weights]
    if len(weights) == 1:
        return dz @ weights[0], [dz.T @ v]
    first, second = weights
    out = _blocks(dz, second)
    dsecond = torch.bmm(_middle(v, first).transpose(1, 2), out)
    dmiddle = torch.bmm(out, second.transpose(1, 2)).transpose(0, 1)
    dmiddle = dmiddle.reshape(len(v), -1, len(first)).permute(2, 0, 1)
    dfirst = torch.bmm(_blocks(v, first).transpose(1, 2), dmiddle)
    dv = torch.bmm(dmiddle, first.transpose(1, 2)).transpose(0, 1).reshape(v.shape)
    return dv, [dfirst, dsecond]
