"""SparseSpectral: an orthonormal transform across a token's channels that keeps what is large."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_gpt.model.config import SpectralConfig
from sparse_gpt.model.flops import FlopCount


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II, `(n, n)` float64; row k is frequency k (Ahmed et al. 1974)."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * torch.outer(k, k + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


class SparseSpectral(nn.Module):
    """Cᵀ(g ⊙ keep(C x)) for each token, with C = C_p ⊗ C_q run as two small matmuls.

    `(..., d_model) -> (..., d_model)`, d_model = p·q. Hard selection keeps the coefficients whose
    magnitude reaches the token's threshold, ties included, so the result depends on no sorting
    order: with an `exact` threshold at least round(keep·d) of them. Soft selection also draws what
    it keeps towards 0 by the threshold, and so is continuous. The gain g starts at 1.

    Matmuls and not an FFT: half-precision FFTs exist for powers of two only.
    Raises ValueError when (p, q) does not suit d_model.
    """

    left: Tensor
    right: Tensor

    def __init__(self, d_model: int, config: SpectralConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.p, self.q = config.split(d_model)
        self.k = max(1, round(config.keep * d_model))
        self.quantile = NormalDist().inv_cdf(1 - config.keep / 2)  # of |z|, z ~ N(0, 1)
        self.gain = nn.Parameter(torch.ones(d_model))
        for name, n in (("left", self.p), ("right", self.q)):
            matrix = dct_matrix(n).to(torch.get_default_dtype())
            self.register_buffer(name, matrix, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The filtered tokens, in x's dtype."""
        return self.inverse(self.select(self.transform(x)) * self.gain)

    def transform(self, x: Tensor) -> Tensor:
        """Coefficients C x, `(..., d_model)`."""
        left, right = self._factors(x.dtype)
        return (left @ (x.reshape(-1, self.p, self.q) @ right.T)).reshape(x.shape)

    def inverse(self, c: Tensor) -> Tensor:
        """Cᵀ c, `(..., d_model)`."""
        left, right = self._factors(c.dtype)
        return (left.T @ (c.reshape(-1, self.p, self.q) @ right)).reshape(c.shape)

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The factors in a dtype: an engine may cast parameters and leave buffers alone."""
        return self.left.to(dtype), self.right.to(dtype)

    def select(self, c: Tensor) -> Tensor:
        """What is left of the coefficients, `(..., d_model)`."""
        if self.config.threshold == "constant":
            shrink = F.softshrink if self.config.selection == "soft" else F.hardshrink
            return shrink(c, self.quantile)
        if self.config.selection == "soft":
            bound = self._kth_magnitude(c)
            return c - c.clamp(-bound, bound)
        return c.masked_fill(c.detach().abs() < self._kth_magnitude(c.detach()), 0)

    def _kth_magnitude(self, c: Tensor) -> Tensor:
        """The k-th largest magnitude of each token, `(..., 1)`."""
        return c.abs().topk(self.k, sorted=False).values.amin(-1, keepdim=True)

    @torch.no_grad()
    def sparsity(self, x: Tensor) -> Tensor:
        """Share of coefficients kept for this part's input, float32 `()`."""
        return (self.select(self.transform(x)) != 0).float().mean()

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """2d(p + q) MACs a token; selection about 30d exact, 3d constant; the gain d, and in
        parallel the sum d."""
        channels = batch * seq * self.d_model
        macs = 2 * channels * (self.p + self.q)
        selection = {"exact": 30, "constant": 3}[self.config.threshold] * channels
        return FlopCount(
            matmul=2 * macs,
            fixed=2 * macs,
            elementwise=selection + channels * (1 + (self.config.path == "parallel")),
            mac_equivalents=macs + selection,
        )
