"""The compute multiplier at every budget, read from the isoFLOP minima alone: no law is fitted.

A family's best loss at a budget is the minimum of its isoFLOP curve; the baseline's best losses,
joined by straight lines over ln C, say what compute the baseline needs for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .law import akima_minima
from .multiplier import Estimate, estimate
from .points import Array, Points, ScalingError, seed_spread

_DRAWS = 2000
# The slope, nats by ln C, that stands for that of a frontier which does not fall.
_FLAT = -1e-12


@dataclass(frozen=True, eq=False)
class MeasuredMultiplier:
    """C_baseline(L)/C at each budget C of a family, with L the family's best loss there.

    budgets: (budgets,), training FLOPs, ascending; the other columns have an entry for each.
    params, losses: the best size and its loss, nats a token: the minimum of Akima's curve through
        the mean losses over seeds, or the lowest of them where that is at an end of the sizes.
    edge: whether it is at an end, so that a better size may lie beyond: C_baseline is too small.
    baseline_edge: the same of the baseline's budgets that L lies between: C_baseline is too large.
    baseline_compute: training FLOPs that the baseline needs for L.
    extrapolated: whether L is outside the baseline's best losses; its last segment goes on then.
    compute: the multiplier in training FLOPs. seconds: in device-seconds, NaN at budgets where they
        are not measured, None where they are at none. What is undefined is NaN too.
    spread: standard deviation of the noise, nats, that the intervals come from: the family's and
        the baseline's. NaN, and so are the intervals, where nothing has two seeds.
    """

    family: str
    baseline: str
    budgets: Array
    params: Array
    losses: Array
    edge: NDArray[np.bool_]
    baseline_edge: NDArray[np.bool_]
    baseline_compute: Array
    extrapolated: NDArray[np.bool_]
    compute: Estimate
    seconds: Estimate | None
    spread: tuple[float, float]


def measured_multiplier(
    points: Points, baseline: str, family: str, draws: int = _DRAWS, seed: int = 0
) -> MeasuredMultiplier:
    """Compare two families by their isoFLOP minima.

    points: finite losses at the best learning rates (`usable`, `best_learning_rates`).
    The intervals need no more than seeds. Each draw adds noise to the losses, the same to all
    points of a trunk, normal with the family's standard deviation over seeds (the largest of the
    other families' where it has one seed), and takes all minima anew.
    Raises ScalingError where the baseline has one budget.
    """
    rng = np.random.default_rng(seed)
    spreads = {name: seed_spread(points[points.family == name]) for name in points.families}
    known = [spread for spread in spreads.values() if math.isfinite(spread)]
    spread = {name: s if math.isfinite(s) else max(known, default=s) for name, s in spreads.items()}
    ours, theirs = (
        _Frontier.of(points[points.family == name], spread[name] if known else 0.0, draws, rng)
        for name in (family, baseline)
    )
    if len(theirs.budgets) < 2:
        raise ScalingError(f"{baseline!r} has one budget, a frontier needs 2")
    found = [theirs.needed(losses) for losses in ours.losses]
    log_compute, log_rate, between = (np.array(column) for column in zip(*found, strict=True))
    with np.errstate(over="ignore"):
        ratio = np.exp(log_compute - np.log(ours.budgets)[:, None])
        seconds = ratio * np.exp(log_rate - ours.log_rate)
        baseline_compute = np.exp(log_compute[:, 0])
    lowest, highest = theirs.losses[:, 0].min(), theirs.losses[0, 0]
    at = between[:, 0]
    return MeasuredMultiplier(
        family=family,
        baseline=baseline,
        budgets=ours.budgets,
        params=ours.params[:, 0],
        losses=ours.losses[:, 0],
        edge=ours.edge[:, 0],
        baseline_edge=theirs.edge[at, 0] | theirs.edge[at + 1, 0],
        baseline_compute=baseline_compute,
        extrapolated=(ours.losses[:, 0] < lowest) | (ours.losses[:, 0] > highest),
        compute=_estimate(ratio, bool(known)),
        seconds=_estimate(seconds, bool(known)) if np.isfinite(seconds[:, 0]).any() else None,
        spread=(spread[family], spread[baseline]),
    )


def _estimate(drawn: Array, noisy: bool) -> Estimate:
    """Of (budgets, 1 + draws), the value itself first; intervals are NaN where the noise is not
    known."""
    return estimate(drawn[:, 0], drawn[:, 1:].T if noisy else np.full((1, len(drawn)), np.nan))


@dataclass(frozen=True, eq=False)
class _Frontier:
    """A family's best losses, with the measured ones in column 0 and draws of them after it.

    budgets: (budgets,). params, losses, edge: (budgets, 1 + draws). log_rate: the same shape, ln of
    device-seconds a training FLOP at the best size; NaN where not measured.
    """

    budgets: Array
    params: Array
    losses: Array
    edge: NDArray[np.bool_]
    log_rate: Array

    @classmethod
    def of(cls, mine: Points, spread: float, draws: int, rng: np.random.Generator) -> _Frontier:
        """The frontier of one family's points."""
        names, trunk = np.unique(mine.trunk, return_inverse=True)
        noise = spread * rng.standard_normal((len(names), 1 + draws))
        noise[:, 0] = 0
        losses = mine.loss[:, None] + noise[trunk]
        budgets = np.unique(mine.budget)
        best = [_best(mine[chosen], losses[chosen]) for chosen in mine.budget == budgets[:, None]]
        return cls(budgets, *(np.array(column) for column in zip(*best, strict=True)))

    def needed(self, loss: Array) -> tuple[Array, Array, NDArray[np.int64]]:
        """ln of the FLOPs for a loss in each draw, ln of their seconds a FLOP, and from where.

        loss: (1 + draws,), as what is returned. The last is the index of the budget at which the
        segment begins that was read. A larger budget counts as no worse than a smaller one.
        """
        c, reached = np.log(self.budgets), np.minimum.accumulate(self.losses, axis=0)
        hits = reached[1:] <= loss
        at = np.where(hits.any(axis=0), hits.argmax(axis=0), len(c) - 2)
        draw = np.arange(len(loss))
        step = c[at + 1] - c[at]
        slope = np.minimum((reached[at + 1, draw] - reached[at, draw]) / step, _FLAT)
        share = (loss - reached[at, draw]) / slope / step
        start, end = self.log_rate[at, draw], self.log_rate[at + 1, draw]
        return c[at] + share * step, start + np.clip(share, 0, 1) * (end - start), at


def _best(curve: Points, losses: Array) -> tuple[Array, Array, NDArray[np.bool_], Array]:
    """Best size, its loss, whether it is an outermost size, and its ln(seconds a FLOP).

    curve: the points of one budget. losses: (points, 1 + draws). Returned are (1 + draws,).
    """
    sizes, of = np.unique(curve.params, return_inverse=True)
    member = (of == np.arange(len(sizes))[:, None]).astype(float)
    x, y = np.log(sizes), np.log(member @ losses / member.sum(axis=1)[:, None])
    if len(sizes) < 3:
        lowest = y.argmin(axis=0)
        place, height, edge = x[lowest], y.min(axis=0), np.ones(y.shape[1], bool)
    else:
        place, height = akima_minima(x, y)
        edge = (place == x[0]) | (place == x[-1])
    timed = curve.device_seconds > 0
    weight = member[:, timed].sum(axis=1)
    if not timed.any():
        return np.exp(place), np.exp(height), edge, np.full(len(place), np.nan)
    rate = np.log(curve.device_seconds[timed] / curve.training_flops[timed])
    there = weight > 0
    mean = member[there][:, timed] @ rate / weight[there]
    return np.exp(place), np.exp(height), edge, np.interp(place, x[there], mean)
