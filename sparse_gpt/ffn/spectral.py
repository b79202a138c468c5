"""SparseSpectral: an orthonormal transform across a token's channels that keeps what is large."""

from __future__ import annotations

import math
from statistics import NormalDist

import torch
from torch import Tensor, nn

from sparse_gpt.config import SpectralConfig
from sparse_gpt.flops import FlopCount


def dct_matrix(n: int) -> Tensor:
    """The orthonormal DCT-II, `(n, n)` float64; row k is frequency k (Ahmed et al. 1974)."""
    k = torch.arange(n, dtype=torch.float64)
    matrix = torch.cos(math.pi / n * torch.outer(k, k + 0.5)) * math.sqrt(2 / n)
    matrix[0] /= math.sqrt(2)
    return matrix


def hadamard_matrix(n: int) -> Tensor:
    """Sylvester's orthonormal Hadamard matrix, `(n, n)` float64; n is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < n:
        matrix = torch.cat((matrix.repeat(1, 2), torch.cat((matrix, -matrix), 1))) / math.sqrt(2)
    return matrix


class SparseSpectral(nn.Module):
    """Cᵀ(g ⊙ keep(C x)) for each token, with C = C_p ⊗ C_q run as two small matmuls.

    `(..., d_model) -> (..., d_model)`, d_model = p·q. Hard selection keeps the coefficients whose
    magnitude reaches the token's threshold, ties included, so the result depends on no sorting
    order: with an `exact` threshold at least round(keep·d) of them, with a `statistical` one about
    that many. The gain g starts at 1.

    A `learned` transform gives each block of I_p ⊗ C_q and of C_p ⊗ I_q its own weights,
    initialised at the DCT: d(p + q) parameters at the same cost. Its inverse stays the transpose,
    so analysis and synthesis share their weights and the part begins as an exact round trip.

    Matmuls and not an FFT: half-precision FFTs exist for powers of two only.
    Raises ValueError when (p, q) does not suit d_model.
    """

    left: Tensor
    right: Tensor

    def __init__(self, d_model: int, config: SpectralConfig) -> None:
        super().__init__()
        self.config = config
        self.d_model = d_model
        self.p, self.q = p, q = config.split(d_model)
        self.k = max(1, round(config.keep * d_model))
        self.quantile = NormalDist().inv_cdf(1 - config.keep / 2)  # of |z|, z ~ N(0, 1)
        self.gain = nn.Parameter(torch.ones(d_model))
        matrix = hadamard_matrix if config.transform == "hadamard" else dct_matrix
        left, right = (matrix(n).to(torch.get_default_dtype()) for n in (p, q))
        self.learned = config.transform == "learned"
        if self.learned:
            self.left = nn.Parameter(left.repeat(q, 1, 1))
            self.right = nn.Parameter(right.repeat(p, 1, 1))
        else:
            self.register_buffer("left", left, persistent=False)
            self.register_buffer("right", right, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """The filtered tokens, in x's dtype."""
        c = self.transform(x)
        if self.config.selection == "hard":
            c = c.masked_fill(c.detach().abs() < self._threshold(c.detach()), 0)
        return self.inverse(c * self.gain)

    def transform(self, x: Tensor) -> Tensor:
        """Coefficients C x, `(..., d_model)`."""
        grid = x.reshape(-1, self.p, self.q)
        if self.learned:
            grid = torch.einsum("npj,pkj->npk", grid, self.right)
            grid = torch.einsum("niq,qki->nkq", grid, self.left)
        else:
            left, right = self._fixed(x.dtype)
            grid = left @ (grid @ right.T)
        return grid.reshape(x.shape)

    def inverse(self, c: Tensor) -> Tensor:
        """Cᵀ c, `(..., d_model)`."""
        grid = c.reshape(-1, self.p, self.q)
        if self.learned:
            grid = torch.einsum("nkq,qki->niq", grid, self.left)
            grid = torch.einsum("npk,pkj->npj", grid, self.right)
        else:
            left, right = self._fixed(c.dtype)
            grid = left.T @ (grid @ right)
        return grid.reshape(c.shape)

    def _fixed(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """The fixed factors in a dtype: an engine may cast parameters and leave buffers alone."""
        return self.left.to(dtype), self.right.to(dtype)

    def _threshold(self, c: Tensor) -> Tensor:
        """Smallest magnitude that each token keeps, `(..., 1)`."""
        if self.config.threshold == "exact":
            return c.abs().topk(self.k, sorted=False).values.amin(-1, keepdim=True)
        # The norm before has removed the mean, so the RMS is the standard deviation.
        norm = torch.linalg.vector_norm(c, dim=-1, keepdim=True)
        return norm * (self.quantile / math.sqrt(self.d_model))

    @torch.no_grad()
    def sparsity(self, x: Tensor) -> Tensor:
        """Share of coefficients kept for this part's input, float32 `()`."""
        c = self.transform(x)
        if self.config.selection == "none":
            return torch.ones((), device=x.device)
        return (c.abs() >= self._threshold(c)).float().mean()

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """2d(p + q) MACs a token; selection about 30d exact, 3d statistical; the gain d."""
        channels = batch * seq * self.d_model
        macs = 2 * channels * (self.p + self.q)
        per_channel = {"exact": 30, "statistical": 3}[self.config.threshold]
        selection = per_channel * channels if self.config.selection == "hard" else 0
        return FlopCount(
            matmul=2 * macs,
            fixed=0 if self.learned else 2 * macs,
            elementwise=selection + channels,
            mac_equivalents=macs + selection,
        )
