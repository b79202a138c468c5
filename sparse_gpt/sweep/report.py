"""What a sweep shows: its points and fitted curves in TensorBoard, and as PNG, CSV and JSON.

fit/points.csv  fit.json  frontier.csv  multiplier.csv  multiplier_by_budget.csv  *.png
fit/<family>/...      TensorBoard runs that overlay, with training GFLOPs for the step
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sparse_gpt.files import replaced_folder, to_json
from sparse_gpt.progress import Progress
from sparse_gpt.provenance import provenance
from sparse_gpt.scaling import Comparison, Estimate, Points, ScalingError, compare, usable
from sparse_gpt.sweep import plots
from sparse_gpt.sweep.collect import point_rows
from sparse_gpt.sweep.grid import Sweep
from sparse_gpt.sweep.summary import summarize
from sparse_gpt.sweep.tables import frontier_flops, write_csv, write_curves

Array = NDArray[np.float64]

_LOSS = "scaling/loss_by_gflops"
_MULTIPLIER = "scaling/compute_multiplier"
_MEASURED = "scaling/measured_multiplier"
_LAYOUT = {
    "Scaling": {
        "loss by training GFLOPs": ["Multiline", [_LOSS]],
        "FLOPs of the baseline over the family's, at equal loss, by the baseline's GFLOPs": [
            "Margin",
            [_MULTIPLIER, f"{_MULTIPLIER}/low_80", f"{_MULTIPLIER}/high_80"],
        ],
        "the same from the isoFLOP minima alone, by the family's GFLOPs": [
            "Margin",
            [_MEASURED, f"{_MEASURED}/low_80", f"{_MEASURED}/high_80"],
        ],
    }
}
_LIVE_RESAMPLES = 20


@dataclass(frozen=True)
class Report:
    """Where the fit lies, what it says in a few lines, and all of it."""

    out: Path
    summary: list[str]
    record: dict[str, Any]


def fit_sweep(sweep: Sweep, resamples: int, progress: bool = False) -> Report:
    """Fit the finished runs and publish `fit/`, whole, in place of the one before.

    `progress`: a bar on a terminal, where it takes longer than two seconds.
    Raises ScalingError, in one line, where the runs cannot support a fit.
    """
    plots.check_plots()
    rows = point_rows(sweep)
    points = _points(rows)
    there = usable(points)[0].families
    for family in sweep.config.families:
        if family not in there:
            raise ScalingError(
                f"family {family!r} has no usable run yet ({len(rows)} of {len(sweep.cells)} runs "
                "are finished); see sparse-gpt sweep status"
            )
    with Progress("refits", 1, progress, of_bytes=False, after=2) as bar:
        comparison = compare(points, sweep.config.baseline, resamples, progress=bar.at)
    summary = summarize(comparison)
    record = {
        "summary": summary,
        "runs": len(rows),
        "planned": len(sweep.cells),
        "resamples": resamples,
        "comparison": comparison.to_dict(),
        "provenance": provenance(),
    }
    with replaced_folder(sweep.out / "fit") as folder:
        write_csv(folder / "points.csv", rows)
        (folder / "fit.json").write_text(to_json(record) + "\n")
        write_curves(folder, comparison)
        figures = {
            name: getattr(plots, name)(comparison)
            for name in ("frontier", "isoflop", "multiplier", "residuals")
        }
        for name, figure in figures.items():
            figure.savefig(folder / f"{name}.png")
        _draw_points(folder, points)
        _draw_fit(folder, comparison, figures, summary)
    return Report(sweep.out, summary, record)


def draw_points(sweep: Sweep) -> None:
    """The same while a sweep runs: fitted roughly where the points allow it, else points alone."""
    try:
        fit_sweep(sweep, _LIVE_RESAMPLES)
    except ScalingError:
        rows = point_rows(sweep)
        if not rows:
            return
        points = _points(rows)
        with replaced_folder(sweep.out / "fit") as folder:
            write_csv(folder / "points.csv", rows)
            plots.points_alone(points).savefig(folder / "frontier.png")
            _draw_points(folder, points)


def _points(rows: list[dict[str, Any]]) -> Points:
    if not rows:
        raise ScalingError("no run is finished yet; sparse-gpt sweep run trains them")
    return Points.from_rows(rows)


def _draw_points(folder: Path, points: Points) -> None:
    """A TensorBoard run a family and size: the mean loss over seeds at each budget."""
    for family in points.families:
        for size in dict.fromkeys(points.size[points.family == family].tolist()):
            mine = points[(points.family == family) & (points.size == size)]
            with SummaryWriter(str(folder / family / f"points-{size}")) as writer:
                for budget in np.unique(mine.budget):
                    loss = float(mine.loss[mine.budget == budget].mean())
                    writer.add_scalar(_LOSS, loss, round(budget / 1e9))


def _draw_fit(
    folder: Path, comparison: Comparison, figures: Mapping[str, Any], summary: list[str]
) -> None:
    for family in comparison.law.families:
        flops, beyond = frontier_flops(comparison, family)
        for name, chosen in (("frontier", ~beyond), ("frontier-extrapolated", beyond)):
            with SummaryWriter(str(folder / family / name)) as writer:
                losses = comparison.law.frontier(family, flops[chosen]).loss
                for c, loss in zip(flops[chosen], losses, strict=True):
                    writer.add_scalar(_LOSS, loss, round(c / 1e9))
        with SummaryWriter(str(folder / family)) as writer:
            _draw_results(writer, comparison, family)
            if family in comparison.multipliers:
                steps = comparison.law.compute_for(
                    comparison.baseline, comparison.multipliers[family].losses
                )
                _draw_estimate(writer, _MULTIPLIER, comparison.multipliers[family].compute, steps)
            if family in comparison.measured:
                found = comparison.measured[family]
                _draw_estimate(writer, _MEASURED, found.compute, found.budgets)
    with SummaryWriter(str(folder)) as writer:
        writer.add_custom_scalars(_LAYOUT)
        writer.add_text("scaling/result", "\n".join(f"- {line}" for line in summary))
        writer.add_text("scaling/coefficients", coefficients(comparison))
        for name, figure in figures.items():
            pixels = np.asarray(figure.canvas.buffer_rgba())[..., :3]
            writer.add_image(f"scaling/{name}", pixels, dataformats="HWC")


def _draw_results(writer: SummaryWriter, comparison: Comparison, family: str) -> None:
    """The family's coefficients for the HParams tab."""
    results = {
        f"scaling/{name}": value for name, value in _coefficients(comparison, family).items()
    }
    for summary in hparams({"family": family, "exponents": comparison.chosen}, results)[:2]:
        writer._get_file_writer().add_summary(summary)  # add_hparams would make a run of its own
    for name, value in results.items():
        writer.add_scalar(name, value, 0)


