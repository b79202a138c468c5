"""The model and what it costs: GPT-2 with a dense or a sparse feed-forward network.

Knows nothing of files, processes or training: a `ModelConfig` becomes a `GPT`, and `count_flops`
says what a module costs. `config.py` holds the configurations, `model.py` and `block.py` the
transformer, `ffn/` the feed-forward networks part by part, `flops.py` the accounting.
"""

from sparse_gpt.attention import CausalSelfAttention
from sparse_gpt.block import DenseBlock, SparseBlock
from sparse_gpt.config import DenseFFNConfig, ModelConfig, SparseFFNConfig
from sparse_gpt.ffn import (
    DenseFFN,
    SparseFactorLinear,
    SparseMicroRefine,
    SparsePolynomial,
    SparseSpectral,
    TokenFeedback,
    UltraEfficientSparseFFN,
)
from sparse_gpt.flops import FlopCount, FlopReport, count_flops
from sparse_gpt.model import GPT

__all__ = [
    "GPT",
    "CausalSelfAttention",
    "DenseBlock",
    "DenseFFN",
    "DenseFFNConfig",
    "FlopCount",
    "FlopReport",
    "ModelConfig",
    "SparseBlock",
    "SparseFFNConfig",
    "SparseFactorLinear",
    "SparseMicroRefine",
    "SparsePolynomial",
    "SparseSpectral",
    "TokenFeedback",
    "UltraEfficientSparseFFN",
    "count_flops",
]
