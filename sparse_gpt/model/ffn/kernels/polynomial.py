"""SparsePolynomial, what joins its output, and the refine stages, in one pass; the backward.

A tile is `[GROUPS, TOKENS, S]`: some adjacent groups of S channels. Group g reads the channels
g + i·G, so a tile reads, for each i, a run of GROUPS adjacent channels, and writes one run of
GROUPS·S. The matmuls are batched over the groups.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_gpt.model.ffn.kernels.refine import refine, refine_backward
from sparse_gpt.model.ffn.kernels.tiles import dot, power_of_two, rows, tanh

_GROUPS = 8  # of a tile, and a warp for each: a batched matmul deals its batch out to the warps
_FORWARD, _BACKWARD = 1024, 512  # elements of a group in a tile, so that registers suffice
_SPLITS = 32  # of the tokens, in the weights' gradient


@triton.jit
def _mixed(
    u, weight_ptr, bias, g, real, G: tl.constexpr, S: tl.constexpr, DEGREES: tl.constexpr,
    LAST: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """Σ_n T_n(u) W_n + bias. Bit n of DEGREES says whether degree n is kept."""
    i = tl.arange(0, S)[None, :, None]
    j = tl.arange(0, S)[None, None, :]
    weights = weight_ptr + (g * S + i) * S + j
    y = tl.zeros(u.shape, tl.float32) + bias
    before = tl.full(u.shape, 1.0, tl.float32)
    now = u
    for n in tl.static_range(1, LAST + 1):
        if (DEGREES >> n) & 1:
            y = dot(now, tl.load(weights, real, 0.0), dtype, y)
            weights = weights + G * S * S
        after = 2 * u * now - before
        before = now
        now = after
    return y


@triton.jit
def _forward(
    p_ptr,
    scale_ptr,
    s_ptr,
    weight_ptr,
    bias_ptr,
    score_ptr,
    stages_ptr,
    v_ptr,
    m_ptr,
    tokens,
    G: tl.constexpr,
    S: tl.constexpr,
    DEGREES: tl.constexpr,
    LAST: tl.constexpr,
    SERIES: tl.constexpr,
    JOINED: tl.constexpr,
    SCORE: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    D: tl.constexpr = G * S
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    chunks = tl.cdiv(G, GROUPS)
    chunk = tl.program_id(0) % chunks
    row = (tl.program_id(0) // chunks).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    g = (chunk * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    t = row[None, :, None]
    i = tl.arange(0, S)[None, None, :]
    real = g < G
    live = real & (t < tokens)
    channel = g * S + i

    z = tl.load(p_ptr + t * D + i * G + g, live, 0.0).to(tl.float32)
    if SERIES:
        z = z * tl.load(scale_ptr + t, t < tokens, 0.0)
    u = tanh(z)
    bias = tl.load(bias_ptr + channel, real, 0.0).to(tl.float32)
    v = _mixed(u, weight_ptr, bias, g, real, G, S, DEGREES, LAST, dtype)
    if JOINED:
        v += tl.load(s_ptr + t * D + channel, live, 0.0).to(tl.float32)
    if SCORE:
        score = tl.load(score_ptr + channel, real, 0.0).to(tl.float32)
        m = tl.sum(tl.sum(v * score, 2), 0)
        tl.store(m_ptr + chunk.to(tl.int64) * tokens + row, m, row < tokens)
    else:
        v = refine(v, stages_ptr, channel, real, D, STAGES)
    tl.store(v_ptr + t * D + channel, v.to(dtype), live)


@triton.jit
def _backward(
    dv_ptr,
    dm_ptr,
    p_ptr,
    scale_ptr,
    s_ptr,
    weight_ptr,
    bias_ptr,
    score_ptr,
    stages_ptr,
    dz_ptr,
    along_ptr,
    z_ptr,
    dy_ptr,
    sums_ptr,
    tokens,
    G: tl.constexpr,
    S: tl.constexpr,
    DEGREES: tl.constexpr,
    LAST: tl.constexpr,
    SERIES: tl.constexpr,
    JOINED: tl.constexpr,
    SCORE: tl.constexpr,
    STAGES: tl.constexpr,
    GROUPS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    D: tl.constexpr = G * S
    dtype: tl.constexpr = p_ptr.dtype.element_ty
    chunks = tl.cdiv(G, GROUPS)
    chunk = tl.program_id(0) % chunks
    tile = (tl.program_id(0) // chunks).to(tl.int64)
    row = tile * TOKENS + tl.arange(0, TOKENS)
    g = (chunk * GROUPS + tl.arange(0, GROUPS))[:, None, None]
    t = row[None, :, None]
    i = tl.arange(0, S)[None, None, :]
    real = g < G
    live = real & (t < tokens)
    channel = g * S + i
    sums = sums_ptr + tile * (1 + SCORE + 3 * STAGES) * D  # bias, then score or refine stages

    p = tl.load(p_ptr + t * D + i * G + g, live, 0.0).to(tl.float32)
    z = p
    if SERIES:
        z = p * tl.load(scale_ptr + t, t < tokens, 0.0)
    tl.store(z_ptr + t * D + channel, z.to(dtype), live)
    u = tanh(z)
    dv = tl.load(dv_ptr + t * D + channel, live, 0.0).to(tl.float32)
    if SCORE or STAGES > 0:
        bias = tl.load(bias_ptr + channel, real, 0.0).to(tl.float32)
        v = _mixed(u, weight_ptr, bias, g, real, G, S, DEGREES, LAST, dtype)
        if JOINED:
            v += tl.load(s_ptr + t * D + channel, live, 0.0).to(tl.float32)
        if SCORE:
            score = tl.load(score_ptr + channel, real, 0.0).to(tl.float32)
            dm = tl.load(dm_ptr + t, t < tokens, 0.0)
            tl.store(sums + D + channel, tl.sum(dm * v, 1, keep_dims=True), real)
            dv = dv + dm * score
        else:
            dv = refine_backward(v, dv, stages_ptr, sums + D, channel, real, D, STAGES, 1)
    tl.store(dy_ptr + t * D + channel, dv.to(dtype), live)
    tl.store(sums + channel, tl.sum(dv, 1, keep_dims=True), real)

    # T_n' = n·U_{n-1}, Chebyshev's second kind, by the same recurrence.
    j = tl.arange(0, S)[None, :, None]
    weights = weight_ptr + (g * S + i) * S + j  # transposed: [group, output, input]
    du = tl.zeros(u.shape, tl.float32)
    before = tl.zeros(u.shape, tl.float32)
    now = tl.full(u.shape, 1.0, tl.float32)
    for n in tl.static_range(1, LAST + 1):
        if (DEGREES >> n) & 1:
            du += n * now * dot(dv, tl.load(weights, real, 0.0), dtype)
            weights = weights + G * S * S
        after = 2 * u * now - before
        before = now
        now = after
    dz = du * (1 - u * u)
    tl.store(dz_ptr + t * D + i * G + g, dz.to(dtype), live)
    if SERIES:  # Σ dz·p, which the backward of the renormalisation needs
        along = tl.sum(tl.sum(dz * p, 2), 0)
        tl.store(along_ptr + chunk.to(tl.int64) * tokens + row, along, row < tokens)


@triton.jit
def _weights(
    z_ptr,
    dy_ptr,
    sums_ptr,
    tokens,
    G: tl.constexpr,
    S: tl.constexpr,
    DEGREES: tl.constexpr,
    LAST: tl.constexpr,
    COUNT: tl.constexpr,
    SPLITS: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """The weights' gradient of one group over one in SPLITS tiles of tokens."""
    dtype: tl.constexpr = z_ptr.dtype.element_ty
    g = tl.program_id(0) % G
    split = tl.program_id(0) // G
    i = tl.arange(0, S)
    j = tl.arange(0, S)
    sums = ()
    for _ in tl.static_range(COUNT):
        sums = sums + (tl.zeros((S, S), tl.float32),)  # type: ignore  # noqa: RUF005
    for tile in range(split, tl.cdiv(tokens, TOKENS), SPLITS):
        t = tl.arange(0, TOKENS).to(tl.int64) + tile * TOKENS
        at = t[:, None] * (G * S) + g * S + i[None, :]
        live = (t < tokens)[:, None]
        u = tanh(tl.load(z_ptr + at, live, 0.0).to(tl.float32))
        dy = tl.load(dy_ptr + at, live, 0.0)
        before = tl.full(u.shape, 1.0, tl.float32)
        now = u
        added = ()
        for n in tl.static_range(1, LAST + 1):
            if (DEGREES >> n) & 1:
                added = added + (dot(tl.trans(now), dy, dtype, sums[len(added)]),)  # type: ignore  # noqa: RUF005
            after = 2 * u * now - before
            before = now
            now = after
        sums = added
    for n in tl.static_range(COUNT):
        at = (((split * COUNT + n) * G + g).to(tl.int64) * S + i[:, None]) * S + j[None, :]
        tl.store(sums_ptr + at, sums[n])


