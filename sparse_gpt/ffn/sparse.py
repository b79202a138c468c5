"""UltraEfficientSparseFFN: the sparse feed-forward network, its parts in a chain."""

from __future__ import annotations

import math

from torch import Tensor, nn

from sparse_gpt.config import SparseFFNConfig, ffn_preset
from sparse_gpt.ffn.factored import SparseFactorLinear
from sparse_gpt.ffn.polynomial import SparsePolynomial
from sparse_gpt.ffn.refine import SparseMicroRefine, TokenFeedback
from sparse_gpt.ffn.spectral import SparseSpectral


class UltraEfficientSparseFFN(nn.Module):
    """Dropout(LN_out(P(M(F(Poly(Spec(LN_in(x)))))))), the branch without the residual add.

    `(..., d_model) -> (..., d_model)`. `config` is a SparseFFNConfig, else the preset's; a part
    configured None is None here. LN_out sets the branch's size whatever the weights before it,
    which is why the projection must not start at zero: LN_out would divide 0 by 0.
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
        # Registered in the order in which they run: forward follows it.
        self.norm_in = nn.LayerNorm(d_model)
        self.spectral = SparseSpectral(d_model, chosen.spectral) if chosen.spectral else None
        self.polynomial = SparsePolynomial(d_model, chosen.polynomial)
        self.feedback = TokenFeedback(d_model, chosen.feedback) if chosen.feedback else None
        self.refine = SparseMicroRefine(d_model, chosen.refine) if chosen.refine else None
        self.projection: nn.Module
        if chosen.projection.kind == "factored":
            self.projection = SparseFactorLinear(d_model, chosen.projection.block)
        else:
            self.projection = nn.Linear(d_model, d_model, bias=False)  # LN_out has one
            nn.init.normal_(self.projection.weight, std=1 / math.sqrt(d_model))
        self.norm_out = nn.LayerNorm(d_model)
        nn.init.constant_(self.norm_out.weight, chosen.out_gain)
        self.dropout = nn.Dropout(chosen.dropout)

    def forward(self, x: Tensor) -> Tensor:
        """The branch, in x's dtype."""
        for part in self.children():
            x = part(x)
        return x
