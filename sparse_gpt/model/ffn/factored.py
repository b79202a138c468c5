"""SparseFactorLinear: a square linear map as two block-diagonal factors."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparse_gpt.model.config import check_divides
from sparse_gpt.model.flops import FlopCount


class SparseFactorLinear(nn.Module):
    """x ↦ x·R·Π·L with block-diagonal R, L and a stride permutation Π (Monarch, Dao et al. 2022).

    `(..., d_model) -> (..., d_model)`, without bias. Blocks are `block` channels wide; 2·d·block
    MACs a token, 2d²/b for b = d_model / block blocks, against d² dense. Π deals the channels of
    every block of R out over the blocks of L. Monarch's last permutation is left out: it only
    renames outputs. Weights start at std 1/√block, which keeps the variance.
    Raises ValueError when block does not divide d_model.
    """

    def __init__(self, d_model: int, block: int) -> None:
        super().__init__()
        check_divides("projection.block", block, d_model)
        self.d_model = d_model
        self.block = block
        shape = (d_model // block, block, block)
        self.first = nn.Parameter(torch.randn(shape) / math.sqrt(block))
        self.second = nn.Parameter(torch.randn(shape) / math.sqrt(block))

    def forward(self, x: Tensor) -> Tensor:
        """The mapped tokens, in x's dtype."""
        blocks = len(self.first)
        y = torch.bmm(x.reshape(-1, blocks, self.block).transpose(0, 1), self.first)
        y = y.permute(1, 2, 0).reshape(-1, blocks, self.block)
        y = torch.bmm(y.transpose(0, 1), self.second)
        return y.transpose(0, 1).reshape(x.shape)

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """2·d·block MACs a token."""
        macs = batch * seq * 2 * self.d_model * self.block
        return FlopCount(matmul=2 * macs, mac_equivalents=macs)
