"""UltraEfficientSparseFFN: the sparse feed-forward network, its parts joined."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from sparse_gpt.model.config import DictionaryConfig, SparseFFNConfig, SpectralConfig, ffn_preset
from sparse_gpt.model.ffn.dictionary import BlockDictionary
from sparse_gpt.model.ffn.factored import SparseFactorLinear
from sparse_gpt.model.ffn.polynomial import SparsePolynomial
from sparse_gpt.model.ffn.refine import SparseMicroRefine, TokenFeedback
from sparse_gpt.model.ffn.spectral import SparseSpectral


class UltraEfficientSparseFFN(nn.Module):
    """The branch, without the residual add, `(..., d_model) -> (..., d_model)`:

        h = LN_in(x)
        v = h + Spec(h)                   where the spectrum is a dictionary, Poly within it
        v = Poly(h) + Spec(h)             where spectral.path is parallel; Poly(Spec(h)) in series
        v = Refine(Feedback(v))
        y = Dropout(P(LN_out(v)))         where norm_out is before; Dropout(LN_out(P(v))) after

    `config` is a SparseFFNConfig, else the preset's; a part configured None is None here. The
    branch starts with the RMS `out_gain`, given by LN_out's gain where that comes last and by the
    projection's weights where they do. (Before a norm those must not be 0: it would divide 0 by 0.)
    Raises ValueError when a part cannot have the width d_model.
    """

    def __init__(
        self, d_model: int = 128, preset: str = "default", config: SparseFFNConfig | None = None
    ) -> None:
        super().__init__()
        chosen = config or ffn_preset(preset)
        if not isinstance(chosen, SparseFFNConfig):
            raise ValueError(f"preset {preset!r} is no sparse FFN")
        chosen.check(d_model)
        self.config = chosen
        # Registered in the order in which they run.
        self.norm_in = nn.LayerNorm(d_model)
        self.spectral: BlockDictionary | SparseSpectral | None = None
        if isinstance(chosen.spectral, DictionaryConfig):
            self.spectral = BlockDictionary(d_model, chosen.spectral)
        elif chosen.spectral:
            self.spectral = SparseSpectral(d_model, chosen.spectral)
        self.polynomial: SparsePolynomial | None = None
        if chosen.polynomial:
            # What the norm leaves has unit RMS already; what selection leaves has not.
            series = (
                isinstance(chosen.spectral, SpectralConfig) and chosen.spectral.path == "series"
            )
            self.polynomial = SparsePolynomial(d_model, chosen.polynomial, renormalise=series)
        self.feedback = TokenFeedback(d_model, chosen.feedback) if chosen.feedback else None
        self.refine = SparseMicroRefine(d_model, chosen.refine) if chosen.refine else None
        norm_out, projection = nn.LayerNorm(d_model), self._projection(d_model)
        self.moe = chosen.residual == "none"
        if chosen.norm_out == "none":
            self.projection = projection
        elif chosen.norm_out == "before":
            self.norm_out, self.projection = norm_out, projection
        else:
            self.projection, self.norm_out = projection, norm_out
        sizes = norm_out.weight if chosen.norm_out == "after" else list(projection.parameters())[-1]
        with torch.no_grad():
            sizes.mul_(chosen.out_gain)
        if chosen.residual == "none":
            self.projection = nn.Identity()
            self.norm_out = nn.Identity()
        self.dropout = nn.Dropout(chosen.dropout)

    def _projection(self, d_model: int) -> nn.Module:
        if self.config.projection.kind == "factored":
            return SparseFactorLinear(d_model, self.config.projection.block)
        linear = nn.Linear(d_model, d_model, bias=False)  # LN_out has one
        nn.init.normal_(linear.weight, std=1 / math.sqrt(d_model))
        return linear

    def forward(self, x: Tensor) -> Tensor:
        """The branch, in x's dtype."""
        h = self.norm_in(x)
        if self.config.beside or self.config.residual == "none":
            v = self.spectral(h)
        else:
            v = self._spectrum(h)
        for part in (self.feedback, self.refine):
            if part is not None:
                v = part(v)
        if self.config.beside:
            v = self.projection(h) + (self.norm_out(v) if self.config.norm_out == "before" else v)
        elif self.config.residual == "none":
            pass
        elif self.config.norm_out == "none":
            v = self.projection(v)
        elif self.config.norm_out == "before":
            v = self.projection(self.norm_out(v))
        else:
            v = self.norm_out(self.projection(v))
        y: Tensor = self.dropout(v)
        return y

    def _spectrum(self, h: Tensor) -> Tensor:
        """Spectrum and polynomial together."""
        if isinstance(self.spectral, BlockDictionary):
            return h + self.spectral(h)
        assert self.polynomial is not None
        if self.spectral is None:
            y: Tensor = self.polynomial(h)
        elif self.spectral.config.path == "series":
            y = self.polynomial(self.spectral(h))
        else:
            y = self.polynomial(h) + self.spectral(h)
        return y
