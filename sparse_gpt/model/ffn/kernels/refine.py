"""The refine stages as the epilogue of another kernel: `refine` and its backward, any layout.

`stages` points to `(3, STAGES, D)` float32: α, a and b. `channel` is the channel of each element,
broadcastable to the tile; padded channels compute with zeros.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _stage(stages_ptr, stage, channel, real, D: tl.constexpr, STAGES: tl.constexpr):
    at = stages_ptr + stage * D + channel
    alpha = tl.load(at, real, 0.0)
    a = tl.load(at + STAGES * D, real, 0.0)
    b = tl.load(at + 2 * STAGES * D, real, 0.0)
    return alpha, a, b


@triton.jit
def refine(v, stages_ptr, channel, real, D: tl.constexpr, STAGES: tl.constexpr):
    """v ← v + α·SiLU(a·v + b), STAGES times."""
    for stage in tl.static_range(STAGES):
        alpha, a, b = _stage(stages_ptr, stage, channel, real, D, STAGES)
        w = a * v + b
        v = v + alpha * w * tl.sigmoid(w)
    return v


@triton.jit
def refine_backward(
    v, dv, stages_ptr, sums_ptr, channel, real, D: tl.constexpr, STAGES: tl.constexpr,
    AXIS: tl.constexpr,
):  # fmt: skip
    """The gradient of v from that of `refine(v)`; sums over axis AXIS go to sums `(3, STAGES, D)`.

    Rows that are no token must have dv = 0.
    """
    inputs = ()
    for stage in tl.static_range(STAGES):
        inputs = inputs + (v,)  # type: ignore  # noqa: RUF005
        alpha, a, b = _stage(stages_ptr, stage, channel, real, D, STAGES)
        w = a * v + b
        v = v + alpha * w * tl.sigmoid(w)
    for back in tl.static_range(STAGES):
        v = inputs[STAGES - 1 - back]
        at = sums_ptr + (STAGES - 1 - back) * D + channel
        alpha, a, b = _stage(stages_ptr, STAGES - 1 - back, channel, real, D, STAGES)
        w = a * v + b
        sigmoid = tl.sigmoid(w)
        dw = dv * alpha * sigmoid * (1 + w * (1 - sigmoid))
        tl.store(at, tl.sum(dv * w * sigmoid, AXIS, keep_dims=True), real)
        tl.store(at + STAGES * D, tl.sum(dw * v, AXIS, keep_dims=True), real)
        tl.store(at + 2 * STAGES * D, tl.sum(dw, AXIS, keep_dims=True), real)
        dv = dv + dw * a
    return dv
