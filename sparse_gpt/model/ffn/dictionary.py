"""BlockDictionary: a learned spectrum in blocks, of which a token computes those of most energy."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sparse_gpt.model.config import DictionaryConfig
from sparse_gpt.model.ffn.grouped import grouped_outer, grouped_product
from sparse_gpt.model.ffn.routing import Exchange, Places, Route
from sparse_gpt.model.flops import FlopCount


class Spectrum(torch.autograd.Function):
    """Σ_b e_b V_b p(U_b h) over a token's blocks b, with p(c) = c + c²/2.

    h `(tokens, d)`, energies float32 `(tokens, k)`, analysis U `(blocks, d, s)`, synthesis V
    `(blocks, s, d)`, then the tokens' `Places`; `(tokens, d)` in h's dtype. Saves h and the
    coefficients c and makes the rest again: what is no product is passes over memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        energies: Tensor,
        analysis: Tensor,
        synthesis: Tensor,
        order: Tensor,
        rows: Tensor,
        ends: Tensor,
    ) -> Tensor:
        gain = energies.flatten()[order].unsqueeze(1).to(h.dtype)
        c = grouped_product(h.index_select(0, order // rows.shape[1]), analysis, ends)
        ctx.save_for_backward(h, gain, analysis, synthesis, order, rows, ends, c)
        p = polynomial(c).mul_(gain)
        return F.embedding_bag(rows, grouped_product(p, synthesis, ends), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, gain, analysis, synthesis, order, rows, ends, c = ctx.saved_tensors
        token = order // rows.shape[1]
        grad = grad.index_select(0, token)
        p = polynomial(c)
        d_p = grouped_product(grad, synthesis.transpose(1, 2), ends)
        wide = torch.promote_types(c.dtype, torch.float32)
        d_energies = (d_p * p).sum(-1, dtype=wide)[rows]
        d_synthesis = grouped_outer(p.mul_(gain), grad, ends)
        d_c = torch.addcmul(d_p, d_p, c).mul_(gain)  # p' = 1 + c
        d_analysis = grouped_outer(h.index_select(0, token), d_c, ends)
        back = grouped_product(d_c, analysis.transpose(1, 2), ends)
        d_h = F.embedding_bag(rows, back, mode="sum")
        return d_h, d_energies, d_analysis, d_synthesis, None, None, None


def polynomial(c: Tensor) -> Tensor:
    """c + c²/2 = T₁(c) + (T₂(c) + T₀(c))/4. Coefficients of its own would be nothing more to
    learn: the sizes of an atom's analysis and synthesis are both."""
    return torch.addcmul(c, c, c, value=0.5)


class BlockDictionary(nn.Module):
    """Σ_{b ∈ S} e_b V_b p(U_b h): a dictionary of `blocks` blocks of atoms stands for the
    frequencies of a spectrum, and only the coefficients that a token keeps are computed.

        e = softmax(R h + β)              the blocks' energies; β follows the load
        S = the top_k blocks of e
        c_b = U_b h                       analysis
        p(c) = c + c²/2                   T₁ + (T₂ + T₀)/4, a polynomial of the spectrum
        V_b                               synthesis

    `(..., d_model) -> (..., d_model)`. Blocks are chosen for a token by itself, none is dropped.
    β is `balance_rate` times a whole number, `moves`; `loads` adds up what blocks were given in
    training mode, and `balance` then moves β, without a gradient. Both are int64 buffers: exact in
    any precision, over any number of ranks. Wang et al. (2024, arXiv 2408.15664) have β in the
    choice alone; in the energies too, blocks that it chooses at the start, where tokens are all
    alike, have energy to learn by (docs/sparse-ffn.md).

    With an `exchange`, `analysis` and `synthesis` are this rank's blocks alone, as many on each
    rank; what is computed of a token is the same to the bit.

    Raises ValueError when the shapes do not suit d_model.
    """

    loads: Tensor
    moves: Tensor

    def __init__(self, d_model: int, config: DictionaryConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.size = size = config.size(d_model)
        self.router = nn.Linear(d_model, config.blocks, bias=False)
        self.analysis = nn.Parameter(torch.empty(config.blocks, d_model, size))
        self.synthesis = nn.Parameter(torch.empty(config.blocks, size, d_model))
        nn.init.normal_(self.router.weight, std=1 / math.sqrt(d_model))
        nn.init.normal_(self.analysis, std=1 / math.sqrt(d_model))
        nn.init.normal_(self.synthesis, std=1 / math.sqrt(config.top_k * size))
        self.register_buffer("loads", torch.zeros(config.blocks, dtype=torch.int64))
        self.register_buffer("moves", torch.zeros(config.blocks, dtype=torch.int64))
        self.exchange: Exchange | None = None

    def forward(self, h: Tensor) -> Tensor:
        """The synthesised tokens, in h's dtype; in training mode loads are counted."""
        tokens = h.reshape(-1, self.d_model)
        energies, chosen = self.route(tokens)
        inference = not (self.training or torch.is_grad_enabled()) and self.exchange is None
        if inference and h.is_cpu and 4 * chosen.numel() <= self.config.blocks:
            return self._one_by_one(tokens, energies, chosen).reshape(h.shape)
        places = Places.of(chosen, self.config.blocks)
        if self.training:
            self.loads.add_(places.loads())
        if self.exchange is None:
            y = self._spectrum(tokens, energies, places)
        else:
            y = self._exchanged(tokens, energies, places)
        return y.reshape(h.shape)

    def _spectrum(self, h: Tensor, energies: Tensor, places: Places) -> Tensor:
        y: Tensor = Spectrum.apply(h, energies, self.analysis, self.synthesis, *places)  # type: ignore[no-untyped-call]
        return y

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # how many rows come is known only when they come
    def _exchanged(self, tokens: Tensor, energies: Tensor, places: Places) -> Tensor:
        """As `_spectrum`: the rows are computed where their blocks are, as tokens of one block."""
        assert self.exchange is not None
        rows = tokens.index_select(0, places.order // places.rows.shape[1])
        gains = energies.flatten().index_select(0, places.order).unsqueeze(1)
        there = self.exchange(rows, gains, places.loads())
        own = Places.of(there.blocks, len(self.analysis))
        y = there.back(self._spectrum(there.rows, there.gains, own))
        return F.embedding_bag(places.rows, y, mode="sum")

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and numbers of the blocks that tokens `(tokens, d_model)` compute, each
        `(tokens, top_k)`, float32 or wider and int64."""
        k = self.config.top_k
        routed: tuple[Tensor, Tensor] = Route.apply(self.router(tokens), self.beta, k)  # type: ignore[no-untyped-call]
        return routed

    def _one_by_one(self, tokens: Tensor, energies: Tensor, chosen: Tensor) -> Tensor:
        """As `Spectrum`, for the few tokens of a step of decoding on a CPU: each block is read
        where it lies, and nothing is sorted, which would cost as much as the products."""
        y, gains = torch.zeros_like(tokens), energies.to(tokens.dtype)
        for i, blocks in enumerate(chosen.tolist()):
            for j, b in enumerate(blocks):
                p = polynomial(tokens[i : i + 1] @ self.analysis[b]).mul_(gains[i, j])
                y[i : i + 1] += p @ self.synthesis[b]
        return y

    @property
    def beta(self) -> Tensor:
        """What each block's logit is moved by, float32 `(blocks,)`."""
        return self.config.balance_rate * self.moves

    @torch.no_grad()
    def balance(self) -> None:
        """One step of β, after an optimizer step, by what the blocks were given in it: up for
        those with less than their share, down for those with more."""
        self.moves.add_((self.loads.sum() - self.loads * self.config.blocks).sign())

    @torch.no_grad()
    def energy_entropy(self, h: Tensor) -> Tensor:
        """Mean entropy of the tokens' energies in nats, float32 `()`; ln(blocks) at most."""
        logits = self.router(h.reshape(-1, self.d_model)).float() + self.beta
        entropy: Tensor = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()
        return entropy

    def sparsity(self, h: Tensor) -> Tensor:
        """Share of the dictionary computed for a token, float32 `()`."""
        return torch.tensor(self.config.top_k / self.config.blocks, device=h.device)

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """d·blocks MACs of energies and 2·top_k·d·s of analysis and synthesis a token.

        Operations: softmax 4 a block (maximum, subtract, exp, divide), 1 for β, top_k for the
        choice; 4 a coefficient (c · c, · ½, + c, · e); top_k a channel (their sum, onto P h).
        MAC-equivalents: 3 a coefficient, and one a block for β.
        """
        tokens, d, blocks, k = batch * seq, self.d_model, self.config.blocks, self.config.top_k
        products = tokens * (d * blocks + 2 * k * self.size * d)
        return FlopCount(
            matmul=2 * products,
            elementwise=tokens * ((5 + k) * blocks + 4 * k * self.size + k * d),
            mac_equivalents=products + tokens * (3 * k * self.size + blocks),
        )
