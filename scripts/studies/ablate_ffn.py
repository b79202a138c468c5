#!/usr/bin/env python3
"""Train every variant of a study and report what each is worth.

    python scripts/studies/ablate_ffn.py docs/studies/ffn-d128.yaml --out runs/study --jobs 2

A study names a run (as a run file does) and variants of it; each variant is trained with every
learning rate and seed that it names, by `sparse-gpt train` on one device. Finished runs are never
repeated and killed ones go on, so the command may be stopped and started again at any time.

    run: {model: ..., data: ..., ...}     what all variants share
    lr: [3e-3]                            learning rates and seeds unless a variant names its own;
    seeds: [0]                            lr: {1e-3: [0], 3e-3: [0, 1, 2]} gives each its own seeds
    variants:
      dense: {set: {model.ffn: dense}, lr: [1e-3, 3e-3]}
      start: {set: {model.ffn: paper}}
      soft: {from: start, set: {model.ffn.spectral.selection: soft}}

Writes OUT/results.jsonl (one object a run), OUT/table.md and OUT/plots/*.png as runs finish.
"""

import argparse
import itertools
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

from sparse_gpt.config.load import build_config, read_yaml, to_yaml
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.plan.compare import summaries
from sparse_gpt.sweep.execute import Trainer
from sparse_gpt.train.run_dir import finished


@dataclass(frozen=True)
class Run:
    """One training run of the study."""

    variant: str
    lr: float
    seed: int
    changes: dict[str, Any]
    config_path: Path
    config: RunConfig

    def train(self, trainer: Trainer) -> None:
        """Train it under the launcher; its log goes beside its metrics."""
        log = Path(f"{self.config.run_dir}.log")
        if trainer.train(self.config_path, log):
            print(f"{self.config.run_dir}: failed, see {log}", file=sys.stderr)

    def result(self) -> dict[str, Any]:
        """What the finished run was, cost and reached."""
        found = summaries([Path(self.config.run_dir)])[self.config.run_dir]
        provenance = json.loads((Path(self.config.run_dir) / "provenance.json").read_text())
        start = provenance["starts"][-1]
        return {
            "variant": self.variant,
            "lr": self.lr,
            "seed": self.seed,
            "changes": self.changes,
            "tokens": found.steps * self.config.batch.global_tokens,
            **vars(found),
            "provenance": start,
        }


def read_study(path: Path, out: Path) -> list[Run]:
    """All runs of a study file, their run files written under `out`."""
    study = read_yaml(path)
    unknown = study.keys() - {"run", "lr", "seeds", "variants"}
    if unknown:
        raise ConfigError(f"{path}: unknown key {sorted(unknown)[0]!r}")
    configs = out / "configs"
    configs.mkdir(parents=True, exist_ok=True)
    runs = []
    for name, variant in study["variants"].items():
        unknown = variant.keys() - {"from", "set", "lr", "seeds"}
        if unknown:
            raise ConfigError(f"{path}: variants.{name}: unknown key {sorted(unknown)[0]!r}")
        changes = dict(_changes(path, study["variants"], name))
        overrides = [f"{key}={json.dumps(value)}" for key, value in changes.items()]
        seeds = variant.get("seeds", study.get("seeds", [0]))
        rates = variant.get("lr", study.get("lr", [study["run"]["optimizer"]["lr"]]))
        if not isinstance(rates, dict):
            rates = dict.fromkeys(rates, seeds)
        for lr in rates:
            for seed in rates[lr]:
                label = re.sub(r"[^\w.-]+", "-", f"{name} lr{float(lr):g} s{seed}")
                mine = [f"optimizer.lr={lr}", f"seed={seed}", f"run_dir={out / 'runs' / label}"]
                config = build_config(path, study["run"], [*overrides, *mine])
                file = configs / f"{label}.yaml"
                file.write_text(to_yaml(config))
                runs.append(Run(name, float(lr), seed, changes, file, config))
    return runs


def _changes(path: Path, variants: dict[str, Any], name: str) -> Iterator[tuple[str, Any]]:
    """The overrides of a variant, those of what it comes from first."""
    if name not in variants:
        raise ConfigError(f"{path}: no variant {name!r}; there are {', '.join(variants)}")
    parent = variants[name].get("from")
    if parent:
        yield from _changes(path, variants, parent)
    yield from variants[name].get("set", {}).items()


