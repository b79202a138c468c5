"""What a model costs: floating-point operations by module.

1 FLOP is one add or one multiply, so a matmul is 2 × its multiply-accumulates (MACs). What is not
a matmul is counted 1 an operation (add, multiply, compare, exp, tanh, sigmoid). Left out: biases,
residual adds, dropout, the loss and embedding lookups, which are small and the same for every FFN.

Each module of ours states its own formula, `flop_count(batch, seq) -> FlopCount`, and
`count_flops` collects them.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, fields
from typing import Any, Protocol, runtime_checkable

from torch import nn


@dataclass(frozen=True)
class FlopCount:
    """The cost of one forward pass of a module over a whole batch.

    matmul: FLOPs of all matrix products as executed: attention scores un-halved, what is computed
        under a mask charged for every token.
    fixed: the part of `matmul` whose matrices are not learned (no weight gradient in training).
    scores: the part of `matmul` that causality makes half superfluous.
    masked: the part of `matmul` that is computed for tokens whose result the mask discards, at
        the configured share.
    elementwise: operations that are not matmuls.
    mac_equivalents: the unit of the published claim: MACs, with LayerNorm as 4 a channel, exact
        selection as 30, selection by a constant as 3, and a refine stage as 4.
    """

    matmul: int = 0
    fixed: int = 0
    scores: int = 0
    masked: int = 0
    elementwise: int = 0
    mac_equivalents: int = 0

    def __add__(self, other: FlopCount) -> FlopCount:
        return FlopCount(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    @property
    def forward(self) -> int:
        """FLOPs of a forward pass; the primary number."""
        return self.matmul + self.elementwise

    @property
    def training(self) -> int:
        """FLOPs of forward and backward, without recomputation."""
        return 3 * (self.matmul - self.fixed) + 2 * self.fixed + 3 * self.elementwise

    @property
    def forward_causal(self) -> int:
        """`forward` with the attention scores halved."""
        return self.forward - self.scores // 2

    @property
    def training_causal(self) -> int:
        """`training` with the attention scores halved."""
        return self.training - 3 * self.scores // 2

    @property
    def forward_algorithmic(self) -> int:
        """`forward` without what a mask discards."""
        return self.forward - self.masked

    def to_dict(self) -> dict[str, int]:
        """Fields and derived totals, ready for JSON."""
        derived = (
            "forward",
            "training",
            "forward_causal",
            "training_causal",
            "forward_algorithmic",
        )
        return {**asdict(self), **{name: getattr(self, name) for name in derived}}


@dataclass(frozen=True)
class FlopReport:
    """Costs by module path, for `batch` sequences of `seq` tokens.

    A lone module that states one formula for itself has the path "".
    """

    batch: int
    seq: int
    rows: dict[str, FlopCount]

    @property
    def total(self) -> FlopCount:
        """The sum of all rows."""
        return sum(self.rows.values(), FlopCount())

    @property
    def forward(self) -> int:
        """FLOPs of a forward pass, logits included."""
        return self.total.forward

    @property
    def training(self) -> int:
        """FLOPs of forward and backward, logits included."""
        return self.total.training

    @property
    def without_logits(self) -> FlopReport:
        """The same report without the output head."""
        kept = {p: count for p, count in self.rows.items() if p.split(".")[-1] != "lm_head"}
        return FlopReport(self.batch, self.seq, kept)

    def blocks(self) -> list[dict[str, FlopCount]]:
        """Costs block by block: component (such as `attention`, `ffn.spectral`) -> cost.

        Components: ln_1, attention, then ln_2 and ffn (dense) or ffn.norm_in, ffn.spectral,
        ffn.polynomial, ffn.feedback, ffn.refine, ffn.projection, ffn.norm_out, as configured.
        """
        blocks: dict[int, dict[str, FlopCount]] = {}
        for path, count in self.rows.items():
            if match := re.search(r"(?:^|\.)blocks\.(\d+)\.(.+)$", path):
                blocks.setdefault(int(match[1]), {})[match[2]] = count
        return [blocks[number] for number in sorted(blocks)]

    def to_dict(self) -> dict[str, Any]:
        """batch, seq, rows (one object each, with its path), total and total without logits."""
        return {
            "batch": self.batch,
            "seq": self.seq,
            "rows": [{"path": path, **count.to_dict()} for path, count in self.rows.items()],
            "total": self.total.to_dict(),
            "without_logits": self.without_logits.total.to_dict(),
        }

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2)


@runtime_checkable
class _Counted(Protocol):
    def flop_count(self, batch: int, seq: int) -> FlopCount: ...


def count_flops(module: nn.Module, batch: int, seq: int) -> FlopReport:
    """Cost of a GPT, a block, an FFN or one of its parts on `batch` × `seq` tokens.

    Only shapes are read, so a module made under `torch.device("meta")` costs no memory.
    Raises TypeError for a module that has parameters and no formula.
    """
    rows: dict[str, FlopCount] = {}

    def walk(module: nn.Module, path: str) -> None:
        count = _count(module, batch, seq)
        if count is not None:
            rows[path] = count
            return
        if next(module.parameters(recurse=False), None) is not None:
            raise TypeError(f"no FLOP formula for {type(module).__name__} at {path!r}")
        for name, child in module.named_children():
            walk(child, f"{path}.{name}" if path else name)

    walk(module, "")
    return FlopReport(batch, seq, {path: c for path, c in rows.items() if c != FlopCount()})


def _count(module: nn.Module, batch: int, seq: int) -> FlopCount | None:
    """The module's own formula, or the formula of one of torch's modules, or None."""
    tokens = batch * seq
    if isinstance(module, _Counted):
        return module.flop_count(batch, seq)
    if isinstance(module, nn.Linear):
        macs = tokens * module.in_features * module.out_features
        return FlopCount(matmul=2 * macs, mac_equivalents=macs)
    if isinstance(module, nn.LayerNorm):
        # Mean (1), variance (square, add), subtract, divide, gain, bias.
        channels = tokens * module.normalized_shape[0]
        return FlopCount(elementwise=7 * channels, mac_equivalents=4 * channels)
    if isinstance(module, nn.Embedding):
        return FlopCount()
    return None
