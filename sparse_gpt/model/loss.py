"""The output head's cross-entropy, whose logits are never held whole.

Logits of 50k ids for every token are the largest tensor of a small model's training, several times
over (softmax, gradient). Here a chunk of tokens at a time goes through head, softmax and both
products of the backward, so that of each chunk only a sum of losses and two gradients remain; the
backward merely scales these. The products are those of the plain way: nothing is computed twice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""The target of a token that has no share in the loss."""

# Bytes of one chunk's float32 logits. Each chunk costs a pass over the head's gradient; on two CPU
# cores 64 MiB (333 tokens of 50k ids) were as fast as any larger, a GPU wants thousands of tokens.
_CHUNK_BYTES = {"cpu": 2**26, "cuda": 2**29}


def chunk_size(tokens: int, width: int, device: torch.device) -> int:
    """Tokens of each chunk of `tokens`, whose logits are `width` wide."""
    most = max(1, _CHUNK_BYTES["cpu" if device.type == "cpu" else "cuda"] // (4 * width))
    return -(-tokens // -(-tokens // most)) if tokens else 1


def head_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int | None = None
) -> Tensor:
    """Mean cross-entropy in nats of the logits `hidden @ weight.T`, float32 or wider, `()`.

    hidden: `(tokens, d)`. weight: `(rows, d)`, of which the first `vocab_size` take part. targets:
    `(tokens,)` int64; IGNORED ones have no share, and where all are ignored the mean is nan.
    `chunk` tokens at a time, by default `chunk_size`.
    """
    size = chunk or chunk_size(len(hidden), len(weight), hidden.device)
    differentiate = torch.is_grad_enabled()
    total: Tensor = _SummedLoss.apply(hidden, weight, targets, vocab_size, size, differentiate)  # type: ignore[no-untyped-call]
    return total / (targets != IGNORED).sum()


class _SummedLoss(torch.autograd.Function):
    """The losses' sum. Its gradients wait unscaled: a half-precision mean's would underflow."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        vocab_size: int,
        chunk: int,
        differentiate: bool,
    ) -> Tensor:
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = torch.zeros((), dtype=exact, device=hidden.device)
        if differentiate:
            d_hidden = torch.empty_like(hidden)
            d_weight = torch.zeros_like(weight, dtype=exact)
        for start in range(0, len(hidden), chunk):
            h, goal = hidden[start : start + chunk], targets[start : start + chunk]
            logits = h @ weight.t()
            logits[:, vocab_size:] = float("-inf")  # in place: a slice would be a copy
            log_p = torch.log_softmax(logits, -1, dtype=exact)
            del logits
            total += F.nll_loss(log_p, goal, ignore_index=IGNORED, reduction="sum")
            if differentiate:
                kept = (goal != IGNORED).unsqueeze(1)
                index = goal.unsqueeze(1).clamp(min=0)
                d_logits = log_p.exp_().scatter_add_(1, index, torch.full_like(log_p[:, :1], -1))
                d_logits = d_logits.mul_(kept).to(h.dtype)
                del log_p
                torch.mm(d_logits, weight, out=d_hidden[start : start + chunk])
                if d_weight.dtype == h.dtype:
                    torch.addmm(d_weight, d_logits.t(), h, out=d_weight)
                else:
                    d_weight += d_logits.t() @ h
                del d_logits  # or the next chunk would find no room in its place
        if differentiate:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, scale: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        scaled = torch.empty_like(d_weight, dtype=ctx.dtype)
        torch.mul(d_weight, scale, out=scaled)
        return d_hidden * scale, scaled, None, None, None, None
