"""What a configured model costs a token, beside its dense twin: as table, JSON and scalars."""

from itertools import groupby
from typing import Any

from rich.table import Table

from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.costs import ffn_cost, model_report, parameter_counts, total
from sparse_gpt.model.flops import FlopCount


def costs_json(config: ModelConfig) -> dict[str, Any]:
    """One FFN's MAC-equivalents a token by part, both models' parameters and full
    reports of a sequence."""
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
        "parameters": parameter_counts(config).to_dict(),
        "dense_parameters": parameter_counts(config.dense_twin()).to_dict(),
        "model": ours.to_dict(),
        "dense": dense.to_dict(),
    }


def costs_table(config: ModelConfig) -> Table:
    """Blocks × components a token, dense beside; equal blocks share their rows."""
    ours, dense = model_report(config), model_report(config.dense_twin())
    table = Table(
        title=f"A token of a {config.max_seq_len}-token sequence: this model beside its dense twin",
        caption="MACs: multiply-accumulates, with norms, selection and refinement in the claim's "
        "equivalents.\nFLOPs: 2 × MACs of matmuls + element-wise operations; attention un-halved.\n"
        f"{parameter_counts(config)}; dense: {parameter_counts(config.dense_twin())}.",
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
