"""The tables of a fitted sweep: points, frontiers and multipliers as CSV files."""

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_gpt.scaling import Comparison, Estimate, MeasuredMultiplier

Array = NDArray[np.float64]


def write_csv(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """One row or more, under the keys of the first."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def frontier_flops(comparison: Comparison, family: str) -> tuple[Array, NDArray[np.bool_]]:
    """Where a family's frontier is drawn, and which of it is beyond its largest budget."""
    budgets = comparison.points.budget[comparison.points.family == family]
    flops = np.geomspace(budgets.min(), 10 * budgets.max(), 81)
    return flops, flops > 1.0001 * budgets.max()


def write_curves(folder: Path, comparison: Comparison) -> None:
    """frontier.csv, multiplier.csv and multiplier_by_budget.csv."""
    rows = []
    for family in comparison.law.families:
        flops, extrapolated = frontier_flops(comparison, family)
        best = comparison.law.frontier(family, flops)
        low, high = comparison.frontier_band(family, flops)
        for i, c in enumerate(flops):
            rows.append(
                {
                    "family": family,
                    "training_flops": c,
                    "forward_flops_per_token": best.m[i],
                    "tokens": best.d[i],
                    "loss": best.loss[i],
                    "loss_low_80": low[i],
                    "loss_high_80": high[i],
                    "extrapolated": bool(extrapolated[i]),
                }
            )
    write_csv(folder / "frontier.csv", rows)
    rows = []
    for family, found in comparison.multipliers.items():
        for i, loss in enumerate(found.losses):
            row: dict[str, Any] = {"family": family, "loss": loss}
            row["extrapolated"] = bool(found.extrapolated[i])
            for name, estimate in (("compute", found.compute), ("seconds", found.seconds)):
                row |= _columns(name, estimate, i)
            rows.append(row)
    if rows:
        write_csv(folder / "multiplier.csv", rows)
    rows = [row for found in comparison.measured.values() for row in _measured_rows(found)]
    if rows:
        write_csv(folder / "multiplier_by_budget.csv", rows)


def _measured_rows(found: MeasuredMultiplier) -> list[dict[str, Any]]:
    names = ("params", "loss", "baseline_compute", "edge", "baseline_edge", "extrapolated")
    columns = [getattr(found, "losses" if name == "loss" else name).tolist() for name in names]
    return [
        {"family": found.family, "budget": budget}
        | dict(zip(names, row, strict=True))
        | _columns("compute", found.compute, i)
        | _columns("seconds", found.seconds, i)
        for i, (budget, *row) in enumerate(zip(found.budgets.tolist(), *columns, strict=True))
    ]


def _columns(name: str, estimate: Estimate | None, i: int) -> dict[str, float]:
    """An estimate's value and intervals at place i."""
    if estimate is None:
        return {}
    row = {name: estimate.value[i]}
    for level, interval in ((80, estimate.interval_80), (95, estimate.interval_95)):
        row[f"{name}_low_{level}"] = interval[0, i]
        row[f"{name}_high_{level}"] = interval[1, i]
    return row
