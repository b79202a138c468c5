"""Cheap corrections after the polynomial: SparseMicroRefine a channel, TokenFeedback a token."""

from __future__ import annotations

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_gpt.model.config import FeedbackConfig, RefineConfig, check_divides
from sparse_gpt.model.flops import FlopCount

THRESHOLD_RATE = 0.1  # step of TokenFeedback's running statistics, a forward pass


class SparseMicroRefine(nn.Module):
    """v ← v + α ⊙ SiLU(a ⊙ v + b), stacked: a Linear(1→1) for every channel and stage.

    `(..., d_model) -> (..., d_model)`; α = 0.1, a = 1, b = 0 at the start.
    """

    def __init__(self, d_model: int, config: RefineConfig) -> None:
        super().__init__()
        self.d_model = d_model
        stages = range(config.stages)
        self.alpha = nn.ParameterList(torch.full((d_model,), 0.1) for _ in stages)
        self.a = nn.ParameterList(torch.ones(d_model) for _ in stages)
        self.b = nn.ParameterList(torch.zeros(d_model) for _ in stages)

    def forward(self, v: Tensor) -> Tensor:
        """The refined tokens, in v's dtype."""
        for alpha, a, b in zip(self.alpha, self.a, self.b, strict=True):
            v = torch.addcmul(v, alpha, F.silu(torch.addcmul(b, a, v)))
        return v

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """4 MAC-equivalents a channel and stage; 6 operations (SiLU: sigmoid and multiply)."""
        work = batch * seq * self.d_model * len(self.alpha)
        return FlopCount(elementwise=6 * work, mac_equivalents=4 * work)


class TokenFeedback(nn.Module):
    """v ← v + 1[m > θ]·σ(m)·B(A v) with m = wᵀv, repeated, for about a share ρ of the tokens.

    `(..., d_model) -> (..., d_model)`. A and B are block-diagonal over `groups` channel groups,
    with `rank` inner dimensions in each group. B starts at 0, so the part starts as the identity.
    The batch is computed whole, under the mask.

    θ, the running (1 − ρ)-quantile of m, is a float32 buffer without gradient. Training reads it
    before moving it: a token's output depends on past batches only, never on its neighbours.
    Under data parallelism each rank follows its own batches: average the buffers over the ranks.
    Raises ValueError when groups does not divide d_model.
    """

    threshold: Tensor
    scale: Tensor

    def __init__(self, d_model: int, config: FeedbackConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        check_divides("feedback.groups", config.groups, d_model)
        width = d_model // config.groups
        self.score = nn.Parameter(torch.randn(d_model) / math.sqrt(d_model))
        self.a = nn.Parameter(torch.randn(config.groups, width, config.rank) / math.sqrt(width))
        self.b = nn.Parameter(torch.zeros(config.groups, config.rank, width))
        quantile = NormalDist().inv_cdf(1 - config.share)  # right for m ~ N(0, 1)
        self.register_buffer("threshold", torch.tensor(quantile, dtype=torch.float32))
        self.register_buffer("scale", torch.ones((), dtype=torch.float32))

    def forward(self, v: Tensor) -> Tensor:
        """The corrected tokens, in v's dtype; in training mode θ then takes one step."""
        m = self._scores(v)
        selected = m.detach().float() > self.threshold
        gate = torch.sigmoid(m) * selected  # (tokens, 1)
        grouped = v.reshape(len(m), self.config.groups, -1)
        for _ in range(self.config.iterations):
            step = torch.bmm(torch.bmm(grouped.transpose(0, 1), self.a), self.b)
            grouped = torch.addcmul(grouped, gate.unsqueeze(1), step.transpose(0, 1))
        if self.training:
            self._follow(m.detach().float(), selected)
        return grouped.reshape(v.shape)

    def _scores(self, v: Tensor) -> Tensor:
        # A matrix of one row: FLOP counters see matmuls and no matrix-vector products.
        return F.linear(v.reshape(-1, self.d_model), self.score.unsqueeze(0))

    @torch.no_grad()
    def _follow(self, m: Tensor, selected: Tensor) -> None:
        """One step of θ towards the quantile (Robbins & Monro 1951), in units of std(m)."""
        self.scale.lerp_(m.std(correction=0), THRESHOLD_RATE)
        excess = selected.float().mean() - self.config.share
        self.threshold.add_(THRESHOLD_RATE * self.scale * excess)

    @torch.no_grad()
    def sparsity(self, x: Tensor) -> Tensor:
        """Share of tokens selected for this part's input, float32 `()`."""
        return (self._scores(x).float() > self.threshold).float().mean()

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> TokenFeedback:
        # Casting a module casts its buffers, and steps this small would vanish in bfloat16.
        exact = {name: buffer for name, buffer in self._buffers.items() if buffer is not None}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in exact.items():
            moved = getattr(self, name)
            setattr(self, name, moved.float() if buffer.is_meta else buffer.to(moved.device))
        return self

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """d + iterations·2·d·rank MACs, executed for every token.

        Elementwise operations: compare, sigmoid and mask a token, 2 a channel and iteration.
        """
        tokens, d = batch * seq, self.d_model
        steps = tokens * self.config.iterations * 2 * d * self.config.rank
        macs = tokens * d + steps
        return FlopCount(
            matmul=2 * macs,
            masked=round((1 - self.config.share) * 2 * steps),
            elementwise=tokens * (3 + 2 * d * self.config.iterations),
            mac_equivalents=macs,
        )
