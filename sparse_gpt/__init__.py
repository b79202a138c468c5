"""The model and what it costs: GPT-2 with a dense or a sparse feed-forward network.

Knows nothing of files, processes or training: a `ModelConfig` becomes a `GPT`, and `count_flops`
says what a module costs. `config.py` holds the configurations, `model.py` and `block.py` the
transformer, `ffn/` the feed-forward networks part by part, `flops.py` the accounting.
`replace_ffn` and `fit_to_dense` (`surgery.py`) work on GPT-2s of Hugging Face transformers, which
only they import.
"""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from sparse_gpt.surgery import fit_to_dense, replace_ffn

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
    "fit_to_dense",
    "replace_ffn",
]


def __getattr__(name: str) -> Any:
    if name in ("fit_to_dense", "replace_ffn"):  # they cost the import of transformers
        import sparse_gpt.surgery

        return getattr(sparse_gpt.surgery, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
