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
        self.function = config.function
        hidden = round(8 / 3 * d_model) if config.function == "swiglu" else 4 * d_model
        self.up = nn.Linear(d_model, hidden * (2 if config.function == "swiglu" else 1))
        self.down = nn.Linear(hidden, d_model)
        self.dropout = nn.Dropout(config.dropout)
        for linear, shrink in ((self.up, 1), (self.down, 2 * n_layer)):
            std = 1 / math.sqrt(linear.in_features) if config.fan_in_init else 0.02
            nn.init.normal_(linear.weight, std=std / math.sqrt(shrink))
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """The branch, without the residual add."""
        u = self.up(x)
        if self.function == "swiglu":
            a, b = u.chunk(2, -1)
            u = F.silu(a) * b
        else:
            u = F.relu(u).square() if self.function == "relu2" else F.gelu(u, approximate="tanh")
        y: Tensor = self.dropout(self.down(u))
        return y

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """8d² MACs a token; GELU is 8 operations: z·z, ·c₂, +c₁, ·z, tanh, +1, ·z, ·½."""
        tokens, hidden = batch * seq, self.down.in_features
        macs = tokens * hidden * self.up.in_features * (3 if self.function == "swiglu" else 2)
        return FlopCount(matmul=2 * macs, elementwise=8 * tokens * hidden, mac_equivalents=macs)
