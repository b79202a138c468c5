"""Steps that others have published, held against `sparse_gpt.plan.step`: is its model right?

Of each series the first row tells what products take, once taken to hide all links and once none;
the model then says what the others should take. Facts of tables alone; where from is in `source`.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from sparse_gpt.plan.step import Cluster, StepCost, exchange_cost, step_cost

_TITAN = "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md, tables 1 and 3"
_FOUNDRY = "llm-foundry, scripts/train/benchmarking/README.md"
_BERT = "DeepSpeed, Microsoft DeepSpeed achieves the fastest BERT training time, table 1"
_MOE = "DeepSpeed, DeepSpeed-MoE for NLG, table 2"


@dataclass(frozen=True)
class Row:
    """Seconds of a step on so many GPUs; `work`: its products on a GPU, of the first row's."""

    gpus: int
    seconds: float
    work: float = 1.0
    exchange: StepCost | None = None


@dataclass(frozen=True)
class Series:
    """One run on other numbers of GPUs; links in bytes/s a direction, bytes that a step gathers
    and reduces, an all-reduce counted twice."""

    what: str
    source: str
    per_node: int
    link: float
    network: float
    gathered: float
    reduced: float
    rows: tuple[Row, ...]

    def links(self, row: Row) -> StepCost:
        cluster = Cluster(row.gpus, self.per_node, self.link, self.network)
        cost = step_cost(cluster, 0.0, self.gathered, self.reduced)
        return cost + row.exchange if row.exchange else cost


def _fully_sharded(
    what: str, source: str, parameters: float, tokens: int, network: float, wide: int, **rows: int
) -> Series:
    """torch's FSDP in bf16: weights come twice a step, gradients go in `wide` bytes. `tokens` of a
    GPU and step; `rows`: tokens/s of a GPU, by the number of GPUs."""
    found = tuple(Row(int(gpus[1:]), tokens / speed) for gpus, speed in rows.items())
    link = 450e9 if "H100" in what else 300e9
    sizes = (2 * 2 * parameters, wide * parameters)
    return Series(what, source, 8, link, network, *sizes, found)


def _mixture() -> Row:
    """1.3B with 128 experts in every other of its 24 layers: 372 sequences/s on 128 A100s, where
    6.7B dense has 70; batches of 512 sequences of 2,048 tokens, recomputed."""
    cluster = Cluster(128, 8, 300e9, 25e9)
    rows = 512 * 2048 // 128 * 12
    sent = exchange_cost(cluster, 128, rows, 12, d_model=2048, width=2, blocks=128, again=True)
    ours, dense = (
        6 * parameters + 12 * layers * d_model * 2048
        for parameters, layers, d_model in ((1.3e9, 24, 2048), (6.7e9, 32, 4096))
    )
    return Row(128, 512 / 372, ours / dense, sent)


_UPDATES = 402_679_081 / 2**16 + 34_464_170 / 2**15  # of 64K and 32K sequences
_HOURS = {16: 33 + 13 / 60, 64: 8 + 41 / 60, 256: 2.4, 1024: 44 / 60}

SERIES = (
    _fully_sharded(
        "Llama 3.1 8B, H100, FSDP", _TITAN, 8.03e9, 2 * 8192, 50e9, 4, n8=5762, n128=5605
    ),
    _fully_sharded(
        "the same, compiled (H100)", _TITAN, 8.03e9, 2 * 8192, 50e9, 4, n8=6667, n128=6514
    ),
    _fully_sharded(
        "MPT 13B, H100, FSDP", _FOUNDRY, 12.85e9, 2 * 2048, 50e9, 4,
        n8=4792, n16=4767, n32=4811, n64=4800,
    ),
    _fully_sharded(
        "MPT 1B, H100, FSDP", _FOUNDRY, 1.316e9, 20 * 2048, 50e9, 4,
        n16=46037, n32=45130, n64=44402,
    ),
    _fully_sharded(
        "MPT 7B, A100-40GB, FSDP", _FOUNDRY, 6.659e9, 18 * 2048, 25e9, 2,
        n32=3725, n64=3665, n128=3623,
    ),
    Series(
        "BERT-large, V100, ZeRO", _BERT, 16, 150e9, 6.25e9, 0.0, 2 * 2 * 0.336e9,
        tuple(
            Row(gpus, hours * 3600 / _UPDATES, 16 / gpus) for gpus, hours in _HOURS.items()
        ),
    ),
    Series(
        "6.7B to 1.3B with 128 experts, A100", _MOE, 8, 300e9, 25e9, 0.0, 0.0,
        (Row(128, 512 / 70), _mixture()),
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """A published step, and what it should take: if links are hidden, and if none is."""

    what: str
    source: str
    first_gpus: int
    gpus: int
    seconds: float
    hidden: float
    exposed: float

    @property
    def errors(self) -> tuple[float, float]:
        """Of both, as shares of what was measured."""
        return self.hidden / self.seconds - 1, self.exposed / self.seconds - 1


def comparisons() -> Iterator[Comparison]:
    for series in SERIES:
        first, *others = series.rows
        alone = first.seconds - series.links(first).links_seconds
        for row in others:
            products = StepCost(first.seconds * row.work, 0, 0, 0, 0)
            hidden, _ = (products + series.links(row)).seconds
            exposed = alone * row.work + series.links(row).links_seconds
            yield Comparison(
                *(series.what, series.source, first.gpus, row.gpus, row.seconds, hidden, exposed)
            )
