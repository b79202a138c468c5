"""What a configured model costs, part by part, and how large it is; builds no weights."""

from collections.abc import Mapping
from functools import lru_cache

import torch

from sparse_gpt.model.config import DictionaryConfig, ModelConfig, SparseFFNConfig
from sparse_gpt.model.flops import FlopCount, FlopReport, count_flops
from sparse_gpt.model.gpt import GPT

Block = Mapping[str, FlopCount]


@lru_cache
def model_report(config: ModelConfig) -> FlopReport:
    """FLOPs of one sequence of full length; builds no weights."""
    with torch.device("meta"):
        return count_flops(GPT(config), batch=1, seq=config.max_seq_len)


@lru_cache
def parameter_counts(config: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that are no embedding (the tied head is one)."""
    with torch.device("meta"):
        model = GPT(config)
    embeddings = sum(p.numel() for p in (model.wte.weight, model.wpe.weight))
    total = sum(p.numel() for p in model.parameters())
    return total, total - embeddings


def active_parameters(config: ModelConfig) -> int:
    """Parameters that a token uses: all but the blocks of a dictionary that it does not compute."""
    idle = 0
    if isinstance(config.ffn, SparseFFNConfig):
        spectral = config.ffn.spectral
        if isinstance(spectral, DictionaryConfig):
            block = 2 * config.d_model * spectral.size(config.d_model)
            idle = (spectral.blocks - spectral.top_k) * block
    return parameter_counts(config)[0] - config.n_layer * idle


def ffn_cost(block: Block) -> FlopCount:
    """A block's feed-forward network: a dense one without `ln_2`, a sparse one with both norms."""
    parts = (count for name, count in block.items() if name.split(".")[0] == "ffn")
    return sum(parts, FlopCount())


def total(block: Block) -> FlopCount:
    """A whole block."""
    return sum(block.values(), FlopCount())


def flops_scalars(report: FlopReport, config: ModelConfig) -> dict[str, float]:
    """`flops/block_NN/<component>`: forward FLOPs a token; `vs_dense`: the block's over dense."""
    scalars = {}
    dense_blocks = model_report(config.dense_twin()).blocks()
    for number, (block, dense) in enumerate(zip(report.blocks(), dense_blocks, strict=True)):
        prefix = f"flops/block_{number:02}"
        for name, count in block.items():
            scalars[f"{prefix}/{name}"] = count.forward / report.seq
        scalars[f"{prefix}/vs_dense"] = total(block).forward / total(dense).forward
    return scalars
