"""SparsePolynomial: Chebyshev features of every channel, mixed within small groups."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_gpt.model.config import PolynomialConfig, check_divides
from sparse_gpt.model.flops import FlopCount


def chebyshev(first: Tensor, twice: Tensor, degree: int) -> Iterator[tuple[int, Tensor]]:
    """(sign, sign · P_n) for n = 1 … degree, with P_0 = 1, P_1 = `first`, P_n+1 = 2u·P_n − P_n-1.

    first = u makes them Chebyshev's polynomials of the first kind T_n, first = 2u those of the
    second kind U_n; twice = 2u. By recurrence: cos(n·acos u) has an infinite gradient at ±1.
    With the sign pulled out a degree is one fused pass, in place from the third on, so a tensor
    holds its degree until the second one after it is asked for.
    """
    sign_before, sign = 1, 1
    before, now = torch.ones((), dtype=first.dtype, device=first.device), first
    for n in range(1, degree + 1):
        yield sign, now
        if n < degree:
            own = before.dim() and before is not first
            step = torch.Tensor.addcmul_ if own else torch.addcmul
            then = step(before, twice, now, value=-sign_before * sign)
            before, now = now, then
            sign_before, sign = sign, -sign_before


class ChebyshevMix(torch.autograd.Function):
    """y = Σ_n T_n(u) W_n + b, a grouped matmul a degree, accumulated in place.

    u `(groups, tokens, group_size)`, weight `(len(degrees), groups, group_size, group_size)`, bias
    `(groups · group_size,)`; y like u. Saves u and the weights alone and recomputes the features
    backward, where T_n' = n·U_n-1: about half the passes over memory of autograd's own way, which
    is what the time goes to (the concatenated features of a single matmul would cost as many).
    """

    @staticmethod
    def forward(
        ctx: Any, u: Tensor, weight: Tensor, bias: Tensor, degrees: tuple[int, ...]
    ) -> Tensor:
        ctx.save_for_backward(u, weight)
        ctx.degrees = degrees
        # A copy even of a single token's, where the expanded bias is contiguous as it is.
        y = bias.view(len(u), 1, -1).expand_as(u).clone(memory_format=torch.contiguous_format)
        for n, (sign, t) in enumerate(chebyshev(u, 2 * u, degrees[-1]), 1):
            if n in degrees:
                torch.baddbmm(y, t, weight[degrees.index(n)], alpha=sign, out=y)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        u, weight = ctx.saved_tensors
        degrees = ctx.degrees
        du, dweight, twice = torch.zeros_like(u), torch.empty_like(weight), 2 * u
        first_kind = chebyshev(u, twice, degrees[-1])
        second_kind = chebyshev(twice, twice, degrees[-1] - 1)
        u_sign, u_before = 1, torch.ones((), dtype=u.dtype, device=u.device)  # U_0
        for n, (sign, t) in enumerate(first_kind, 1):
            if n in degrees:
                i = degrees.index(n)
                torch.bmm(t.transpose(1, 2), grad, out=dweight[i]).mul_(sign)
                slope = torch.bmm(grad, weight[i].transpose(1, 2))
                du.addcmul_(slope, u_before, value=n * u_sign)
            if n < degrees[-1]:
                u_sign, u_before = next(second_kind)
        return du, dweight, grad.sum(1).flatten(), None


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

    def __init__(self, d_model: int, config: PolynomialConfig, renormalise: bool = True) -> None:
        super().__init__()
        self.renormalise = renormalise
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
        if self.renormalise:
            x = F.rms_norm(x, (self.d_model,), eps=1e-6)
        u = torch.tanh(x).reshape(-1, self.group_size, self.groups).permute(2, 0, 1).contiguous()
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        with torch.autocast(kind, enabled=False):  # it does not know how to cast for `out=`
            operands = (tensor.to(dtype) for tensor in (u, self.weight, self.bias))
            y: Tensor = ChebyshevMix.apply(*operands, self.degrees)  # type: ignore[no-untyped-call]
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
            elementwise=channels * (1 + 3 * self.renormalise + 2 * steps + (steps > 0)),
            mac_equivalents=macs + steps * channels,
        )
