"""What a configured model costs, part by part, and how large it is; builds no weights."""

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch

from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.model.flops import FlopCount, FlopReport, count_flops
from sparse_gpt.model.gpt import GPT

Block = Mapping[str, FlopCount]


@lru_cache
def model_report(config: ModelConfig) -> FlopReport:
    """FLOPs of one sequence of full length; builds no weights."""
    with torch.device("meta"):
        return count_flops(GPT(config), batch=1, seq=config.max_seq_len)


class Parameters(NamedTuple):
    """How many a model has, and how many are active: a token's, without the blocks of a
    dictionary that it does not compute. Each with the embeddings (the tied head is one), and
    without."""

    total: int
    without_embeddings: int
    active: int
    active_without_embeddings: int
    dictionaries: int  # of `total`: what the dictionaries' blocks have

    def to_dict(self) -> dict[str, int]:
        """As JSON has it."""
        return self._asdict()

    def __str__(self) -> str:
        if self.active == self.total:
            return f"{self.total:,} parameters"
        return f"{self.total:,} parameters, {self.active:,} of them active for a token"


@lru_cache
def parameter_counts(config: ModelConfig) -> Parameters:
    """Counted on shapes; builds no weights."""
    with torch.device("meta"):
        model = GPT(config)
    embeddings = sum(p.numel() for p in (model.wte.weight, model.wpe.weight))
    total = sum(p.numel() for p in model.parameters())
    blocks = idle = 0
    for module in model.modules():
        if isinstance(module, BlockDictionary):
            count, chosen = module.config.blocks, module.config.top_k
            own = module.analysis.numel() + module.synthesis.numel()
            blocks += own
            idle += own * (count - chosen) // count
    active = total - idle
    return Parameters(total, total - embeddings, active, active - embeddings, blocks)


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


def model_summary(config: ModelConfig) -> dict[str, dict[str, float]]:
    """`parameters`, and `flops` a token: forward by component, all blocks together, then `forward`
    and `training` of the whole model."""
    report = model_report(config)
    flops: dict[str, float] = defaultdict(float)
    for path, count in report.rows.items():
        flops[re.sub(r"^blocks\.\d+\.", "", path)] += count.forward / report.seq
    whole = {"forward": report.forward / report.seq, "training": report.training / report.seq}
    return {"parameters": dict(parameter_counts(config).to_dict()), "flops": {**flops, **whole}}