def _draw_estimate(writer: SummaryWriter, tag: str, estimate: Estimate, flops: Array) -> None:
    """A value and its 80% interval at each FLOPs."""
    for i, c in enumerate(flops):
        step = round(c / 1e9)
        writer.add_scalar(tag, estimate.value[i], step)
        writer.add_scalar(f"{tag}/low_80", estimate.interval_80[0, i], step)
        writer.add_scalar(f"{tag}/high_80", estimate.interval_80[1, i], step)


def _coefficients(comparison: Comparison, family: str) -> dict[str, float]:
    law = comparison.law
    at = law.families.index(family)
    found = {name: float(getattr(law, name)[at]) for name in ("E", "A", "B", "alpha", "beta")}
    if family in comparison.multipliers:
        found["multiplier_at_reference"] = float(
            comparison.multipliers[family].reference_compute.value
        )
    return found


def coefficients(comparison: Comparison) -> str:
    """The fitted law of each family as a Markdown table, with 80% intervals."""
    drawn = comparison.draws.law
    lines = ["| family | E | A | B | α | β |", "|---|---|---|---|---|---|"]
    for at, family in enumerate(comparison.law.families):
        cells = []
        for name in ("E", "A", "B", "alpha", "beta"):
            value, draws = getattr(comparison.law, name)[at], getattr(drawn, name)[:, at]
            low, high = np.percentile(draws, [10, 90])
            cells.append(f"{float(value):.4g} ({low:.3g} to {high:.3g})")
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return "\n".join(lines)
