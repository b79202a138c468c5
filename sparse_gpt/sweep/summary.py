"""What a fit says, a line a fact; an interval that the runs do not bound is said to be so."""

import math
from typing import Any

import numpy as np

from sparse_gpt.scaling import Comparison, MeasuredMultiplier

BOUND = 100.0
"""A multiplier beyond this, or under its inverse, is what a fit comes to where runs do not say."""
_UNBOUNDED = "unbounded"
_ADVICE = (
    f"{_UNBOUNDED}: these runs leave that end of an interval open; more seeds close it, or more "
    "budgets with sizes on both sides of the best"
)


def summarize(comparison: Comparison) -> list[str]:
    """The result, a line a fact."""
    lines = []
    for family, found in comparison.multipliers.items():
        for estimate, unit in (
            (found.reference_compute, "training FLOPs"),
            (found.reference_seconds, "device-seconds"),
        ):
            if estimate is None:
                continue
            loss, value = f"a loss of {found.reference_loss:.3f}", float(estimate.value)
            if math.isnan(value):
                says = f"{family} against {comparison.baseline}, {unit} for {loss}: {_UNBOUNDED}"
            elif value == 0:  # the family's own E is above it
                says = f"{family}, as fitted, does not reach {loss} with any {unit}: multiplier 0"
            else:
                says = (
                    f"{family} reaches {loss} with {_times(value)} {unit} than "
                    f"{comparison.baseline}: multiplier {_number(value)}"
                )
            lines.append(says + _intervals(estimate.interval_80, estimate.interval_95))
        where = (
            "beyond the runs of one family: an extrapolation"
            if found.reference_extrapolated
            else "inside the range of both families' runs"
        )
        lines.append(
            f"that loss is where {comparison.baseline}'s frontier is at its largest budget, "
            f"{found.reference_budget:.3g} FLOPs, {where}"
        )
    for measured in comparison.measured.values():
        lines += _summarize_measured(measured)
    lines.append(comparison.reason)
    if held := comparison.held_out.get(comparison.chosen):
        lines.append(
            f"held-out budget: fitted without {held.budget:.3g} FLOPs, its {held.points} runs are "
            f"predicted {held.rms_nats:.4f} nats off (rms; mean {held.mean_nats:+.4f})"
        )
    spreads = {f: s for f, s in comparison.seed_spread.items() if math.isfinite(s)}
    if spreads:
        each = ", ".join(f"{family} {spread:.4f}" for family, spread in spreads.items())
        lines.append(f"standard deviation over seeds, nats: {each}")
    for family, minima in comparison.minima.items():
        if math.isfinite(minima.exponent):
            lines.append(f"{family}: best size grows as FLOPs^{minima.exponent:.2f} (isoFLOP)")
    lines += [f"left out: {line}" for line in comparison.left_out]
    return [*lines, _ADVICE] if any(_UNBOUNDED in line for line in lines) else lines


def _summarize_measured(measured: MeasuredMultiplier) -> list[str]:
    """A line a budget."""
    lines = []
    for i, budget in enumerate(measured.budgets):
        parts = []
        for estimate, unit in ((measured.compute, ""), (measured.seconds, " in device-seconds")):
            if estimate is not None and not np.isnan(estimate.value[i]):
                part = f"{_number(estimate.value[i])}{unit}"
                if not np.isnan(estimate.interval_80[0, i]):
                    part += _intervals(estimate.interval_80[:, i], estimate.interval_95[:, i])
                parts.append(part)
        for flag, note in (
            (measured.extrapolated, f"outside {measured.baseline}'s budgets: an extrapolation"),
            (measured.edge, "its best size is an outermost one"),
            (measured.baseline_edge, f"{measured.baseline}'s best size is an outermost one"),
        ):
            if flag[i]:
                parts.append(note)
        lines.append(
            f"{measured.family} at {budget:.3g} FLOPs, from isoFLOP minima alone: best loss "
            f"{measured.losses[i]:.3f}, multiplier {'; '.join(parts)}"
        )
    return lines


def _bounded(value: float) -> bool:
    return 1 / BOUND < value < BOUND


def _number(value: float) -> str:
    if _bounded(value):
        return f"{value:.2f}"
    return f"under {1 / BOUND:g}" if value < 1 else f"above {BOUND:g}"


def _times(value: float) -> str:
    times = max(value, 1 / value)
    much = f"{times:.2f}" if _bounded(value) else f"more than {BOUND:g}"
    return f"{much} times {'fewer' if value >= 1 else 'more'}"


def _intervals(of_80: Any, of_95: Any) -> str:
    return f" (80% interval {_range(of_80)}, 95% {_range(of_95)})"


def _range(interval: Any) -> str:
    """Of a low and a high end; NaN where no draw is defined."""
    ends = [f"{end:.2f}" if _bounded(end) else _UNBOUNDED for end in interval]
    return _UNBOUNDED if ends == [_UNBOUNDED] * 2 else " to ".join(ends)
