#!/usr/bin/env python3
"""Does `optimizer.width_transfer` keep a training step's effect equal over widths?

    python scripts/studies/coord_check.py --json check.json --plot check.png
    python scripts/studies/coord_check.py --only dense --d-model 64 256 --seeds 1

The coordinate check of Yang et al. 2022 ("Tensor Programs V", appendix D.1): models of several
widths (heads of 32 channels) train a few steps of AdamW on the same tokens, drawn from a chain that
can be learned, at one learning rate, with the optimizer's groups of a real run and no clipping.
Measured is the RMS over one held-back batch of each component's output: at the start, and of its
change since. The slope of ln RMS(change) on ln d_model is 0 where a learning rate transfers.
Logits at the start shrink as 1/√d_model by design; what training adds does not.

Exit status 1: a slope of the change with transfer is beyond ±0.25. A wrong rule for any weight
changes an exponent by 1/2 at least, so that is nearer to a wrong rule than to none. Narrow models
add noise that falls with the width (a pair of heads at 64), so slopes are a little under 0.
"""

import argparse
import json
import math
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from sparse_gpt import GPT, ModelConfig
from sparse_gpt.config.schema import OptimizerConfig
from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.model.width import transfer_width
from sparse_gpt.provenance import provenance
from sparse_gpt.train.engine import parameter_groups

FAMILIES: dict[str, Any] = {
    "dense": {"preset": "dense", "fan_in_init": True},
    "default": "default",
    "light": "light",
    "light, factored projection": {"preset": "light", "projection": {"kind": "factored"}},
}
COMPONENTS = ("attention", "ffn", "final hidden", "logits")
TOLERANCE = 0.25  # of a slope, see above
HEAD_DIM, VOCAB, SEQ = 32, 512, 64


def batches(seed: int, size: int) -> Iterator[Tensor]:
    """`(size, SEQ + 1)` tokens at a time, each followed by one of its four successors.

    Successors are as unlike in frequency as words (Zipf's law), or nearly all pairs of a token and
    a prediction would stay unrelated, and their noise, which does fall with the width, be measured.
    """
    generator = torch.Generator().manual_seed(seed)
    zipf = 1 / torch.arange(1, VOCAB + 1)
    successors = torch.multinomial(zipf.expand(VOCAB, -1), 4, generator=generator)
    while True:
        tokens = torch.multinomial(zipf.expand(size, -1), SEQ + 1, True, generator=generator)
        choices = torch.randint(4, (size, SEQ), generator=generator)
        for t in range(SEQ):
            tokens[:, t + 1] = successors[tokens[:, t], choices[:, t]]
        yield tokens


@torch.no_grad()
def observe(model: GPT, tokens: Tensor) -> dict[str, Tensor]:
    """Each component's output for tokens `(batch, seq)`; of all blocks, one beside the other."""
    seen: dict[str, list[Tensor]] = {name: [] for name in COMPONENTS}
    hooks = [
        model.ln_f.register_forward_pre_hook(lambda _, args: seen["final hidden"].append(args[0]))
    ]
    for block in model.blocks:
        for name in ("attention", "ffn"):
            hook = lambda _, args, out, name=name: seen[name].append(out)  # noqa: E731
            hooks.append(block.get_submodule(name).register_forward_hook(hook))
    model.eval()
    seen["logits"].append(model(tokens))
    model.train()
    for handle in hooks:
        handle.remove()
    return {name: torch.stack(outputs) for name, outputs in seen.items()}


def rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def train(
    ffn: Any, d_model: int, transfer: bool, seed: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Component -> RMS at the `start` and of the `change` by training."""
    torch.manual_seed(seed)
    sizes = {"d_model": d_model, "n_head": d_model // HEAD_DIM, "n_layer": 2}
    model = GPT(ModelConfig(vocab_size=VOCAB, max_seq_len=SEQ, ffn=ffn, **sizes))
    settings = OptimizerConfig(lr=args.lr, width_transfer=transfer)
    if transfer:
        transfer_width(model)
    groups = parameter_groups(model, settings)
    for group in groups:
        group["lr"] = settings.lr * group["lr_multiplier"]
    optimizer = torch.optim.AdamW(groups, betas=settings.betas, eps=settings.eps, fused=True)
    dictionaries = [part for part in model.modules() if isinstance(part, BlockDictionary)]
    data = batches(seed, args.batch)
    held_back = next(data)[:, :-1]
    before = observe(model, held_back)
    for _ in range(args.steps):
        tokens = next(data)
        model(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for part in dictionaries:
            part.balance()
            part.loads.zero_()
    after = observe(model, held_back)
    return {
        name: {"start": rms(before[name]), "change": rms(after[name] - before[name])}
        for name in COMPONENTS
    }


def slope(points: list[dict[str, Any]], what: str) -> dict[str, float]:
    """Of ln RMS on ln d_model: the fit to all seeds, and the range of the seeds' own."""

    def fit(some: list[dict[str, Any]]) -> float:
        logs = [(math.log(p["d_model"]), math.log(p[what])) for p in some]
        return statistics.linear_regression(*zip(*logs, strict=True)).slope

    seeds = sorted({p["seed"] for p in points})
    own = [fit([p for p in points if p["seed"] == seed]) for seed in seeds]
    return {"slope": fit(points), "least": min(own), "most": max(own)}


def summarise(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each family, component and parametrization."""
    rows = []
    for family in dict.fromkeys(p["family"] for p in points):
        for component in COMPONENTS:
            for transfer in (False, True):
                wanted = {"family": family, "component": component, "transfer": transfer}
                some = [p for p in points if wanted.items() <= p.items()]
                fits = {what: slope(some, what) for what in ("start", "change")}
                flat = abs(fits["change"]["slope"]) <= TOLERANCE
                rows.append({**wanted, **fits, "flat": flat})
    return rows


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title="slope of ln RMS on ln d_model (range of the seeds)")
    for column in ("family", "component", "transfer"):
        shown.add_column(column)
    for column in ("start", "change", "flat"):
        shown.add_column(column, justify="right")
    for row in rows:
        fits = (row["start"], row["change"])
        shown.add_row(
            row["family"],
            row["component"],
            "yes" if row["transfer"] else "no",
            *(f"{f['slope']:+.2f} ({f['least']:+.2f} to {f['most']:+.2f})" for f in fits),
            "yes" if row["flat"] else "no",
        )
    return shown


def plot(points: list[dict[str, Any]], rows: list[dict[str, Any]], path: Path) -> None:
    """A panel for each family and component; the mean over the seeds, and every seed as a dot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    families = list(dict.fromkeys(p["family"] for p in points))
    size = (3 * len(COMPONENTS), 2.6 * len(families) + 0.4)
    grid: Any = {"squeeze": False, "sharey": "col", "layout": "constrained"}
    figure, panels = plt.subplots(len(families), len(COMPONENTS), figsize=size, **grid)
    widths = sorted({p["d_model"] for p in points})
    for row in rows:
        axes = panels[families.index(row["family"])][COMPONENTS.index(row["component"])]
        key = {name: row[name] for name in ("family", "component", "transfer")}
        some = [p for p in points if key.items() <= p.items()]
        style = ("-", "o", "0.0") if row["transfer"] else ("--", "s", "0.5")
        means = [
            statistics.geometric_mean(p["change"] for p in some if p["d_model"] == d)
            for d in widths
        ]
        label = f"{'with' if row['transfer'] else 'without'}: {row['change']['slope']:+.2f}"
        axes.plot(widths, means, style[0], marker=style[1], color=style[2], label=label)
        dots = [(p["d_model"], p["change"]) for p in some]
        axes.plot(*zip(*dots, strict=True), ".", color=style[2], markersize=3)
        axes.set_title(f"{row['family']}: {row['component']}", fontsize=9)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(widths, [str(d) for d in widths])
        axes.minorticks_off()
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=9))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, title="transfer, slope", title_fontsize=8)
    for axes in panels[-1]:
        axes.set_xlabel("d_model, channels")
    for line in panels:
        line[0].set_ylabel("RMS of the change")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--d-model", type=int, nargs="+", default=[64, 128, 256, 512, 1024])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help=f"sequences of {SEQ} tokens a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw the change over d_model")
    args = parser.parse_args()

    points = []
    for family in args.only:
        for d_model in args.d_model:
            for transfer in (False, True):
                for seed in range(args.seeds):
                    sizes = train(FAMILIES[family], d_model, transfer, seed, args)
                    key = {"family": family, "d_model": d_model, "transfer": transfer, "seed": seed}
                    points += [{**key, "component": name, **sizes[name]} for name in COMPONENTS]
    rows = summarise(points)
    Console(width=None if sys.stdout.isatty() else 120).print(table(rows))
    if args.json:
        report = {
            "command": " ".join(sys.argv),
            **provenance(),
            "lr": args.lr,
            "steps": args.steps,
            "tokens_per_step": args.batch * SEQ,
            "tolerance": TOLERANCE,
            "slopes": rows,
            "points": points,
        }
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(points, rows, args.plot)
    beyond = [row for row in rows if row["transfer"] and not row["flat"]]
    for row in beyond:
        where = f"{row['family']}, {row['component']}"
        print(f"{where}: slope {row['change']['slope']:+.2f} is beyond ±{TOLERANCE}")
    sys.exit(bool(beyond))


if __name__ == "__main__":
    main()
