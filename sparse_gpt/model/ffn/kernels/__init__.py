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

from sparse_gpt.model.ffn.kernels.limits import unsupported

if TYPE_CHECKING:
    from sparse_gpt.model.ffn.sparse import UltraEfficientSparseFFN

__all__ = ["available", "fused_ffn", "suits", "unsupported"]

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
