"""Transformer blocks: the same attention with a dense or a sparse FFN."""

from __future__ import annotations

from torch import Tensor, nn

from sparse_gpt.model.attention import CausalSelfAttention, KVCache, Mask
from sparse_gpt.model.config import DenseFFNConfig, ModelConfig, SparseFFNConfig
from sparse_gpt.model.ffn import DenseFFN, UltraEfficientSparseFFN
from sparse_gpt.model.recompute import recomputed


class DenseBlock(nn.Module):
    """x + attention(ln_1(x)), then x + ffn(ln_2(x)): GPT-2's block.

    `(batch, seq, d_model) -> (batch, seq, d_model)`. Raises ValueError when `config.ffn` is sparse.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config.ffn, DenseFFNConfig):
            raise ValueError(f"DenseBlock needs a dense ffn, not {config.ffn.kind}")
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attention = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.d_model)
        self.ffn = DenseFFN(config.d_model, config.ffn, config.n_layer)
        self.recompute_ffn = False

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Mask | None = None) -> Tensor:
        """The residual stream after this block; `cache`, `mask` as in CausalSelfAttention."""
        x = x + self.attention(self.ln_1(x), cache, mask)
        h = self.ln_2(x)
        return x + (recomputed(self.ffn, h) if self.recompute_ffn else self.ffn(h))


class SparseBlock(nn.Module):
    """x + attention(ln_1(x)), then x + ffn(x): the sparse FFN begins with its own norm.

    `(batch, seq, d_model) -> (batch, seq, d_model)`. Raises ValueError when `config.ffn` is dense.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if not isinstance(config.ffn, SparseFFNConfig):
            raise ValueError(f"SparseBlock needs a sparse ffn, not {config.ffn.kind}")
        self.ln_1 = nn.LayerNorm(config.d_model)
        self.attention = CausalSelfAttention(config)
        self.ffn = UltraEfficientSparseFFN(config.d_model, config=config.ffn)
        self.recompute_ffn = False

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Mask | None = None) -> Tensor:
        """The residual stream after this block; `cache`, `mask` as in CausalSelfAttention."""
        x = x + self.attention(self.ln_1(x), cache, mask)
        return x + (recomputed(self.ffn, x) if self.recompute_ffn else self.ffn(x))
