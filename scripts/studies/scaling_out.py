#!/usr/bin/env python
"""What a step costs past this machine, on paper: dense beside the preset `default`.

    python scripts/studies/scaling_out.py
    python scripts/studies/scaling_out.py --gpu H200 --gpus 16 256 --mfu 0.3 --sizes 355m 13b
    python scripts/studies/scaling_out.py --page docs/scaling-out.md     write its tables into it

Products: training FLOPs over GPUs, their peak and an assumed MFU. Links: bytes as DeepSpeed moves
them (`sparse_gpt.plan.step`) over what data sheets say. Memory: that of `sparse-gpt plan`. Sharded
by block is what is not built: each block of a dictionary is on one of R ranks, and tokens travel.
Nothing here is measured.
"""

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.config import SIZES, DictionaryConfig
from sparse_gpt.model.costs import model_report, parameter_counts
from sparse_gpt.plan.memory import trace
from sparse_gpt.plan.plan import make_plan
from sparse_gpt.plan.stage import RESERVED, Stage
from sparse_gpt.plan.step import Cluster, StepCost, step_cost
from sparse_gpt.train.gpus import GPUS

ROOT = Path(__file__).parents[2]
SHAPES = {
    **{name: shape for name, shape in SIZES.items() if name != "tiny"},
    "13b": {"d_model": 5120, "n_layer": 40, "n_head": 40, "max_seq_len": 1024},
}
GIB = 2**30
WIDTH = 2  # bytes of a weight or an activation in bf16
STATES = 4 + 12  # of a parameter: the gradient's sum, and master and moments, both float32


@dataclass(frozen=True)
class Setting:
    """What is assumed."""

    gpu: str
    mfu: float
    global_tokens: int
    gpus_per_node: int
    network: float

    def cluster(self, gpus: int) -> Cluster:
        return Cluster(gpus, self.gpus_per_node, GPUS[self.gpu].link, self.network)


@dataclass(frozen=True)
class Way:
    """A way to take a step that fits: how it is sharded, with which micro-batch."""

    name: str
    micro_batch: int
    step: StepCost
    ranks: int = 1  # over which a dictionary's blocks are shared out


@lru_cache
def run(size: str, ffn: str, tokens: int = 2**22, micro_batch: int = 1) -> RunConfig:
    """A run in bf16 that computes nothing twice."""
    shape = ", ".join(f"{key}: {value}" for key, value in SHAPES[size].items())
    overrides = [
        f"model={{{shape}, ffn: {ffn}}}",
        f"batch={{global_tokens: {tokens}, micro_batch: {micro_batch}}}",
        "deepspeed.zero_optimization.reduce_bucket_size=50000000",
    ]
    return load_config(ROOT / "configs/124m.yaml", overrides)


@lru_cache
def plan(
    setting: Setting, size: str, ffn: str, gpus: int, micro_batch: int = 1
) -> dict[int, Stage]:
    """What `sparse-gpt plan` says of ZeRO 1, 2 and 3."""
    config = run(size, ffn, setting.global_tokens, micro_batch)
    return make_plan(
        config, gpus, setting.gpu, setting.mfu, setting.gpus_per_node, setting.network
    ).stages


def in_stages(setting: Setting, size: str, ffn: str, gpus: int) -> list[Way | None]:
    """A step in ZeRO 1, 2 and 3 with the largest micro-batch that fits; None where none does."""
    found: list[Way | None] = []
    for stage, planned in plan(setting, size, ffn, gpus).items():
        best = planned.largest_micro_batch
        step = plan(setting, size, ffn, gpus, best)[stage].step if best else None
        found.append(Way(f"ZeRO-{stage}", best, step) if best and step else None)
    return found


def by_block(setting: Setting, size: str, gpus: int) -> Way | None:
    """`default` with its dictionary sharded by block, over as many ranks as is fastest."""
    return fastest([over_ranks(setting, size, gpus, ranks) for ranks in (8, 16, 32, 64)])


