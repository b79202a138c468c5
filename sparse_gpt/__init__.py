"""Distributed pretraining of GPT-2-family models whose feed-forward network is dense or sparse.

The rooms, each of which imports only those below it:

    cli            the `sparse-gpt` command
    sweep          scaling experiments: grids of runs, planned, trained, fitted, drawn
    cluster, plan  where ranks run, and how they end; what a run costs
    evaluate       trained models: measured, made to write
    train          a run: the loop and what surrounds it on every rank
    config         one YAML file says everything about a run
    data, model    corpora become batches; GPT-2 with its feed-forward networks, and its FLOPs
    errors, files, progress, provenance     the ground

    scaling        fits of loss against compute: mathematics only
    huggingface    the sparse FFN in the GPT-2s of transformers

The names below are loaded when they are asked for: `import sparse_gpt` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparse_gpt.huggingface import fit_to_dense, replace_ffn
    from sparse_gpt.model.attention import CausalSelfAttention
    from sparse_gpt.model.block import DenseBlock, SparseBlock
    from sparse_gpt.model.config import DenseFFNConfig, ModelConfig, SparseFFNConfig
    from sparse_gpt.model.ffn import (
        DenseFFN,
        SparseFactorLinear,
        SparseMicroRefine,
        SparsePolynomial,
        SparseSpectral,
        TokenFeedback,
        UltraEfficientSparseFFN,
    )
    from sparse_gpt.model.flops import FlopCount, FlopReport, count_flops
    from sparse_gpt.model.gpt import GPT
    from sparse_gpt.model.sampling import Sampling

_ROOMS = {
    "huggingface": ("fit_to_dense", "replace_ffn"),
    "model.attention": ("CausalSelfAttention",),
    "model.block": ("DenseBlock", "SparseBlock"),
    "model.config": ("DenseFFNConfig", "ModelConfig", "SparseFFNConfig"),
    "model.ffn": (
        "DenseFFN",
        "SparseFactorLinear",
        "SparseMicroRefine",
        "SparsePolynomial",
        "SparseSpectral",
        "TokenFeedback",
        "UltraEfficientSparseFFN",
    ),
    "model.flops": ("FlopCount", "FlopReport", "count_flops"),
    "model.gpt": ("GPT",),
    "model.sampling": ("Sampling",),
}
_HOME = {name: room for room, names in _ROOMS.items() for name in names}

__all__ = [
    "GPT",
    "CausalSelfAttention",
    "DenseBlock",
    "DenseFFN",
    "DenseFFNConfig",
    "FlopCount",
    "FlopReport",
    "ModelConfig",
    "Sampling",
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
    if name in _HOME:
        return getattr(import_module(f"sparse_gpt.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
