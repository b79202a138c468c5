"""UltraEfficientSparseFFN on a GPU in a few Triton kernels instead of a hundred.

`fused_ffn(ffn, x)` is `ffn(x)` without dropout. `fused.py` strings the kernels together and is
what autograd, torch.compile and FLOP counters see; `spectral.py`, `polynomial.py`, `feedback.py`
and `norm.py` hold one stage each; `refine.py` and `tiles.py` are shared. Triton is imported by
the first call. On the CPU the kernels run, slowly, where TRITON_INTERPRET=1 was set at the start.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparse_gpt.model.config import SparseFFNConfig

if TYPE_CHECKING:
    from sparse_gpt.model.ffn.sparse import UltraEfficientSparseFFN

__all__ = ["available", "fused_ffn", "suits", "unsupported"]

_MAX_WIDTH = 4096  # channels: a tile holds whole tokens in registers
_MAX_FACTOR = 128  # of the transform, a matrix in shared memory
_MAX_GROUP = 512  # channels of a feedback group, likewise
_MAX_RANK = 64
_HAS_TRITON = importlib.util.find_spec("triton") is not None


def available(device: torch.device | str) -> bool:
    """Whether kernels can run on a device: CUDA with Triton, or Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return _HAS_TRITON and (torch.device(device).type == "cuda" or interpreted)


def suits(x: Tensor) -> bool:
    """Whether x is on a GPU, and of a dtype (autocast's where that is on) that has kernels."""
    kind = x.device.type
    autocast = torch.is_autocast_enabled(kind)
    dtype = torch.get_autocast_dtype(kind) if autocast else x.dtype
    return x.is_cuda and dtype in (torch.float32, torch.bfloat16)


def unsupported(config: SparseFFNConfig, d_model: int) -> str | None:
    """One line naming the first value that the kernels cannot do, or None."""
    spectral, polynomial, feedback = config.spectral, config.polynomial, config.feedback
    if d_model % 16 or d_model > _MAX_WIDTH:
        return f"d_model {d_model}: kernels need a multiple of 16 up to {_MAX_WIDTH}"
    if spectral:
        factors = spectral.split(d_model)
        if max(factors) > _MAX_FACTOR:
            return f"spectral.factors {factors}: kernels need both at most {_MAX_FACTOR}"
    if polynomial.group_size not in (16, 32, 64):
        return f"polynomial.group_size {polynomial.group_size}: kernels need 16, 32 or 64"
    if feedback and d_model // feedback.groups > _MAX_GROUP:
        width = d_model // feedback.groups
        return f"feedback.groups {feedback.groups}: {width} channels a group, not {_MAX_GROUP}"
    if feedback and feedback.rank > _MAX_RANK:
        return f"feedback.rank {feedback.rank}: kernels need at most {_MAX_RANK}"
    return None


def fused_ffn(ffn: UltraEfficientSparseFFN, x: Tensor) -> Tensor:
    """`ffn(x)` but for dropout: `(..., d_model) -> (..., d_model)`, float32 or bfloat16.

    Equal to the eager chain up to rounding, gradients too; in training TokenFeedback's θ takes
    its step. Element-wise work is float32; matmul operands have x's dtype, or autocast's, which
    is then the result's as with F.linear. Parameters may be float32 or bfloat16, whatever x is.
    Backward keeps x and 28 bytes a token, and computes the rest again.

    Raises ValueError for an option, device or dtype that has no kernel.
    """
    problem = unsupported(ffn.config, x.shape[-1])
    if problem is None and not available(x.device):
        problem = f"no kernels for device {x.device}: CUDA and Triton are needed"
    if problem:
        raise ValueError(f"fused_ffn: {problem}")
    from sparse_gpt.model.ffn.kernels.fused import run

    return run(ffn, x)
