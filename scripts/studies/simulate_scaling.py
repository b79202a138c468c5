#!/usr/bin/env python
"""What a step costs past this machine, on paper: dense beside the preset `default`.

    python scripts/studies/simulate_scaling.py --gpu H200 --gpus 16 256 --mfu 0.3 --sizes 355m 13b
    python scripts/studies/simulate_scaling.py --page docs/scaling-out.md --out docs/scaling

Products: training FLOPs over GPUs, their peak and an assumed MFU. Links and memory: those of
`sparse-gpt plan`, held against published steps (published_steps.py). Nothing here is measured.
"""

import argparse
import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from published_steps import comparisons

from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.config import SIZES
from sparse_gpt.model.costs import model_report, parameter_counts
from sparse_gpt.plan.blocks import with_blocks
from sparse_gpt.plan.stage import largest_micro_batch, step_of
from sparse_gpt.plan.step import Cluster, StepCost
from sparse_gpt.train.gpus import GPUS

ROOT = Path(__file__).parents[2]
SHAPES = {
    **{name: shape for name, shape in SIZES.items() if name != "tiny"},
    "13b": {"d_model": 5120, "n_layer": 40, "n_head": 40, "max_seq_len": 1024},
}
FFNS = ("dense", "default")
TABLES = ("published", "sizes", "answers", "weak", "steps", "fits")
GIB = 2**30
STATES = 18  # bytes of a parameter: weight, summed gradient, master, two moments
_END = "\n<!-- end -->"


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
    """A way to take a step that fits: the stage, over how many ranks blocks are, micro-batch."""

    stage: int
    ranks: int
    micro_batch: int
    step: StepCost

    def __str__(self) -> str:
        return f"ZeRO-{self.stage}" + (f", blocks over {self.ranks}" if self.ranks > 1 else "")


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


def products_seconds(setting: Setting, size: str, ffn: str, gpus: int) -> float:
    report = model_report(run(size, ffn).model)
    flops = report.training / report.seq * setting.global_tokens
    return flops / (gpus * GPUS[setting.gpu].peak_flops * setting.mfu)


@lru_cache
def way(setting: Setting, size: str, ffn: str, gpus: int, stage: int, ranks: int) -> Way | None:
    """With the largest micro-batch that fits; None where none does."""
    config, cluster = run(size, ffn, setting.global_tokens), setting.cluster(gpus)
    memory = GPUS[setting.gpu].memory
    best = largest_micro_batch(with_blocks(config, ranks), gpus, stage, memory)
    if best is None:
        return None
    config = with_blocks(run(size, ffn, setting.global_tokens, best), ranks)
    products = products_seconds(setting, size, ffn, gpus)
    return Way(stage, ranks, best, step_of(config, stage, cluster, products))


def in_stages(setting: Setting, size: str, ffn: str, gpus: int) -> list[Way | None]:
    """ZeRO 1, 2 and 3, blocks over none."""
    return [way(setting, size, ffn, gpus, stage, 1) for stage in (1, 2, 3)]


def over_ranks(setting: Setting, size: str, ffn: str, gpus: int) -> list[Way | None]:
    """ZeRO 1 and 2 with blocks over every number of ranks that can be."""
    _, *numbers = run(size, ffn).shareable(gpus)
    return [way(setting, size, ffn, gpus, stage, n) for stage in (1, 2) for n in numbers]


def fastest(ways: Iterable[Way | None]) -> Way | None:
    """The one that ends first if no link is hidden."""
    return min((way for way in ways if way), key=lambda way: way.step.seconds[1], default=None)


def best(setting: Setting, size: str, ffn: str, gpus: int) -> Way | None:
    return fastest([*in_stages(setting, size, ffn, gpus), *over_ranks(setting, size, ffn, gpus)])


def sizes_table(sizes: list[str]) -> Iterator[list[str]]:
    head = "size, dense, `default`, active for a token, in dictionaries, one to a dense FFN"
    states = "states in GiB: dense; `default`, training GFLOPs a token: dense; `default`"
    yield f"{head}, {states}".split(", ")
    for size in sizes:
        models = [run(size, ffn).model for ffn in FFNS]
        dense, ours = (parameter_counts(model) for model in models)
        ratio = ours.dictionaries / (8 * models[0].d_model ** 2 * models[0].n_layer)
        states = [f"{n.total * STATES / GIB:,.3g}" for n in (dense, ours)]
        flops = [f"{model_report(m).training / m.max_seq_len / 1e9:.3g}" for m in models]
        millions = (dense.total, ours.total, ours.active, ours.dictionaries)
        cells = [f"{n / 1e6:,.0f}M" for n in millions]
        yield [size, *cells, f"{ratio:.1f}×", "; ".join(states), "; ".join(flops)]


