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
from sparse_gpt.model.ffn.routing import Places, Route
from sparse_gpt.model.flops import FlopCount


class Spectrum(torch.autograd.Function):
    """Σ_b e_b V_b p(U_b h) over a token's blocks b, with p(c) = a₁ T₁(c) + a₂ (T₂(c) + T₀(c)).

    h `(tokens, d)`, energies float32 `(tokens, k)`, analysis U `(blocks, d, s)`, synthesis V
    `(blocks, s, d)`, a `(2,)`, then the tokens' `Places`; `(tokens, d)` in h's dtype. Saves h and
    the coefficients c and makes the rest again: what is no product is passes over memory.
    """

    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        energies: Tensor,
        analysis: Tensor,
        synthesis: Tensor,
        a: Tensor,
        order: Tensor,
        rows: Tensor,
        ends: Tensor,
    ) -> Tensor:
        gain = energies.flatten()[order].unsqueeze(1).to(h.dtype)
        c = grouped_product(h[order // rows.shape[1]], analysis, ends)
        ctx.save_for_backward(h, gain, analysis, synthesis, a, order, rows, ends, c)
        p = torch.addcmul(a[0], 2 * a[1], c).mul_(c).mul_(gain)
        return F.embedding_bag(rows, grouped_product(p, synthesis, ends), mode="sum")

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        h, gain, analysis, synthesis, a, order, rows, ends, c = ctx.saved_tensors
        token = order // rows.shape[1]
        grad = grad[token]
        slope = torch.addcmul(a[0], 2 * a[1], c)
        d_synthesis = grouped_outer((slope * c).mul_(gain), grad, ends)
        d_p = grouped_product(grad, synthesis.transpose(1, 2), ends)
        weighted = d_p * c
        first = weighted.sum(-1, dtype=torch.float32)
        second = 2 * weighted.mul_(c).sum(-1, dtype=torch.float32)
        d_gain = a[0] * first + a[1] * second
        d_a = gain.flatten().float() @ torch.stack((first, second), 1)
        d_c = slope.add_(c * (2 * a[1])).mul_(d_p).mul_(gain)
        d_analysis = grouped_outer(h[token], d_c, ends)
        back = grouped_product(d_c, analysis.transpose(1, 2), ends)
        d_h = F.embedding_bag(rows, back, mode="sum")
        d_energies = d_gain.float()[rows]
        return d_h, d_energies, d_analysis, d_synthesis, d_a.to(a.dtype), None, None, None


class BlockDictionary(nn.Module):
    """Σ_{b ∈ S} e_b V_b p(U_b h): a dictionary of `blocks` blocks of atoms stands for the
    frequencies of a spectrum, and only the coefficients that a token keeps are computed.

        e = softmax(R h)                  the blocks' energies
        S = the top_k blocks of e + β     β follows the load (Wang et al. 2024, arXiv 2408.15664)
        c_b = U_b h                       analysis
        p(c) = a₁ T₁(c) + a₂ (T₂(c) + T₀(c))     a polynomial of the spectrum, at first c + c²/2
        V_b                               synthesis

    `(..., d_model) -> (..., d_model)`. Blocks are chosen for a token by itself, none is dropped.
    β is `balance_rate` times a whole number, `moves`; `loads` adds up what blocks were given in
    training mode, and `balance` then moves β. Both are int64 buffers: exact in any precision, over
    any number of ranks. Raises ValueError when the shapes do not suit d_model.
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
        self.plain = config.energy == "softmax" and config.function == "layer"
        if config.function in ("layer", "cubic", "tanh"):
            self.a = nn.Parameter(torch.tensor([1.0, 0.25, 0.0][: 3 if config.function == "cubic" else 2]))
        elif config.function == "block":
            self.a = nn.Parameter(torch.tensor([1.0, 0.25]).repeat_interleave(config.blocks))
        if config.shared == "gelu":
            self.shared_up, self.shared_down = nn.Linear(d_model, d_model), nn.Linear(d_model, d_model)
            for w in (self.shared_up, self.shared_down):
                nn.init.normal_(w.weight, std=1 / math.sqrt(d_model))
                nn.init.zeros_(w.bias)
        nn.init.normal_(self.router.weight, std=1 / math.sqrt(d_model))
        nn.init.normal_(self.analysis, std=1 / math.sqrt(d_model))
        nn.init.normal_(self.synthesis, std=config.synthesis_gain / math.sqrt(config.top_k * size))
        self.register_buffer("loads", torch.zeros(config.blocks, dtype=torch.int64))
        self.register_buffer("moves", torch.zeros(config.blocks, dtype=torch.int64))

    def forward(self, h: Tensor) -> Tensor:
        """The synthesised tokens, in h's dtype; in training mode loads are counted."""
        tokens = h.reshape(-1, self.d_model)
        balance = self.config.balance_rate * self.moves
        logits = self.router(tokens)
        if not self.plain:
            return self._study(tokens, logits, balance).reshape(h.shape)
        energies, chosen = Route.apply(logits, balance, self.config.top_k)  # type: ignore[no-untyped-call]
        places = Places.of(chosen, self.config.blocks)
        if self.training:
            self.loads.add_(places.loads())
        weights = (self.analysis, self.synthesis, self.a)
        y: Tensor = Spectrum.apply(tokens, energies, *weights, *places)  # type: ignore[no-untyped-call]
        return y.reshape(h.shape)

    def _study(self, h, logits, balance):
        config = self.config
        e = logits.float()
        e = e.sigmoid() if config.energy == "sigmoid" else e.softmax(-1)
        chosen = (e.detach() + balance).topk(config.top_k).indices
        places = Places.of(chosen, config.blocks)
        if self.training:
            self.loads.add_(places.loads())
        e = e.gather(1, chosen)
        if config.energy == "normalised":
            e = e / e.sum(-1, keepdim=True)
        gain = e.flatten()[places.order].unsqueeze(1)
        c = F.grouped_mm(h[places.order // config.top_k], self.analysis, offs=places.ends)
        f = config.function
        if f == "relu2":
            p = F.relu(c).square()
        elif f == "gelu":
            p = F.gelu(c, approximate="tanh")
        elif f == "fixed":
            p = c + c * c / 2
        elif f == "square":
            p = c * c / 2
        elif f == "block":
            block = chosen.flatten()[places.order]
            a = self.a.view(2, -1, 1)
            p = a[0][block] * c + 2 * a[1][block] * c * c
        elif f == "tanh":
            t = c.tanh()
            p = self.a[0] * t + self.a[1] * (2 * t * t - 1)
        elif f == "layer":
            p = self.a[0] * c + 2 * self.a[1] * c * c
        elif f == "cubic":
            p = self.a[0] * c + 2 * self.a[1] * c * c + self.a[2] * (4 * c**3 - 3 * c)
        y = F.grouped_mm((p * gain).contiguous(), self.synthesis, offs=places.ends)
        y = y[places.rows].sum(1)
        if config.shared == "gelu":
            y = y + self.shared_down(F.gelu(self.shared_up(h), approximate="tanh"))
        return y

    @torch.no_grad()
    def balance(self) -> None:
        """One step of β, after an optimizer step, by what the blocks were given in it: up for
        those with less than their share, down for those with more."""
        self.moves.add_((self.loads.sum() - self.loads * self.config.blocks).sign())

    @torch.no_grad()
    def energy_entropy(self, h: Tensor) -> Tensor:
        """Mean entropy of the tokens' energies in nats, float32 `()`; ln(blocks) at most."""
        logits = self.router(h.reshape(-1, self.d_model)).float()
        probabilities = logits.softmax(-1)
        return -(probabilities * logits.log_softmax(-1)).sum(-1).mean()

    def sparsity(self, h: Tensor) -> Tensor:
        """Share of the dictionary computed for a token, float32 `()`."""
        return torch.tensor(self.config.top_k / self.config.blocks, device=h.device)

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """d·blocks MACs of energies and 2·top_k·d·s of analysis and synthesis a token.

        Operations: softmax 4 a block (maximum, subtract, exp, divide), 1 for β, top_k for the
        choice; 4 a coefficient (a₁ + 2a₂c, · c, · e); top_k a channel (the sum, and that onto h).
        MAC-equivalents: 3 a coefficient, and one a block for β.
        """
        tokens, d, blocks, k = batch * seq, self.d_model, self.config.blocks, self.config.top_k
        products = tokens * (d * blocks + 2 * k * self.size * d)
        products += tokens * 2 * d * d * (self.config.shared == "gelu")
        return FlopCount(
            matmul=2 * products,
            elementwise=tokens * ((5 + k) * blocks + 4 * k * self.size + k * d),
            mac_equivalents=products + tokens * (3 * k * self.size + blocks),
        )
