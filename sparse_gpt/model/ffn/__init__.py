"""Feed-forward networks: GPT-2's dense one, and the sparse one with a file for each kind of part.

Each is a branch without its residual add, `(..., d_model) -> (..., d_model)`, in which no token
sees another. `sparse.py` chains the parts: LayerNorm, spectrum (`dictionary.py`, learned, or
`spectral.py`, fixed), polynomial, feedback, refine, projection (dense, or `factored.py`),
LayerNorm, dropout. Under the dictionary: `routing.py` sorts tokens by block, `grouped.py`
multiplies a block at a time.
"""

from sparse_gpt.model.ffn.dense import DenseFFN
from sparse_gpt.model.ffn.dictionary import BlockDictionary
from sparse_gpt.model.ffn.factored import SparseFactorLinear
from sparse_gpt.model.ffn.polynomial import SparsePolynomial
from sparse_gpt.model.ffn.refine import SparseMicroRefine, TokenFeedback
from sparse_gpt.model.ffn.sparse import UltraEfficientSparseFFN
from sparse_gpt.model.ffn.spectral import SparseSpectral

__all__ = [
    "BlockDictionary",
    "DenseFFN",
    "SparseFactorLinear",
    "SparseMicroRefine",
    "SparsePolynomial",
    "SparseSpectral",
    "TokenFeedback",
    "UltraEfficientSparseFFN",
]