def over_ranks(setting: Setting, size: str, gpus: int, ranks: int) -> Way | None:
    """The same over `ranks`, all else ZeRO-1; None where it does not fit.

    A dictionary's gradients are reduced over the ranks that hold the same blocks, each of them on
    another node. A token's channels go to its k blocks and back, and so do their gradients.
    """
    model = run(size, "default", setting.global_tokens).model
    counts, kept = parameter_counts(model), trace(model, "bf16", "none")
    spectral = model.ffn.spectral if model.ffn.kind == "sparse" else None
    assert isinstance(spectral, DictionaryConfig)
    rest = counts.total - counts.dictionaries
    states = (WIDTH + 4) * (rest + counts.dictionaries / ranks) + 12 * counts.total / gpus
    left = GPUS[setting.gpu].memory - RESERVED - states
    sequences = int(left // (kept.ends + model.n_layer * kept.block))
    if ranks > gpus or sequences < 1:
        return None
    micro_batch = min(2 ** (sequences.bit_length() - 1), setting.global_tokens // 1024 // gpus)
    products = plan(setting, size, "default", gpus)[1].step.products_seconds
    links = setting.cluster(gpus)
    whole = step_cost(links, products, WIDTH * rest, 2 * WIDTH * rest)
    alike = Cluster(gpus // ranks, 1, links.link, links.network)
    share = WIDTH * counts.dictionaries // ranks
    own = step_cost(alike, 0, share, 2 * share)
    rows = setting.global_tokens // gpus * spectral.top_k * model.n_layer
    travel = 4 * rows * model.d_model * WIDTH
    outside = travel * max(0, ranks - links.gpus_per_node) / ranks
    inside = travel * (min(ranks, links.gpus_per_node) - 1) / ranks
    step = StepCost(
        products,
        whole.gathered_bytes + own.gathered_bytes + inside + outside,
        whole.reduced_bytes + own.reduced_bytes,
        whole.gather_seconds
        + own.gather_seconds
        + max(inside / links.link, outside / links.network),
        whole.reduce_seconds + own.reduce_seconds,
    )
    return Way(f"blocks over {ranks}", micro_batch, step, ranks)


def fastest(ways: list[Way | None]) -> Way | None:
    """The one that ends first if no link is hidden."""
    return min((way for way in ways if way), key=lambda way: way.step.seconds[1], default=None)


def sizes_table(sizes: list[str]) -> Iterator[list[str]]:
    head = "size, dense, `default`, active for a token, in dictionaries, one to a dense FFN"
    states = "states in GiB: dense; `default`, training GFLOPs a token: dense; `default`"
    yield f"{head}, {states}".split(", ")
    for size in sizes:
        models = [run(size, ffn).model for ffn in ("dense", "default")]
        dense, ours = (parameter_counts(model) for model in models)
        ratio = ours.dictionaries / (8 * models[0].d_model ** 2 * models[0].n_layer)
        states = [f"{n.total * (WIDTH + STATES) / GIB:,.3g}" for n in (dense, ours)]
        flops = [f"{model_report(m).training / m.max_seq_len / 1e9:.3g}" for m in models]
        millions = (dense.total, ours.total, ours.active, ours.dictionaries)
        cells = [f"{n / 1e6:,.0f}M" for n in millions]
        yield [size, *cells, f"{ratio:.1f}×", "; ".join(states), "; ".join(flops)]


def steps_table(setting: Setting, sizes: list[str], counts: list[int]) -> Iterator[list[str]]:
    stages = "ZeRO-1, ZeRO-2, ZeRO-3"
    head = f"size, GPUs, dense: products, {stages}, `default`: products, {stages}, by block"
    yield head.split(", ")
    for size in sizes:
        for gpus in counts:
            cells = []
            for ffn in ("dense", "default"):
                links = in_stages(setting, size, ffn, gpus)
                if ffn == "default":
                    links.append(by_block(setting, size, gpus))
                step = plan(setting, size, ffn, gpus)[1].step
                cells += [_ms(step.products_seconds), *map(_links, links)]
            yield [size, str(gpus), *cells]


def _links(way: Way | None) -> str:
    if way is None:
        return "–"
    ranks = f"; R {way.ranks}" if way.ranks > 1 else ""
    text = f"{_ms(way.step.links_seconds)} ({way.micro_batch}{ranks})"
    return f"**{text}**" if way.step.links_seconds > way.step.products_seconds else text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


def fits_table(setting: Setting, sizes: list[str], gpus: list[str]) -> Iterator[list[str]]:
    """The fewest GPUs, of powers of two from 8 to 1,024, on which one sequence a rank fits."""
    yield ["size", *(f"{ffn} on {gpu}" for gpu in gpus for ffn in ("dense", "`default`"))]
    for size in sizes:
        cells = []
        for gpu in gpus:
            on = Setting(**{**vars(setting), "gpu": gpu})
            for ffn in ("dense", "default"):
                fewest = [_fewest(on, size, ffn, stage) for stage in (1, 2, 3)]
                if ffn == "default":
                    counts = (2**n for n in range(3, 11))
                    fewest.append(next((f"{n}" for n in counts if by_block(on, size, n)), "–"))
                cells.append("; ".join(fewest))
        yield [size, *cells]


def _fewest(setting: Setting, size: str, ffn: str, stage: int) -> str:
    for gpus in (2**n for n in range(3, 11)):
        if plan(setting, size, ffn, gpus)[stage].largest_micro_batch:
            return str(gpus)
    return "–"


def worth_table(
    setting: Setting, sizes: list[str], counts: list[int], multiplier: float
) -> Iterator[list[str]]:
    """How many times sooner `default` is at a loss for which dense needs `multiplier` × FLOPs."""
    head = "size, GPUs, dense takes, `default` takes, worth if links are hidden, if none is"
    yield f"{head}, and without sharding by block".split(", ")
    for size in sizes:
        reports = [model_report(run(size, f).model) for f in ("dense", "default")]
        more = multiplier * reports[1].training / reports[0].training
        for gpus in counts:
            dense = fastest(in_stages(setting, size, "dense", gpus))
            stages = fastest(in_stages(setting, size, "default", gpus))
            ours = fastest([stages, by_block(setting, size, gpus)])
            if dense is None or ours is None:
                names = (way.name if way else "does not fit" for way in (dense, ours))
                yield [size, str(gpus), *names, "–", "–", "–"]
                continue
            worth = [
                more * b / a for a, b in zip(ours.step.seconds, dense.step.seconds, strict=True)
            ]
            without = more * dense.step.seconds[1] / stages.step.seconds[1] if stages else None
            yield [
                *(size, str(gpus), dense.name, ours.name),
                *(f"{n:.2f}" for n in worth),
                f"{without:.2f}" if without else "–",
            ]


def markdown(rows: Iterator[list[str]]) -> str:
    head, *body = rows
    lines = [head, ["---", *("---:" for _ in head[1:])], *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    parser.add_argument("--gpu", default="H100", choices=GPUS)
    parser.add_argument("--gpus", nargs="+", type=int, default=[8, 64, 256, 1024], metavar="N")
    parser.add_argument("--gpus-per-node", type=int, default=8)
    parser.add_argument("--network", type=float, default=50, help="GB/s a GPU between nodes")
    parser.add_argument("--mfu", type=float, default=0.4)
    parser.add_argument("--global-tokens", type=int, default=2**22, help="tokens of a step")
    parser.add_argument("--multiplier", type=float, default=2, help="dense FLOPs over default's")
    parser.add_argument("--page", type=Path, help="write the tables between this page's marks")
    args = parser.parse_args()
    setting = Setting(
        args.gpu, args.mfu, args.global_tokens, args.gpus_per_node, args.network * 1e9
    )
    tables = {
        "sizes": sizes_table(args.sizes),
        "steps": steps_table(setting, args.sizes, args.gpus),
        "fits": fits_table(setting, args.sizes, list(dict.fromkeys([args.gpu, "H200"]))),
        "worth": worth_table(setting, args.sizes, args.gpus, args.multiplier),
    }
    page = args.page.read_text() if args.page else ""
    for name, rows in tables.items():
        table = markdown(rows)
        if args.page:
            head, end = f"<!-- scaling_out: {name} -->\n", "\n<!-- end -->"
            if page.count(head) != 1 or end not in page.partition(head)[2]:
                parser.error(f"{args.page}: has no {head.strip()} ... {end.strip()}")
            before, _, rest = page.partition(head)
            page = f"{before}{head}\n{table}\n{rest[rest.index(end) :]}"
        else:
            print(f"{name}\n\n{table}\n")
    if args.page:
        args.page.write_text(page)


if __name__ == "__main__":
    main()
