"""What all kernels share: tile sizes, the matmul in the activations' precision, reductions.

Every kernel computes element-wise work and sums in float32 and gives matmuls operands of the
activations' dtype. Sums over tokens are written as one partial sum a program and added up by
torch: no atomics, so a result depends on nothing but its inputs.
"""

# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

EPS = 1e-5  # of nn.LayerNorm
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
RMS_EPS = tl.constexpr(1e-6)  # of the polynomial's renormalisation


def power_of_two(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least n and `least`."""
    return max(least, int(triton.next_power_of_2(n)))


def rows(width: int, tokens: int, elements: int, least: int = 1, most: int = 64) -> int:
    """Tokens in a tile of `width` channels, a power of two: about `elements` in the tile.

    At most as many as there are: a small batch need not pay for empty rows.
    """
    return max(least, min(most, elements // width, power_of_two(tokens)))


@triton.jit
def dot(a, b, dtype: tl.constexpr, total=None):
    """a @ b, plus total, in float32 from operands of a dtype (float32 is not rounded to TF32)."""
    a = a.to(dtype)
    b = b.to(dtype)
    if INTERPRETED:  # whose matmul takes bfloat16 for integers; the products are exact anyway
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def tanh(x):
    """tanh with an absolute error of a few 1e-8; exp never overflows."""
    e = tl.exp(-2 * tl.abs(x))
    y = (1 - e) / (1 + e)
    return tl.where(x < 0, -y, y)