def report(runs: list[Run], out: Path) -> None:
    """Write the results of the finished runs: JSON lines, a table, plots."""
    results = [run.result() for run in runs if finished(run.config)]
    if not results:
        return
    (out / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in results))
    rows = [_best(name, results) for name in dict.fromkeys(row["variant"] for row in results)]
    (out / "table.md").write_text(table(rows))
    plot(results, rows, out / "plots")


def _best(variant: str, results: list[dict[str, Any]]) -> dict[str, Any]:
    """A variant at the learning rate with the lowest mean loss over its seeds."""
    by_lr: dict[float, list[dict[str, Any]]] = {}
    for row in results:
        if row["variant"] == variant:
            by_lr.setdefault(row["lr"], []).append(row)
    means = {lr: statistics.fmean(r["validation_loss"] for r in by_lr[lr]) for lr in by_lr}
    lr = min(means, key=lambda lr: means[lr] if math.isfinite(means[lr]) else math.inf)
    losses = [row["validation_loss"] for row in by_lr[lr]]
    return {**by_lr[lr][0], "losses": losses, "mean": means[lr], "n_lr": len(by_lr)}


def table(rows: list[dict[str, Any]]) -> str:
    """A row a variant; differences are to the first variant."""
    lines = [
        "| variant | parameters without embeddings | FFN MACs a token | training FLOPs | tokens "
        "| learning rate (tried) | validation loss (seeds) | to first |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        spread = f" ({min(row['losses']):.3f} to {max(row['losses']):.3f}, {len(row['losses'])})"
        lines.append(
            f"| {row['variant']} | {row['parameters_without_embeddings']:,} "
            f"| {row['ffn_macs']:,} | {row['training_flops']:.3g} | {row['tokens']:,} "
            f"| {row['lr']:g} ({row['n_lr']}) "
            f"| {row['mean']:.3f}{spread if len(row['losses']) > 1 else ''} "
            f"| {row['mean'] - rows[0]['mean']:+.3f} |"
        )
    return "\n".join(lines) + "\n"


def plot(results: list[dict[str, Any]], rows: list[dict[str, Any]], folder: Path) -> None:
    """`variants.png`, every variant's seeds beside the first's; `learning_rates.png`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    folder.mkdir(exist_ok=True)
    figure, axes = plt.subplots(figsize=(8, 1 + 0.28 * len(rows)), layout="constrained")
    for place, row in enumerate(rows):
        axes.plot(row["losses"], [place] * len(row["losses"]), "o", color="0.3", markersize=5)
    axes.axvline(rows[0]["mean"], color="0.6", linestyle="--", linewidth=1)
    axes.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel(f"validation loss, nats a token (dashed: {rows[0]['variant']})")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(folder / "variants.png", dpi=120)
    plt.close(figure)

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    tuned = [row["variant"] for row in rows if row["n_lr"] > 1]
    for marker, variant in zip(itertools.cycle("osD^vPX"), tuned, strict=False):
        points = sorted((r["lr"], r["validation_loss"]) for r in results if r["variant"] == variant)
        axes.plot(*zip(*points, strict=True), marker=marker, label=variant)
    axes.set_xscale("log")
    axes.set_xlabel("peak learning rate")
    axes.set_ylabel("validation loss, nats a token")
    axes.grid(alpha=0.3)
    if tuned:
        axes.legend()
    figure.savefig(folder / "learning_rates.png", dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, sharing the cores")
    parser.add_argument("--only", nargs="*", help="these variants alone")
    args = parser.parse_args()
    try:
        runs = read_study(args.study, args.out)
    except (ConfigError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    if args.only:
        runs = [run for run in runs if run.variant in args.only]
    trainer = Trainer(args.jobs, devices=1)
    columns = (
        "[progress.description]{task.description}",
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    todo = [run for run in runs if not finished(run.config)]
    with Progress(*columns) as progress, ThreadPoolExecutor(args.jobs) as pool:
        task = progress.add_task(args.study.stem, total=len(runs), completed=len(runs) - len(todo))
        for _ in pool.map(lambda run: run.train(trainer), todo):
            progress.advance(task)
            report(runs, args.out)
    report(runs, args.out)


if __name__ == "__main__":
    main()