def _shape(
    weight: Tensor, degrees: tuple[int, ...], tokens: int, elements: int
) -> tuple[int, dict[str, Any]]:
    """The number of chunks of groups, and the compile-time arguments of a tiled kernel."""
    groups, size = weight.shape[1], weight.shape[2]
    chunk = min(power_of_two(groups), _GROUPS)
    arguments = {
        "G": groups,
        "S": size,
        "DEGREES": sum(1 << n for n in degrees),
        "LAST": degrees[-1],
        "GROUPS": chunk,
        "TOKENS": rows(size, tokens, elements, least=16),
        "num_warps": chunk,
    }
    return triton.cdiv(groups, chunk), arguments


def forward(
    p: Tensor,
    scale: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    score: Tensor | None,
    stages: Tensor | None,
    degrees: tuple[int, ...],
) -> tuple[Tensor, Tensor | None]:
    """v `(tokens, d)` in p's dtype and, with a score, m = scoreᵀv `(tokens,)` float32.

    p: `(tokens, d)`, the polynomial's input; where it is renormalised, `scale` is 1/RMS(p),
    `(tokens,)` float32. s, if given, is added to the output. weight:
    `(degrees, groups, size, size)`. stages: `(3, stages, d)` float32, not applied when there is a
    score, because feedback then comes first.
    """
    tokens = len(p)
    v = torch.empty_like(p)
    chunks, arguments = _shape(weight, degrees, tokens, _FORWARD)
    m = None
    if score is not None:
        m = torch.empty((chunks, tokens), dtype=torch.float32, device=p.device)
    tiles = max(1, triton.cdiv(tokens, arguments["TOKENS"]))
    _forward[(chunks * tiles,)](
        p, scale, s, weight, bias, score, stages, v, m, tokens,
        SERIES=scale is not None, JOINED=s is not None, SCORE=score is not None,
        STAGES=0 if stages is None else stages.shape[1], **arguments,
    )  # fmt: skip
    return v, None if m is None else m.sum(0)