def steps_table(setting: Setting, sizes: list[str], counts: list[int]) -> Iterator[list[str]]:
    stages = "ZeRO-1, ZeRO-2, ZeRO-3"
    head = f"size, GPUs, dense: products, {stages}, `default`: products, {stages}, blocks over N"
    yield head.split(", ")
    for size in sizes:
        for gpus in counts:
            cells = []
            for ffn in FFNS:
                ways = in_stages(setting, size, ffn, gpus)
                if ffn == "default":
                    ways.append(fastest(over_ranks(setting, size, ffn, gpus)))
                cells += [_ms(products_seconds(setting, size, ffn, gpus)), *map(_links, ways)]
            yield [size, str(gpus), *cells]


def _links(way: Way | None) -> str:
    if way is None:
        return "–"
    ranks = f"; Z{way.stage} N {way.ranks}" if way.ranks > 1 else ""
    text = f"{_ms(way.step.links_seconds)} ({way.micro_batch}{ranks})"
    return f"**{text}**" if way.step.links_seconds > way.step.products_seconds else text


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.0f}" if seconds >= 0.01 else f"{1e3 * seconds:.1f}"


def fits_table(setting: Setting, sizes: list[str], gpus: list[str]) -> Iterator[list[str]]:
    """The fewest GPUs, of powers of two from 8 to 1,024, on which one sequence a rank fits."""
    yield ["size", *(f"{_code(ffn)} on {gpu}" for gpu in gpus for ffn in FFNS)]
    for size in sizes:
        cells = []
        for gpu in gpus:
            on = replace(setting, gpu=gpu)
            for ffn in FFNS:
                by_stage = [_fewest(on, size, ffn, (stage,)) for stage in (1, 2, 3)]
                shared = [_fewest(on, size, ffn, (1, 2), True)] if ffn == "default" else []
                cells.append("; ".join([*by_stage, *shared]))
        yield [size, *cells]


def _fewest(
    setting: Setting, size: str, ffn: str, stages: tuple[int, ...], shared: bool = False
) -> str:
    for gpus in (2**n for n in range(3, 11)):
        ranks = min(64, gpus) if shared else 1
        if any(way(setting, size, ffn, gpus, stage, ranks) for stage in stages):
            return str(gpus)
    return "–"


def _code(ffn: str) -> str:
    return "dense" if ffn == "dense" else f"`{ffn}`"


def answers_table(
    setting: Setting, sizes: list[str], counts: list[int], multipliers: list[float]
) -> Iterator[list[str]]:
    """How to train each, how long a step is, and how many times sooner `default` is at a loss for
    which dense needs so many times its FLOPs."""
    worth = (f"a multiplier of {multiplier:g} is worth" for multiplier in multipliers)
    yield ["size", "GPUs", "dense takes", "step, ms", "`default` takes", "step, ms", *worth]
    for size in sizes:
        flops = [model_report(run(size, ffn).model).training for ffn in FFNS]
        for gpus in counts:
            dense, ours = (best(setting, size, ffn, gpus) for ffn in FFNS)
            cells = [cell for found in (dense, ours) for cell in _answer(found)]
            if dense and ours:
                steps = zip(dense.step.seconds, ours.step.seconds, strict=True)
                sooner = sorted(flops[1] / flops[0] * a / b for a, b in steps)
                cells += [_span(f"{m * n:.2f}" for n in sooner) for m in multipliers]
            else:
                cells += ["–"] * len(multipliers)
            yield [size, str(gpus), *cells]


def _answer(found: Way | None) -> list[str]:
    if found is None:
        return ["does not fit", "–"]
    return [f"{found}, {found.micro_batch}", _span(map(_ms, found.step.seconds))]


def _span(ends: Iterable[str]) -> str:
    return " to ".join(dict.fromkeys(ends))


def weak(setting: Setting, sizes: list[str], tokens: int) -> Iterator[dict[str, Any]]:
    """From 8 to 1,024 GPUs with `tokens` for each in a step: the share of a step that is products,
    if links are hidden as far as they can be, and if none is."""
    for size in sizes:
        for ffn in FFNS:
            for gpus in (2**n for n in range(3, 11)):
                own = replace(setting, global_tokens=tokens * gpus)
                found = best(own, size, ffn, gpus)
                row: dict[str, Any] = {"size": size, "ffn": ffn, "gpus": gpus, "way": str(found)}
                if found:
                    shares = [found.step.products_seconds / s for s in found.step.seconds]
                    row |= {"micro_batch": found.micro_batch, **asdict(found.step)}
                    row |= {"share_hidden": shares[0], "share_exposed": shares[1]}
                yield row


