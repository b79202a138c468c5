"""LN_in and SparseSpectral in one pass over whole tokens; the backward.

A tile is `[TOKENS, P·Q]` in registers, p and q padded to powers of two. Coefficients are held
transposed, `[TOKENS, Q, P]`: that saves two of four transpositions. Nothing depends on the order.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_gpt.model.ffn.kernels.tiles import EPS, RMS_EPS, dot, power_of_two, rows

_ELEMENTS = 8192  # of a tile


@triton.jit
def _matrix(ptr, n: tl.constexpr, N: tl.constexpr):
    """An n × n matrix padded with zeros to N × N."""
    i = tl.arange(0, N)[:, None]
    j = tl.arange(0, N)[None, :]
    return tl.load(ptr + i * n + j, (i < n) & (j < n), 0.0)


@triton.jit
def _transform(
    h, left, right, TOKENS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, dtype: tl.constexpr
):
    """Coefficients `[TOKENS, Q·P]` of h `[TOKENS, P·Q]`, each step rounded to a dtype."""
    grid = dot(tl.reshape(h, (TOKENS * P, Q)), tl.trans(right), dtype)
    grid = tl.permute(tl.reshape(grid, (TOKENS, P, Q)), (0, 2, 1))
    grid = dot(tl.reshape(grid, (TOKENS * Q, P)), tl.trans(left), dtype)
    return tl.reshape(grid, (TOKENS, Q * P))


@triton.jit
def _inverse(
    c, left, right, TOKENS: tl.constexpr, P: tl.constexpr, Q: tl.constexpr, dtype: tl.constexpr
):
    """The transpose of `_transform`."""
    grid = dot(tl.reshape(c, (TOKENS * Q, P)), left, dtype)
    grid = tl.permute(tl.reshape(grid, (TOKENS, Q, P)), (0, 2, 1))
    grid = dot(tl.reshape(grid, (TOKENS * P, Q)), right, dtype)
    return tl.reshape(grid, (TOKENS, P * Q))


@triton.jit
def _bound(c, EXACT: tl.constexpr, K: tl.constexpr, QUANTILE: tl.constexpr):
    """The smallest magnitude that each token keeps, `[TOKENS, 1]`.

    Exact: the K-th largest |c|, bit by bit from the highest: floats that are not negative are
    ordered as their bits, and padding (0) changes nothing.
    """
    if EXACT:
        bits = tl.abs(c).to(tl.int32, bitcast=True)
        found = tl.zeros((c.shape[0], 1), tl.int32)
        for n in range(31):
            larger = found | (1 << (30 - n))
            enough = tl.sum((bits >= larger).to(tl.int32), 1, keep_dims=True) >= K
            found = tl.where(enough, larger, found)
        bound = found.to(tl.float32, bitcast=True)
    else:
        bound = tl.full((c.shape[0], 1), QUANTILE, tl.float32)
    return bound


@triton.jit
def _selected(c, bound, SOFT: tl.constexpr):
    """What the selection makes of the coefficients."""
    if SOFT:
        c = c - tl.minimum(tl.maximum(c, -bound), bound)
    else:
        c = tl.where(tl.abs(c) < bound, 0.0, c)
    return c


@triton.jit
def _selected_backward(c, bound, dc, SOFT: tl.constexpr, EXACT: tl.constexpr):
    """The gradient of c from that of `_selected(c)`; an exact soft selection's bound has one."""
    if SOFT:
        dc = tl.where(tl.abs(c) > bound, dc, 0.0)
        if EXACT:
            sign = tl.where(c < 0, -1.0, 1.0)
            dbound = -tl.sum(sign * dc, 1, keep_dims=True)
            kth = (tl.abs(c) == bound).to(tl.float32)
            dc += sign * kth * (dbound / tl.maximum(tl.sum(kth, 1, keep_dims=True), 1.0))
    else:
        dc = tl.where(tl.abs(c) < bound, 0.0, dc)
    return dc


