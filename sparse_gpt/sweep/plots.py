"""The figures of a fitted sweep; families differ in marker and line too, to be told in grey."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

from sparse_gpt.errors import ConfigError
from sparse_gpt.scaling import Comparison, MeasuredMultiplier, Points, predict_points
from sparse_gpt.sweep.grid import short
from sparse_gpt.sweep.summary import BOUND

_STYLES = (
    {"color": "#1a1a1a", "marker": "o", "linestyle": "-"},
    {"color": "#e07b00", "marker": "s", "linestyle": "--"},
    {"color": "#3b7dd8", "marker": "^", "linestyle": "-."},
    {"color": "#7a9a01", "marker": "D", "linestyle": ":"},
)
_SIZE = (6.4, 4.4)


def check_plots() -> None:
    """Raises ConfigError where nothing can be drawn."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("plots need matplotlib; pip install 'sparse-gpt[plots]'")


@contextmanager
def _axes(x: str, y: str, columns: int = 1) -> Iterator[tuple[Any, Any]]:
    """A figure that needs no display, with one axes or a row of them sharing y."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(_SIZE[0] + 3.2 * (columns - 1), _SIZE[1]), dpi=130)
    figure.set_layout_engine("constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, columns, sharey=True, squeeze=False)[0]
    for each in axes:
        each.set_xscale("log")
        each.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        each.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        each.xaxis.set_minor_formatter(NullFormatter())
        each.set_xlabel(x)
        each.grid(which="both", alpha=0.2)
    axes[0].set_ylabel(y)
    yield figure, (axes[0] if columns == 1 else axes)
    for each in axes:
        each.legend(fontsize=8, frameon=False)


def style(families: tuple[str, ...], family: str) -> dict[str, str]:
    """Colour, marker and line of a family, by its place."""
    return dict(_STYLES[families.index(family) % len(_STYLES)])


def _scatter(axes: Any, points: Points, loss: Any, label: str) -> None:
    """Every run by its training FLOPs, a colour and marker a family."""
    for family in points.families:
        look, mine = style(points.families, family), points.family == family
        axes.scatter(
            points.training_flops[mine], loss[mine], s=18, alpha=0.75, label=label.format(family),
            color=look["color"], marker=look["marker"], linewidths=0,
        )  # fmt: skip


def frontier(comparison: Comparison) -> Any:
    """Every run's loss against its training FLOPs, with each family's fitted frontier and band."""
    points, law = comparison.points, comparison.law
    with _axes("training FLOPs (logits counted)", "validation loss, nats a token") as (
        figure,
        axes,
    ):
        _scatter(axes, points, points.loss, "{}, runs")
        for family in law.families:
            look = style(law.families, family)
            mine = points[points.family == family]
            low, high = mine.budget.min(), mine.budget.max()
            inside, beyond = np.geomspace(low, high, 60), np.geomspace(high, 10 * high, 30)
            line = {"color": look["color"], "linewidth": 1.6}
            axes.plot(
                inside, law.frontier(family, inside).loss, look["linestyle"],
                label=f"{family}, best size (80% band)", **line,
            )  # fmt: skip
            axes.plot(beyond, law.frontier(family, beyond).loss, linestyle=(0, (1, 3)), **line)
            both = np.concatenate((inside, beyond))
            axes.fill_between(
                both, *comparison.frontier_band(family, both), color=look["color"], alpha=0.15, lw=0
            )
        axes.plot([], [], color="0.3", linestyle=(0, (1, 3)), label="extrapolation")
    return figure


def isoflop(comparison: Comparison) -> Any:
    """Loss against size at each budget: a panel a family, mean and range over seeds."""
    points = comparison.points
    families = points.families
    with _axes("parameters", "validation loss, nats a token", len(families)) as (figure, panels):
        budgets = np.unique(points.budget)
        for axes, family in zip(np.atleast_1d(panels), families, strict=True):
            look = style(families, family)
            axes.set_title(family, fontsize=10)
            for place, budget in enumerate(budgets):
                mine = points[(points.family == family) & (points.budget == budget)]
                if not len(mine):
                    continue
                sizes = np.unique(mine.params)
                losses = [mine.loss[mine.params == size] for size in sizes]
                means = np.array([group.mean() for group in losses])
                spread = [
                    means - [group.min() for group in losses],
                    [group.max() for group in losses] - means,
                ]
                axes.errorbar(
                    sizes, means, spread, color=look["color"], marker=look["marker"], markersize=4,
                    linewidth=1, capsize=2, alpha=0.35 + 0.65 * (place + 1) / len(budgets),
                    label=f"{budget:.3g} FLOPs",
                )  # fmt: skip
            minima = comparison.minima[family]
            if len(minima.flops):
                axes.plot(minima.params, minima.loss, "*", color="#c0004e", ms=11, label="minimum")
    return figure


def multiplier(comparison: Comparison) -> Any:
    """C_baseline(L) / C_family(L) with its 80% and 95% bands, in FLOPs and in device-seconds."""
    label = f"FLOPs that {comparison.baseline} needs for the same loss"
    with _axes(label, "times less than the baseline") as (figure, axes):
        for family, found in comparison.multipliers.items():
            compute = comparison.law.compute_for(comparison.baseline, found.losses)
            inside = ~found.extrapolated
            for estimate, unit, line in (
                (found.compute, "training FLOPs", "-"),
                (found.seconds, "device-seconds", "--"),
            ):
                if estimate is None:
                    continue
                color = "#1a1a1a" if unit == "training FLOPs" else "#e07b00"
                axes.plot(
                    compute[inside], estimate.value[inside], line, color=color, lw=1.8,
                    label=f"{family}, {unit}",
                )  # fmt: skip
                beyond = found.extrapolated
                axes.plot(compute[beyond], estimate.value[beyond], ":", color=color, lw=1.2)
                axes.fill_between(compute, *estimate.interval_80, color=color, alpha=0.2, lw=0)
                axes.fill_between(compute, *estimate.interval_95, color=color, alpha=0.08, lw=0)
            if family in comparison.measured:
                _measured(axes, comparison, comparison.measured[family])
        # An interval that is unbounded leaves the picture.
        values = [found.compute.value for found in comparison.multipliers.values()]
        most = max((row[row < BOUND].max(initial=1) for row in values), default=1)
        axes.set_ylim(top=min(axes.get_ylim()[1], 4 * most))
        axes.axhline(1, color="0.5", linewidth=0.8)
        axes.plot([], [], ":", color="0.3", label="extrapolation")
        axes.fill_between([], [], [], color="0.4", alpha=0.3, label="80% and 95% intervals")
    return figure


def _measured(axes: Any, comparison: Comparison, found: MeasuredMultiplier) -> None:
    """Points with 80% bars; hollow where a best size or a loss is outside what was run."""
    marker = style(comparison.law.families, found.family)["marker"]
    doubtful = found.edge | found.baseline_edge | found.extrapolated
    for estimate, color in ((found.compute, "#1a1a1a"), (found.seconds, "#e07b00")):
        if estimate is None:
            continue
        for chosen, face in ((~doubtful, color), (doubtful, "white")):
            chosen = chosen & np.isfinite(estimate.value) & np.isfinite(found.baseline_compute)
            value, bounds = estimate.value[chosen], estimate.interval_80[:, chosen]
            low, high = np.where(np.isfinite(bounds), bounds, np.nan)
            bars = np.maximum([value - low, high - value], 0)  # a value may lie outside its bar
            axes.errorbar(
                found.baseline_compute[chosen], value, bars, fmt=marker, markersize=5,
                color=color, markerfacecolor=face, capsize=2, elinewidth=1,
            )  # fmt: skip
    axes.plot([], [], marker, color="0.3", label=f"{found.family}, isoFLOP minima (80% bars)")
    if doubtful.any():
        label = f"{found.family}, extrapolated or at an edge of the sizes"
        axes.plot([], [], marker, color="0.3", markerfacecolor="white", label=label)


def residuals(comparison: Comparison) -> Any:
    """Measured less fitted loss of every run."""
    points, law = comparison.points, comparison.law
    with _axes("training FLOPs (logits counted)", "measured − fitted, nats") as (figure, axes):
        axes.axhline(0, color="0.5", linewidth=0.8)
        _scatter(axes, points, points.loss - predict_points(law, points), "{}")
    return figure


def points_alone(points: Points) -> Any:
    """Loss against compute before anything can be fitted."""
    with _axes("training FLOPs (logits counted)", "validation loss, nats a token") as (
        figure,
        axes,
    ):
        _scatter(axes, points, points.loss, "{}, runs")
    return figure
