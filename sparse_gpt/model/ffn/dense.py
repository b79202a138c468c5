"""DenseFFN: the feed-forward network of GPT-2, which the sparse one is measured against."""

from __future__ import annotations

import math

from torch import Tensor, nn
from torch.nn import functional as F

from sparse_gpt.model.config import DenseFFNConfig
from sparse_gpt.model.flops import FlopCount


class DenseFFN(nn.Module):
    """d → 4d → d with tanh-approximated GELU (GPT-2, Radford et al. 2019).

    `(..., d_model) -> (..., d_model)`. `n_layer` scales the output weights' initial std by
    1/√(2·n_layer) as every residual branch of GPT-2.
    """

    def __init__(self, d_model: int, config: DenseFFNConfig, n_layer: int = 1) -> None:
        super().__init__()
        self.up = nn.Linear(d_model, 4 * d_model)
        self.down = nn.Linear(4 * d_model, d_model)
        self.dropout = nn.Dropout(config.dropout)
        for linear, shrink in ((self.up, 1), (self.down, 2 * n_layer)):
            std = 1 / math.sqrt(linear.in_features) if config.fan_in_init else 0.02
            nn.init.normal_(linear.weight, std=std / math.sqrt(shrink))
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The branch, without the residual add."""
        y: Tensor = self.dropout(self.down(F.gelu(self.up(x), approximate="tanh")))
        return y

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """8d² MACs a token; GELU is 8 operations: z·z, ·c₂, +c₁, ·z, tanh, +1, ·z, ·½."""
        tokens, hidden = batch * seq, self.up.out_features
        macs = tokens * 2 * hidden * self.up.in_features
        return FlopCount(matmul=2 * macs, elementwise=8 * tokens * hidden, mac_equivalents=macs)