@triton.jit
def _forward(
    x_ptr,
    norm_gain_ptr,
    norm_bias_ptr,
    left_ptr,
    right_ptr,
    gain_ptr,
    p_ptr,
    s_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    tokens,
    eps,
    p: tl.constexpr,
    q: tl.constexpr,
    SERIES: tl.constexpr,
    SOFT: tl.constexpr,
    EXACT: tl.constexpr,
    K: tl.constexpr,
    QUANTILE: tl.constexpr,
    TOKENS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
):
    D: tl.constexpr = p * q
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.arange(0, P * Q)
    real = (n // Q < p) & (n % Q < q)
    channel = (n // Q) * q + n % Q
    real_c = (n % P < p) & (n // P < q)
    channel_c = (n % P) * q + n // P
    t = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    at = t[:, None] * D + channel[None, :]
    live = (t < tokens)[:, None] & real[None, :]

    x = tl.load(x_ptr + at, live, 0.0).to(tl.float32)
    norm_gain = tl.load(norm_gain_ptr + channel, real, 0.0).to(tl.float32)[None, :]
    norm_bias = tl.load(norm_bias_ptr + channel, real, 0.0).to(tl.float32)[None, :]
    mean = tl.sum(x, 1) / D
    centred = tl.where(live, x - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / D + eps)
    h = centred * rstd[:, None] * norm_gain + norm_bias

    left = _matrix(left_ptr, p, P).to(dtype)
    right = _matrix(right_ptr, q, Q).to(dtype)
    gain = tl.load(gain_ptr + channel_c, real_c, 0.0).to(tl.float32)[None, :]
    c = _transform(h, left, right, TOKENS, P, Q, dtype)
    c = _selected(c, _bound(c, EXACT, K, QUANTILE), SOFT)
    s = _inverse(c * gain, left, right, TOKENS, P, Q, dtype)

    if SERIES:
        h = s
        tl.store(scale_ptr + t, tl.rsqrt(tl.sum(h * h, 1) / D + RMS_EPS), t < tokens)
    else:
        tl.store(s_ptr + at, s.to(dtype), live)
    tl.store(p_ptr + at, h.to(dtype), live)
    tl.store(mean_ptr + t, mean, t < tokens)
    tl.store(rstd_ptr + t, rstd, t < tokens)


@triton.jit
def _backward(
    dz_ptr,
    along_ptr,
    ds_ptr,
    x_ptr,
    p_ptr,
    norm_gain_ptr,
    norm_bias_ptr,
    left_ptr,
    right_ptr,
    gain_ptr,
    mean_ptr,
    rstd_ptr,
    scale_ptr,
    dx_ptr,
    sums_ptr,
    tokens,
    p: tl.constexpr,
    q: tl.constexpr,
    SERIES: tl.constexpr,
    SOFT: tl.constexpr,
    EXACT: tl.constexpr,
    K: tl.constexpr,
    QUANTILE: tl.constexpr,
    TOKENS: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
):
    D: tl.constexpr = p * q
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.arange(0, P * Q)
    real = (n // Q < p) & (n % Q < q)
    channel = (n // Q) * q + n % Q
    real_c = (n % P < p) & (n // P < q)
    channel_c = (n % P) * q + n // P
    tile = tl.program_id(0).to(tl.int64)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    at = t[:, None] * D + channel[None, :]
    live = (t < tokens)[:, None] & real[None, :]
    sums = sums_ptr + tile * 3 * D  # LN gain, LN bias, spectral gain

    # Coefficients again, and their bound: another compilation may round them differently.
    mean = tl.load(mean_ptr + t, t < tokens, 0.0)[:, None]
    rstd = tl.load(rstd_ptr + t, t < tokens, 0.0)[:, None]
    norm_gain = tl.load(norm_gain_ptr + channel, real, 0.0).to(tl.float32)[None, :]
    norm_bias = tl.load(norm_bias_ptr + channel, real, 0.0).to(tl.float32)[None, :]
    normal = (tl.load(x_ptr + at, live, 0.0).to(tl.float32) - mean) * rstd
    normal = tl.where(live, normal, 0.0)
    left = _matrix(left_ptr, p, P).to(dtype)
    right = _matrix(right_ptr, q, Q).to(dtype)
    gain = tl.load(gain_ptr + channel_c, real_c, 0.0).to(tl.float32)[None, :]
    c = _transform(normal * norm_gain + norm_bias, left, right, TOKENS, P, Q, dtype)
    bound = _bound(c, EXACT, K, QUANTILE)

    dz = tl.load(dz_ptr + at, live, 0.0).to(tl.float32)
    if SERIES:  # through the renormalisation z = p / RMS(p)
        scale = tl.load(scale_ptr + t, t < tokens, 0.0)
        along = tl.load(along_ptr + t, t < tokens, 0.0) * scale * scale * scale / D
        ds = dz * scale[:, None]
        ds -= tl.load(p_ptr + at, live, 0.0).to(tl.float32) * along[:, None]
    else:
        ds = tl.load(ds_ptr + at, live, 0.0).to(tl.float32)
    dc = _transform(ds, left, right, TOKENS, P, Q, dtype)
    tl.store(sums + 2 * D + channel_c, tl.sum(dc * _selected(c, bound, SOFT), 0), real_c)
    dc = _selected_backward(c, bound, dc * gain, SOFT, EXACT)
    dh = _inverse(dc, left, right, TOKENS, P, Q, dtype)
    if not SERIES:
        dh += dz

    tl.store(sums + channel, tl.sum(dh * normal, 0), real)
    tl.store(sums + D + channel, tl.sum(dh, 0), real)
    dh = dh * norm_gain
    dx = dh - tl.sum(dh, 1, keep_dims=True) / D
    dx = (dx - normal * (tl.sum(dh * normal, 1, keep_dims=True) / D)) * rstd
    tl.store(dx_ptr + at, dx.to(dtype), live)


Selection = tuple[bool, bool, int, float]  # soft or hard, exact or constant, k, quantile


def _options(series: bool, selection: Selection) -> dict[str, Any]:
    soft, exact, k, quantile = selection
    return {
        "SERIES": series,
        "SOFT": soft,
        "EXACT": exact,
        "K": k,
        "QUANTILE": quantile,
        "num_warps": 8,
    }


def _shape(p: int, q: int, tokens: int) -> dict[str, int]:
    wide, high = power_of_two(q, 16), power_of_two(p, 16)
    return {"p": p, "q": q, "P": high, "Q": wide, "TOKENS": rows(wide * high, tokens, _ELEMENTS)}


def forward(
    x: Tensor,
    norm: tuple[Tensor, Tensor],
    left: Tensor,
    right: Tensor,
    gain: Tensor,
    stats: Tensor,
    series: bool,
    selection: Selection,
) -> tuple[Tensor, Tensor | None]:
    """The polynomial's input p and, unless that is it, the spectral part's output s.

    x: `(tokens, d)`; p and s in its dtype. norm: LN_in's gain and bias. left `(p, p)` and right
    `(q, q)`. Writes stats, `(3, tokens)` float32: LN_in's mean and 1/std, and in series 1/RMS(p).
    """
    tokens = len(x)
    poly = torch.empty_like(x)
    s = None if series else torch.empty_like(x)
    shape = _shape(len(left), len(right), tokens)
    _forward[(max(1, triton.cdiv(tokens, shape["TOKENS"])),)](
        x, *norm, left, right, gain, poly, s, stats[0], stats[1], stats[2], tokens, EPS,
        **shape, **_options(series, selection),
    )  # fmt: skip
    return poly, s


def backward(
    dz: Tensor,
    along: Tensor | None,
    ds: Tensor | None,
    x: Tensor,
    poly: Tensor,
    norm: tuple[Tensor, Tensor],
    left: Tensor,
    right: Tensor,
    gain: Tensor,
    stats: Tensor,
    series: bool,
    selection: Selection,
) -> tuple[Tensor, Tensor]:
    """Gradients of x and of (LN_in's gain and bias, gain), the latter `(3, d)` float32.

    dz and along: see `polynomial.backward`. ds: s's gradient, unless in series.
    """
    tokens, d = x.shape
    dx = torch.empty_like(x)
    shape = _shape(len(left), len(right), tokens)
    tiles = max(1, triton.cdiv(tokens, shape["TOKENS"]))
    sums = torch.empty((tiles, 3, d), dtype=torch.float32, device=x.device)
    _backward[(tiles,)](
        dz, along, ds, x, poly, *norm, left, right, gain, stats[0], stats[1], stats[2],
        dx, sums, tokens,
        **shape, **_options(series, selection),
    )  # fmt: skip
    return dx, sums.sum(0)
