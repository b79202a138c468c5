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


_ALIKE = 4  # rows from which on a CPU's products treat each alike (measured, MKL)


@torch.library.custom_op("sparse_gpt::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """rows of group b times weight[b]: `(n, a)`, `(groups, a, c)` -> `(n, c)`, in rows' dtype.

    Group b is the rows from ends[b - 1] to ends[b]; ends is int32 `(groups,)` and ends with n.
    """
    on_cpu = rows.device.type == "cpu"
    at_once = chosen_product(rows.device, rows.dtype, *weight.shape[1:]) == "grouped_mm"
    if on_cpu and len(rows) < _ALIKE * len(ends):  # as in decoding: nearly all would be done twice
        at_once = False
    out = (
        F.grouped_mm(rows, weight, offs=ends)
        if at_once
        else rows.new_empty(len(rows), weight.shape[2])
    )
    if not at_once or on_cpu:
        start = 0
        for b, end in enumerate(ends.tolist()):
            if start < end and not (at_once and end - start >= _ALIKE):
                out[start:end] = _product(rows[start:end], weight[b])
            start = end
    return out


def _product(rows: Tensor, matrix: Tensor) -> Tensor:
    """A product in which a row's bits do not depend on how many rows there are beside it: a few
    go another way through a CPU's library, and a token would feel whom it shares a block with."""
    missing = _ALIKE - len(rows)
    if rows.device.type == "cpu" and missing > 0:
        return (F.pad(rows, (0, 0, 0, missing)) @ matrix)[: len(rows)]
    return rows @ matrix


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