def backward(
    dv: Tensor,
    dm: Tensor | None,
    p: Tensor,
    scale: Tensor | None,
    s: Tensor | None,
    weight: Tensor,
    bias: Tensor,
    score: Tensor | None,
    stages: Tensor | None,
    degrees: tuple[int, ...],
) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor]:
    """Gradients for `forward`'s arguments: dz, along, ds, dweight, dchannels.

    dz `(tokens, d)` is p's gradient, or with a scale that of z = p / RMS(p), and then along
    `(tokens,)` is Σ dz·p of each token: together they make p's gradient, which needs whole rows.
    ds `(tokens, d)` is that of the output before the score, and so s's if there is an s.
    dchannels, `(rows, d)` float32: gradients of the bias, then of the score, else of the stages'
    α, a, b.
    """
    tokens, d = p.shape
    device = p.device
    chunks, arguments = _shape(weight, degrees, tokens, _BACKWARD)
    count = 0 if stages is None or score is not None else stages.shape[1]
    tiles = max(1, triton.cdiv(tokens, arguments["TOKENS"]))
    dz, z, dy = torch.empty_like(p), torch.empty_like(p), torch.empty_like(p)
    along = None
    if scale is not None:
        along = torch.empty((chunks, tokens), dtype=torch.float32, device=device)
    rows_ = 1 + (score is not None) + 3 * count
    sums = torch.empty((tiles, rows_, d), dtype=torch.float32, device=device)
    _backward[(chunks * tiles,)](
        dv, dm, p, scale, s, weight, bias, score, stages, dz, along, z, dy, sums, tokens,
        SERIES=scale is not None, JOINED=s is not None, SCORE=score is not None, STAGES=count,
        **arguments,
    )  # fmt: skip

    size = rows(weight.shape[2], tokens, 2048, least=16)
    splits = max(1, min(_SPLITS, triton.cdiv(tokens, 4 * size)))
    dweight = torch.empty((splits, *weight.shape), dtype=torch.float32, device=device)
    _weights[(splits * weight.shape[1],)](
        z, dy, dweight, tokens,
        G=weight.shape[1], S=weight.shape[2], DEGREES=arguments["DEGREES"], LAST=degrees[-1],
        COUNT=len(degrees), SPLITS=splits, TOKENS=size, num_warps=1 if weight.shape[2] == 16 else 4,
    )  # fmt: skip
    return dz, None if along is None else along.sum(0), dy, dweight.sum(0), sums.sum(0)
