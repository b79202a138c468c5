#!/usr/bin/env python3
"""Do the bootstrap's 80% intervals hold the truth 80% of the time?

    python scripts/studies/check_fit_coverage.py --json coverage.json
    python scripts/studies/check_fit_coverage.py --seeds 2 --draws 20 --resamples 100

Each draw is a made-up sweep of a known law: two families, 4 sizes, 3 seeds and 4 budgets over two
decades, as trunks of one size and seed from which each budget's result is cooled down. A trunk's
results share a log-normal error (sd 0.4%), and each has one of its own (sd 0.2%). Checked are the
compute multiplier, the exponents α and β, and that of N* ∝ C^(β/(α+β)).

Exit status 1: a coverage is outside 70% to 90%. With 100 draws a true 80% is measured with a
standard error of 4%.
"""

import argparse
import json
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

# Threads inside 7×7 matrices only wait for each other. Must be set before numpy is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from rich.table import Table

from sparse_gpt.scaling import FamilyLaw, Points, bootstrap, fit_families

TRUTH = FamilyLaw(
    families=("dense", "sparse"),
    E=np.full(2, 1.7),
    A=np.array([250.0, 200.0]),
    B=np.array([400.0, 370.0]),
    alpha=np.full(2, 0.35),
    beta=np.full(2, 0.30),
    flops_ratio=np.full(2, 3.0),
    kind="shared",
    objective=np.array(0.0),
    aicc=0.0,
    agreement=1.0,
)
SIZES = np.geomspace(1e6, 4e7, 4)  # forward FLOPs a token
BUDGETS = np.geomspace(1e15, 1e17, 4)  # training FLOPs
TRUNK_NOISE, OWN_NOISE = 0.004, 0.002
LOSS = 2.9  # nats, where the multiplier is read; with shared exponents it is the same anywhere
LOWEST, HIGHEST = 0.70, 0.90


def sweep(rng: np.random.Generator, seeds: int) -> Points:
    """The results of one made-up sweep."""
    rows = []
    for family in TRUTH.families:
        for m in SIZES.tolist():
            for seed in range(seeds):
                shared = TRUNK_NOISE * rng.standard_normal()
                for budget in BUDGETS.tolist():
                    tokens = budget / (3 * m)
                    noise = np.exp(shared + OWN_NOISE * rng.standard_normal())
                    rows.append(
                        {
                            "family": family,
                            "size": f"{m:.3g}",
                            "trunk": f"{family} {m:.3g} {seed}",
                            "seed": seed,
                            "lr": 1e-3,
                            "budget": budget,
                            "params": m / 2,
                            "params_without_embeddings": m / 2,
                            "forward_flops": m,
                            "forward_flops_without_logits": m,
                            "training_flops": budget,
                            "training_flops_without_logits": budget,
                            "tokens": tokens,
                            "loss": float(TRUTH.predict(family, m, tokens)) * noise,
                        }
                    )
    return Points.from_rows(rows)


def quantities(law: FamilyLaw) -> dict[str, NDArray[np.float64]]:
    """What is checked, of a law or of all draws of one."""
    alpha, beta = law.alpha[..., 0], law.beta[..., 0]
    return {
        "compute multiplier": law.compute_for("dense", LOSS) / law.compute_for("sparse", LOSS),
        "alpha": alpha,
        "beta": beta,
        "exponent of N*": beta / (alpha + beta),
    }


def check(seed: int, seeds: int, resamples: int) -> dict[str, tuple[float, float, float]]:
    """By quantity: the estimate and the ends of its 80% interval, from one sweep."""
    points = sweep(np.random.default_rng(seed), seeds)
    law = fit_families(points)
    estimates = quantities(law)
    drawn = quantities(bootstrap(points, law, resamples, seed).law)
    return {
        name: (float(estimates[name]), *np.percentile(values, [10, 90]).tolist())
        for name, values in drawn.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="runs of each size")
    parser.add_argument("--draws", type=int, default=100, help="sweeps to make up")
    parser.add_argument("--first", type=int, default=0, help="random seed of the first sweep")
    parser.add_argument("--resamples", type=int, default=200, help="bootstrap refits of each")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()

    with ProcessPoolExecutor(options.processes) as pool:
        jobs = [
            pool.submit(check, options.first + draw, options.seeds, options.resamples)
            for draw in range(options.draws)
        ]
        done = track(as_completed(jobs), "sweeps", total=len(jobs), console=Console(stderr=True))
        results = [job.result() for job in done]

    truth = {name: float(value) for name, value in quantities(TRUTH).items()}
    report = {}
    for name, true in truth.items():
        value, low, high = np.array([result[name] for result in results]).T
        report[name] = {
            "truth": true,
            "coverage": float(np.mean((low <= true) & (true <= high))),
            "bias": float(value.mean() - true),
            "sd": float(value.std()),
            "mean_width": float(np.mean(high - low)),
        }
    columns = ("truth", "coverage", "bias", "sd", "mean_width")
    table = Table("quantity", *columns, title=f"80% intervals of {options.draws} sweeps")
    for name, row in report.items():
        table.add_row(name, *(f"{row[column]:.4g}" for column in columns))
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({**vars(options), "json": None, **report}, indent=2))
    outside = [name for name, row in report.items() if not LOWEST <= row["coverage"] <= HIGHEST]
    if outside:
        print(f"outside {LOWEST:.0%} to {HIGHEST:.0%}: {', '.join(outside)}", file=sys.stderr)
    sys.exit(bool(outside))


if __name__ == "__main__":
    main()
