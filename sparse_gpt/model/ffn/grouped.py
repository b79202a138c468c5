"""Products of rows with a matrix each group of rows has for itself, as custom operators.

`torch.nn.functional.grouped_mm` does the work, where it can. Called directly it cannot be used
(torch 2.13): its shape function refuses fp32 under `torch.compile`, FLOP counters take it for
nothing, and it refuses float64 and rows that are no multiple of 16 bytes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula


def chosen_product(
    device: torch.device, dtype: torch.dtype, *widths: int
) -> Literal["grouped_mm", "loop"]:
    """How rows and matrices of these widths are multiplied: at once, or group by group.

    On CUDA one kernel does bfloat16 alone and needs compute capability 9.0; elsewhere torch loops
    itself, after asking the device for the groups' sizes as our loop does.
    """
    types = {torch.float32, torch.bfloat16} if device.type == "cpu" else {torch.bfloat16}
    if dtype not in types or any(width * dtype.itemsize % 16 for width in widths):
        return "loop"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0):
        return "loop"
    return "grouped_mm"


@torch.library.custom_op("sparse_gpt::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows of group b times weight[b]: `(n, a)`, `(groups, a, c)` -> `(n, c)`, in rows' dtype.

    Group b is the rows from ends[b - 1] to ends[b]; ends is int32 `(groups,)` and ends with n.
    """
    if chosen_product(rows.device, rows.dtype, *weight.shape[1:]) == "grouped_mm":
        return F.grouped_mm(rows, weight, offs=ends)
    out, start = rows.new_empty(len(rows), weight.shape[2]), 0
    for b, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end], weight[b], out=out[start:end])
        start = end
    return out


@torch.library.custom_op("sparse_gpt::grouped_outer", mutates_args=())
def grouped_outer(rows: Tensor, grads: Tensor, ends: Tensor) -> Tensor:
    """The gradient of `grouped_product`'s weight: rows of group b, transposed, times its grads.

    `(n, a)`, `(n, c)` -> `(groups, a, c)`, 0 for a group without rows.
    """
    if chosen_product(rows.device, rows.dtype, rows.shape[1], grads.shape[1]) == "grouped_mm":
        return F.grouped_mm(rows.t(), grads, offs=ends)
    out, start = rows.new_empty(len(ends), rows.shape[1], grads.shape[1]), 0
    for b, end in enumerate(ends.tolist()):
        torch.mm(rows[start:end].t(), grads[start:end], out=out[b])
        start = end
    return out


@grouped_product.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(rows), weight.shape[2])


@grouped_outer.register_fake
def _(rows: Tensor, grads: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(len(ends), rows.shape[1], grads.shape[1])


@register_flop_formula(torch.ops.sparse_gpt.grouped_product)
def _product_flops(rows: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * rows.numel() * weight[2]


@register_flop_formula(torch.ops.sparse_gpt.grouped_outer)
def _outer_flops(rows: torch.Size, grads: torch.Size, *_: object, **__: object) -> int:
    return 2 * rows.numel() * grads[1]
