"""TokenFeedback's steps, whose gate is known, and the refine stages; the backward.

A tile is some tokens by one channel group; inner dimensions are padded to what a matmul needs.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparse_gpt.model.ffn.kernels.refine import refine, refine_backward
from sparse_gpt.model.ffn.kernels.tiles import dot, power_of_two, rows

_ELEMENTS = 4096  # of a tile


@triton.jit
def _factors(
    a_ptr, b_ptr, group, W: tl.constexpr, R: tl.constexpr, WIDTH: tl.constexpr,
    RANK: tl.constexpr, dtype: tl.constexpr,
):  # fmt: skip
    """A `[WIDTH, RANK]` and B `[RANK, WIDTH]` of a group, padded with zeros."""
    c = tl.arange(0, WIDTH)
    r = tl.arange(0, RANK)
    at = group * W * R
    a = tl.load(a_ptr + at + c[:, None] * R + r[None, :], (c < W)[:, None] & (r < R)[None, :], 0.0)
    b = tl.load(b_ptr + at + r[:, None] * W + c[None, :], (r < R)[:, None] & (c < W)[None, :], 0.0)
    return a.to(dtype), b.to(dtype)


@triton.jit
def _forward(
    v_ptr,
    gate_ptr,
    a_ptr,
    b_ptr,
    stages_ptr,
    y_ptr,
    tokens,
    GROUPS: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    D: tl.constexpr = GROUPS * W
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    group = tl.program_id(0) % GROUPS
    t = (tl.program_id(0) // GROUPS).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, WIDTH)[None, :]
    channel = group * W + c
    at = t[:, None] * D + channel
    live = (t < tokens)[:, None] & (c < W)
    a, b = _factors(a_ptr, b_ptr, group, W, R, WIDTH, RANK, dtype)
    gate = tl.load(gate_ptr + t, t < tokens, 0.0)[:, None]
    v = tl.load(v_ptr + at, live, 0.0).to(tl.float32)
    for _ in tl.static_range(STEPS):
        v += gate * dot(dot(v, a, dtype), b, dtype)
    v = refine(v, stages_ptr, channel, c < W, D, STAGES)
    tl.store(y_ptr + at, v.to(dtype), live)


@triton.jit
def _backward(
    dy_ptr,
    v_ptr,
    gate_ptr,
    a_ptr,
    b_ptr,
    stages_ptr,
    dv_ptr,
    dgate_ptr,
    da_ptr,
    db_ptr,
    sums_ptr,
    tokens,
    GROUPS: tl.constexpr,
    W: tl.constexpr,
    R: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
    TOKENS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANK: tl.constexpr,
):
    D: tl.constexpr = GROUPS * W
    dtype: tl.constexpr = v_ptr.dtype.element_ty
    group = tl.program_id(0) % GROUPS
    tile = (tl.program_id(0) // GROUPS).to(tl.int64)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    c = tl.arange(0, WIDTH)[None, :]
    channel = group * W + c
    at = t[:, None] * D + channel
    live = (t < tokens)[:, None] & (c < W)
    a, b = _factors(a_ptr, b_ptr, group, W, R, WIDTH, RANK, dtype)
    gate = tl.load(gate_ptr + t, t < tokens, 0.0)[:, None]
    v = tl.load(v_ptr + at, live, 0.0).to(tl.float32)
    inputs = ()
    for _ in tl.static_range(STEPS):
        inputs = inputs + (v,)  # type: ignore  # noqa: RUF005
        v += gate * dot(dot(v, a, dtype), b, dtype)

    dv = tl.load(dy_ptr + at, live, 0.0).to(tl.float32)
    sums = sums_ptr + tile * 3 * STAGES * D
    dv = refine_backward(v, dv, stages_ptr, sums, channel, c < W, D, STAGES, 0)
    dgate = tl.zeros((TOKENS,), tl.float32)
    da = tl.zeros((WIDTH, RANK), tl.float32)
    db = tl.zeros((RANK, WIDTH), tl.float32)
    for back in tl.static_range(STEPS):
        v = inputs[STEPS - 1 - back]
        low = dot(v, a, dtype)
        dgate += tl.sum(dv * dot(low, b, dtype), 1)
        dstep = gate * dv
        dlow = dot(dstep, tl.trans(b), dtype)
        db += dot(tl.trans(low), dstep, dtype)
        da += dot(tl.trans(v), dlow, dtype)
        dv += dot(dlow, tl.trans(a), dtype)
    tl.store(dv_ptr + at, dv.to(dtype), live)
    tl.store(dgate_ptr + group.to(tl.int64) * tokens + t, dgate, t < tokens)
    r = tl.arange(0, RANK)
    c = tl.arange(0, WIDTH)
    out = (tile * GROUPS + group) * W * R
    mask = (c < W)[:, None] & (r < R)[None, :]
    tl.store(da_ptr + out + c[:, None] * R + r[None, :], da, mask)
    mask = (r < R)[:, None] & (c < W)[None, :]
    tl.store(db_ptr + out + r[:, None] * W + c[None, :], db, mask)


def _shape(a: Tensor, stages: Tensor | None, steps: int, tokens: int) -> dict[str, Any]:
    groups, width, rank = a.shape
    wide = power_of_two(width, 16)
    return {
        "GROUPS": groups,
        "W": width,
        "R": rank,
        "STEPS": steps,
        "STAGES": 0 if stages is None else stages.shape[1],
        "TOKENS": rows(wide, tokens, _ELEMENTS, least=16),
        "WIDTH": wide,
        "RANK": power_of_two(rank, 16),
        "num_warps": 8,
    }


def forward(
    v: Tensor, gate: Tensor, a: Tensor, b: Tensor, stages: Tensor | None, steps: int
) -> Tensor:
    """v `(tokens, d)` after the gated steps and the refine stages, in v's dtype.

    gate: `(tokens,)` float32. a `(groups, width, rank)`, b `(groups, rank, width)`.
    """
    tokens = len(v)
    y = torch.empty_like(v)
    shape = _shape(a, stages, steps, tokens)
    grid = (max(1, triton.cdiv(tokens, shape["TOKENS"])) * len(a),)
    _forward[grid](v, gate, a, b, stages, y, tokens, **shape)
    return y


def backward(
    dy: Tensor, v: Tensor, gate: Tensor, a: Tensor, b: Tensor, stages: Tensor | None, steps: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of v, gate `(tokens,)`, a, b, and the stages `(3·stages, d)`; float32 but v's."""
    tokens, d = v.shape
    shape = _shape(a, stages, steps, tokens)
    tiles = max(1, triton.cdiv(tokens, shape["TOKENS"]))
    dv = torch.empty_like(v)
    dgate, da, db, sums = (
        torch.empty(size, dtype=torch.float32, device=v.device)
        for size in (
            (len(a), tokens),
            (tiles, *a.shape),
            (tiles, *b.shape),
            (tiles, 3 * shape["STAGES"], d),
        )
    )
    _backward[(tiles * len(a),)](
        dy, v, gate, a, b, stages, dv, dgate, da, db, sums, tokens, **shape
    )  # fmt: skip
    return dv, dgate.sum(0), da.sum(0), db.sum(0), sums.sum(0)
