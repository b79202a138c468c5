"""LayerNorm over rows that leaves its statistics; its backward.

A tile is some tokens by all channels (padded to a power of two), in registers.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_gpt.model.ffn.kernels.tiles import EPS, power_of_two, rows

_ELEMENTS = 8192  # of a tile


@triton.jit
def _forward(
    x_ptr,
    gain_ptr,
    bias_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    tokens,
    eps,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, CHANNELS)
    live = (t < tokens)[:, None] & (c < D)[None, :]
    at = t[:, None] * D + c[None, :]
    x = tl.load(x_ptr + at, live, 0.0).to(tl.float32)
    gain = tl.load(gain_ptr + c, c < D, 0.0).to(tl.float32)[None, :]
    bias = tl.load(bias_ptr + c, c < D, 0.0).to(tl.float32)[None, :]
    mean = tl.sum(x, 1) / D
    centred = tl.where(live, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    y = centred * rstd[:, None] * gain + bias
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), live)
    tl.store(mean_ptr + t, mean, t < tokens)
    tl.store(rstd_ptr + t, rstd, t < tokens)


@triton.jit
def _backward(
    dy_ptr,
    x_ptr,
    gain_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    sums_ptr,
    tokens,
    D: tl.constexpr,
    TOKENS: tl.constexpr,
    CHANNELS: tl.constexpr,
):
    tile = tl.program_id(0).to(tl.int64)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, CHANNELS)
    live = (t < tokens)[:, None] & (c < D)[None, :]
    at = t[:, None] * D + c[None, :]
    mean = tl.load(mean_ptr + t, t < tokens, 0.0)[:, None]
    rstd = tl.load(rstd_ptr + t, t < tokens, 0.0)[:, None]
    gain = tl.load(gain_ptr + c, c < D, 0.0).to(tl.float32)[None, :]
    normal = (tl.load(x_ptr + at, live, 0.0).to(tl.float32) - mean) * rstd
    normal = tl.where(live, normal, 0.0)
    dy = tl.load(dy_ptr + at, live, 0.0).to(tl.float32)
    sums = sums_ptr + tile * 2 * D + c
    tl.store(sums, tl.sum(dy * normal, 0), c < D)
    tl.store(sums + D, tl.sum(dy, 0), c < D)
    dy = dy * gain
    dx = dy - (tl.sum(dy, 1) / D)[:, None] - normal * (tl.sum(dy * normal, 1) / D)[:, None]
    tl.store(dx_ptr + at, (dx * rstd).to(dx_ptr.dtype.element_ty), live)


def forward(x: Tensor, gain: Tensor, bias: Tensor, stats: Tensor) -> Tensor:
    """LayerNorm of `(tokens, d)`, in x's dtype.

    Writes stats, `(2, tokens)` float32: mean and 1/std.
    """
    tokens, d = x.shape
    y = torch.empty_like(x)
    size = rows(power_of_two(d), tokens, _ELEMENTS)
    grid = (max(1, triton.cdiv(tokens, size)),)
    _forward[grid](
        x, gain, bias, y, stats[0], stats[1], tokens, EPS,
        D=d, TOKENS=size, CHANNELS=power_of_two(d), num_warps=8,
    )  # fmt: skip
    return y


def backward(dy: Tensor, x: Tensor, gain: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x and of (gain, bias), `(2, d)` float32."""
    tokens, d = x.shape
    dx = torch.empty_like(x)
    size = rows(power_of_two(d), tokens, _ELEMENTS)
    tiles = max(1, triton.cdiv(tokens, size))
    sums = torch.empty((tiles, 2, d), dtype=torch.float32, device=x.device)
    _backward[(tiles,)](
        dy, x, gain, stats[0], stats[1], dx, sums, tokens,
        D=d, TOKENS=size, CHANNELS=power_of_two(d), num_warps=8,
    )  # fmt: skip
    return dx, sums.sum(0)
