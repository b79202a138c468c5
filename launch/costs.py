"""What a configured model costs a token, beside its dense twin: as table, JSON and scalars."""

from collections.abc import Mapping
from functools import lru_cache
from itertools import groupby
from typing import Any

import torch
from rich.table import Table

from sparse_gpt import GPT, ModelConfig, count_flops
from sparse_gpt.flops import FlopCount, FlopReport

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


def costs_json(config: ModelConfig) -> dict[str, Any]:
    """One FFN's MAC-equivalents a token by part, and both models' full reports of a sequence."""
    ours, dense = model_report(config), model_report(config.dense_twin())
    block, dense_block = ours.blocks()[0], dense.blocks()[0]
    seq = config.max_seq_len
    parts: dict[str, int] = {}
    for name, count in block.items():
        if name.startswith("ffn."):
            part = name.removeprefix("ffn.")
            part = "norms" if part.startswith("norm_") else part
            parts[part] = parts.get(part, 0) + count.mac_equivalents // seq
    return {
        "ffn": {
            "unit": "MAC-equivalents a token, first block",
            "parts": parts,
            "total": ffn_cost(block).mac_equivalents // seq,
            "dense": ffn_cost(dense_block).mac_equivalents // seq,
            "dense_activation_flops": ffn_cost(dense_block).elementwise // seq,
        },
        "model": ours.to_dict(),
        "dense": dense.to_dict(),
    }


def costs_table(config: ModelConfig) -> Table:
    """Blocks × components a token, dense beside; equal blocks share their rows."""
    ours, dense = model_report(config), model_report(config.dense_twin())
    table = Table(
        title=f"A token of a {config.max_seq_len}-token sequence: this model beside its dense twin",
        caption="MACs: multiply-accumulates, with norms, selection and refinement in the claim's "
        "equivalents.\nFLOPs: 2 × MACs of matmuls + element-wise operations; attention un-halved.",
    )
    table.add_column("component")
    for column in ("MACs", "dense MACs", "FLOPs", "dense FLOPs", "saved"):
        table.add_column(column, justify="right")

    def add(name: str, a: FlopCount, b: FlopCount, style: str = "") -> None:
        flops = (a.forward // ours.seq, b.forward // ours.seq)
        macs = (a.mac_equivalents // ours.seq, b.mac_equivalents // ours.seq)
        cells = [f"{n:,}" if n else "" for n in (*macs, *flops)]
        table.add_row(name, *cells, _saved(*flops), style=style)

    pairs = list(zip(ours.blocks(), dense.blocks(), strict=True))
    first = 0
    for (block, dense_block), group in groupby(pairs):
        last = first + len(list(group)) - 1
        span = f"block {first}" if first == last else f"blocks {first} to {last}, each"
        add(span, total(block), total(dense_block), style="bold")
        names = [n for n in {**dense_block, **block} if n != "ffn"]
        for name in [n for n in names if not n.startswith("ffn.")]:
            add(f"  {name}", block.get(name, FlopCount()), dense_block.get(name, FlopCount()))
        add("  ffn", ffn_cost(block), ffn_cost(dense_block))
        for name in [n for n in names if n.startswith("ffn.")]:
            add(f"    {name.removeprefix('ffn.')}", block[name], FlopCount())
        first = last + 1
    for name in [path for path in ours.rows if not path.startswith("blocks.")]:
        add(name, ours.rows[name], dense.rows[name], style="bold")

    table.add_section()
    both = (
        ("model", ours, dense),
        ("model without logits", ours.without_logits, dense.without_logits),
    )
    for name, a, b in both:
        add(f"{name}, forward", a.total, b.total, style="bold")
        training = (a.training // ours.seq, b.training // ours.seq)
        cells = ["", "", *(f"{n:,}" for n in training), _saved(*training)]
        table.add_row(f"{name}, training", *cells)
        halved = (a.total.forward_causal // ours.seq, b.total.forward_causal // ours.seq)
        cells = ["", "", *(f"{n:,}" for n in halved), _saved(*halved)]
        table.add_row(f"{name}, forward, scores halved", *cells, style="dim")
    return table


def _saved(ours: int, dense: int) -> str:
    return f"{1 - ours / dense:.1%}" if ours and dense else ""