def weak_table(rows: list[dict[str, Any]]) -> Iterator[list[str]]:
    counts = list(dict.fromkeys(row["gpus"] for row in rows))
    yield ["size", "FFN", *map(str, counts)]
    for key in dict.fromkeys((row["size"], row["ffn"]) for row in rows):
        shares = [_share(row) for row in rows if (row["size"], row["ffn"]) == key]
        yield [key[0], _code(key[1]), *shares]


def _share(row: dict[str, Any]) -> str:
    if "share_hidden" not in row:
        return "–"
    ranks = row["way"].partition(" over ")[2]
    text = _span(f"{100 * row[f'share_{end}']:.0f}" for end in ("exposed", "hidden"))
    return text + (f" (N {ranks})" if ranks else "")


def draw(rows: list[dict[str, Any]], tokens: int, gpu: str, path: Path) -> None:
    sizes = list(dict.fromkeys(row["size"] for row in rows))
    figure, axes = plt.subplots(1, len(sizes), figsize=(3 * len(sizes), 3.2), sharey=True)
    for axis, size in zip(axes if len(sizes) > 1 else [axes], sizes, strict=True):
        for ffn, colour in zip(FFNS, ("tab:grey", "tab:blue"), strict=True):
            own = [row for row in rows if (row["size"], row["ffn"]) == (size, ffn)]
            own = [row for row in own if "share_hidden" in row]
            gpus = [row["gpus"] for row in own]
            ends = [[row[f"share_{end}"] for row in own] for end in ("exposed", "hidden")]
            axis.fill_between(gpus, *ends, color=colour, alpha=0.25)
            axis.plot(gpus, ends[0], "o-", color=colour, label=ffn, markersize=3)
        axis.set(title=size, xscale="log", xlabel="GPUs", ylim=(0, 1.05))
        axis.set_xticks([8, 64, 512], ["8", "64", "512"])
        axis.minorticks_off()
    figure.axes[0].set_ylabel("products' share of a step")
    figure.axes[0].legend()
    figure.suptitle(f"{tokens:,} tokens a {gpu} and step; line: no link hidden, band: up to all")
    figure.tight_layout()
    figure.savefig(path, dpi=100)


def published_table() -> Iterator[list[str]]:
    yield ["published", "GPUs", "step, s", "model: hidden", "model: none hidden", "off by"]
    for found in comparisons():
        times = (f"{n:.3g}" for n in (found.seconds, found.hidden, found.exposed))
        off = " and ".join(f"{100 * error:+.1f}%" for error in found.errors)
        yield [found.what, f"{found.first_gpus} → {found.gpus}", *times, off.replace("-", "−")]


def _mark(name: str) -> str:
    return f"<!-- simulate_scaling: {name} -->\n"


def markdown(rows: Iterable[list[str]]) -> str:
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
    parser.add_argument("--tokens", type=int, default=2**14, help="a GPU's, in weak scaling")
    parser.add_argument(
        "--multipliers", nargs="+", type=float, default=[1.6, 2.4], help="dense FLOPs to default's"
    )
    parser.add_argument("--page", type=Path, help="write the tables between this page's marks")
    parser.add_argument("--out", type=Path, help="a folder for weak.json and weak.png")
    args = parser.parse_args()
    setting = Setting(
        args.gpu, args.mfu, args.global_tokens, args.gpus_per_node, args.network * 1e9
    )
    page = args.page.read_text() if args.page else ""
    for head in map(_mark, TABLES) if args.page else ():
        if page.count(head) != 1 or _END not in page.partition(head)[2]:
            parser.error(f"{args.page}: has no {head.strip()} ... {_END.strip()}")
    rows = list(weak(setting, args.sizes, args.tokens))
    tables = (
        published_table(),
        sizes_table(args.sizes),
        answers_table(setting, args.sizes, args.gpus, args.multipliers),
        weak_table(rows),
        steps_table(setting, args.sizes, args.gpus),
        fits_table(setting, args.sizes, list(dict.fromkeys([args.gpu, "H200"]))),
    )
    for name, table in zip(TABLES, map(markdown, tables), strict=True):
        if args.page:
            before, head, rest = page.partition(_mark(name))
            page = f"{before}{head}\n{table}\n{rest[rest.index(_END) :]}"
        else:
            print(f"{name}\n\n{table}\n")
    if args.page:
        args.page.write_text(page)
    if args.out:
        found = {**vars(setting), "tokens": args.tokens, "weak": rows}
        published = [{**asdict(c), "errors": c.errors} for c in comparisons()]
        text = json.dumps({**found, "published": published}, indent=1)
        (args.out / "weak.json").write_text(text + "\n")
        draw(rows, args.tokens, args.gpu, args.out / "weak.png")


if __name__ == "__main__":
    main()
