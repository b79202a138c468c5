"""SparsePolynomial: Chebyshev features of every channel, mixed within small groups."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_gpt.config import PolynomialConfig, check_divides
from sparse_gpt.flops import FlopCount


def chebyshev(u: Tensor, degree: int) -> list[Tensor]:
    """[T_1(u), …, T_degree(u)], the Chebyshev polynomials of the first kind, each of u's shape.

    By recurrence: cos(n·acos u) has an infinite gradient at ±1.
    """
    polynomials = [torch.ones_like(u), u]
    twice = 2 * u
    for _ in range(degree - 1):
        polynomials.append(twice * polynomials[-1] - polynomials[-2])
    return polynomials[1:]


@lru_cache
def chebyshev_power(degree: int) -> float:
    """E[T_degree(tanh z)²] for z ~ N(0, 1): .394, .435, .465, .480 for degrees 1 to 4."""
    # The trapezoid rule converges exponentially on an analytic integrand that decays at both ends.
    step, reach = 1 / 64, 9
    points = (i * step for i in range(-reach * 64, reach * 64 + 1))
    return sum(
        math.cos(degree * math.acos(math.tanh(z))) ** 2 * math.exp(-z * z / 2) for z in points
    ) * (step / math.sqrt(2 * math.pi))


class SparsePolynomial(nn.Module):
    """y_g = Σ_n W_n^g T_n(u_g) + b with u = tanh(x / RMS(x)), over groups of channels.

    `(..., d_model) -> (..., d_model)`. Group g reads the channels g, g + G, g + 2G, … of G =
    d_model / group_size groups (the stride permutation: neighbours land in different groups) and
    writes group_size adjacent channels. Renormalising to unit RMS keeps the features well
    conditioned whatever the scale of x.

    Initially unit-RMS Gaussian input gives unit-variance output, degree n bearing a share ∝ 1/n².
    Raises ValueError when group_size does not divide d_model.
    """

    def __init__(self, d_model: int, config: PolynomialConfig) -> None:
        super().__init__()
        self.d_model = d_model
        self.degrees = config.degrees
        self.group_size = size = config.group_size
        check_divides("polynomial.group_size", size, d_model)
        self.groups = d_model // size
        self.weight = nn.Parameter(torch.empty(len(self.degrees), self.groups, size, size))
        self.bias = nn.Parameter(torch.zeros(d_model))
        total = math.sqrt(sum(1 / n**2 for n in self.degrees))
        for weight, n in zip(self.weight, self.degrees, strict=True):
            std = 1 / (n * total * math.sqrt(size * chebyshev_power(n)))
            nn.init.normal_(weight, std=std)

    def forward(self, x: Tensor) -> Tensor:
        """The mixed features, in x's dtype."""
        u = torch.tanh(F.rms_norm(x, (self.d_model,), eps=1e-6))
        u = u.reshape(-1, self.group_size, self.groups).permute(2, 0, 1).contiguous()
        features = chebyshev(u, self.degrees[-1])
        # One grouped matmul a degree, accumulated: the concatenated features of a single matmul
        # would cost a copy of |S|·d a token, which measured slower (CPU, forward and backward).
        y = self.bias.view(self.groups, 1, self.group_size)
        for n, weight in zip(self.degrees, self.weight.unbind(), strict=True):
            y = torch.baddbmm(y, features[n - 1], weight)
        return y.transpose(0, 1).reshape(x.shape)

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """d·s·|S| MACs a token and the recurrence to degree K, one MAC a channel and degree.

        Elementwise operations a channel: RMS norm 3 (square, add, scale), tanh 1, and in the
        recurrence 2 a degree above the first, with 1 for 2u.
        """
        channels = batch * seq * self.d_model
        macs = channels * self.group_size * len(self.degrees)
        steps = self.degrees[-1] - 1
        return FlopCount(
            matmul=2 * macs,
            elementwise=channels * (4 + 2 * steps + (steps > 0)),
            mac_equivalents=macs + steps * channels,
        )
