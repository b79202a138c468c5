"""How much compute one family saves against another, with bootstrap intervals.

The compute multiplier CM(L) = C_baseline(L) / C_family(L) is the ratio of the training FLOPs that
the two frontiers need for a loss L: 2 means that the family needs half. With shared exponents it
is the same at every loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from .families import FamilyFit, FamilyLaw, fit_families, index_of
from .law import cluster_resamples
from .points import Array, Points, ScalingError

_GRID = 33
# How far past the largest budget the curve is drawn, as a factor of compute.
_REACH = 10.0


@dataclass(frozen=True, eq=False)
class Seconds:
    """Device-seconds of a training FLOP: exp(intercept)·M^slope.

    slope, intercept: (families,), or (draws, families). Small models use a device worse, so that
    a family whose best models are smaller pays more for a FLOP.
    """

    families: tuple[str, ...]
    slope: Array
    intercept: Array

    def for_loss(self, law: FamilyLaw, family: str, loss: ArrayLike) -> Array:
        """Device-seconds for the family's frontier to reach a loss, draws first."""
        loss = np.asarray(loss, float)
        at = index_of(self.families, family)
        slope, intercept = (
            np.reshape(row[..., at], row.shape[:-1] + (1,) * loss.ndim)
            for row in (self.slope, self.intercept)
        )
        rate = np.exp(intercept + slope * np.log(law.size_for(family, loss)))
        return rate * law.compute_for(family, loss)


@dataclass(frozen=True, eq=False)
class Draws:
    """Bootstrap draws of all coefficients.

    law: with a leading axis of draws. seconds: likewise; None where times are not measured.
    clusters: by family, the number of trunks that were resampled.
    """

    law: FamilyLaw
    seconds: Seconds | None
    clusters: dict[str, int]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A point estimate with percentile intervals.

    value: scalar or (losses,). interval_80, interval_95: (2,) or (2, losses), low and high.
    """

    value: Array
    interval_80: Array
    interval_95: Array


@dataclass(frozen=True, eq=False)
class Multiplier:
    """What `family` saves against `baseline`: C_baseline(L) / C_family(L), above 1 for a saving.

    losses: (losses,), nats a token, descending, evenly spaced.
    extrapolated: (losses,) bool, where a frontier leaves the budgets that its family was run at.
    compute: in training FLOPs. seconds: in device-seconds, None where they are not measured.
    reference_loss: where the baseline's frontier is at its largest budget, `reference_budget`:
        the best loss it reaches within what was run.
    reference_compute, reference_seconds: the headline, at the reference loss.
    reference_extrapolated: whether the family's frontier needs more than its largest budget there.
    """

    family: str
    baseline: str
    losses: Array
    extrapolated: Array
    compute: Estimate
    seconds: Estimate | None
    reference_budget: float
    reference_loss: float
    reference_extrapolated: bool
    reference_compute: Estimate
    reference_seconds: Estimate | None
    draws: Draws


def compute_multiplier(
    points: Points,
    baseline: str = "dense",
    family: str = "sparse",
    n_bootstrap: int = 1000,
    seed: int = 0,
    own_exponents: bool = False,
) -> Multiplier:
    """Fit all families of the points and compare two of them.

    points: finite losses at the best learning rates (`usable`, `best_learning_rates`).
    Raises ScalingError as `fit_families` and `bootstrap` do, and where either family is missing.
    """
    for name in (baseline, family):
        index_of(points.families, name)
    law = fit_families(points, own_exponents)
    draws = bootstrap(points, law, n_bootstrap, seed)
    return multiplier_of(points, law, draws, baseline, family)


def bootstrap(points: Points, law: FamilyLaw, n_bootstrap: int = 1000, seed: int = 0) -> Draws:
    """Refit the families' law to resamples of whole trunks, drawn within each family.

    points: those that `law` was fitted to. Points that were cooled down from one trunk share its
    noise, so a trunk is drawn as a whole. Each refit starts at the full fit and at two others.
    A resample in which a family is left with too few sizes to fit is drawn again.
    Raises ScalingError for a family with fewer than 3 trunks.
    """
    fit = FamilyFit(points, law.own_exponents)
    best = fit.theta(law)
    starts = [best, best + _shift(best, -0.3, -0.3), best + _shift(best, 0.1, 0.3)]
    laws, rates = [], []
    for weight in _resample_weights(points, law.own_exponents, n_bootstrap, seed):
        laws.append(fit.law(*replace(fit.problem, weight=weight).solve(starts)))
        rates.append(fit_seconds(points, weight))
    timed = [rate for rate in rates if rate is not None]
    seconds = None
    if len(timed) == len(rates):
        slope, intercept = (
            np.array([getattr(r, n) for r in timed]) for n in ("slope", "intercept")
        )
        seconds = Seconds(points.families, slope, intercept)
    stacked = {
        name: np.array([getattr(each, name) for each in laws])
        for name in ("E", "A", "B", "alpha", "beta", "flops_ratio", "objective")
    }
    agreement = float(np.mean([each.agreement for each in laws]))
    clusters = {f: len(set(points.trunk[points.family == f].tolist())) for f in points.families}
    return Draws(replace(law, **stacked, agreement=agreement), seconds, clusters)


def _shift(theta: Array, floor: float, exponents: float) -> Array:
    """A step in ln E and in the logarithms of the exponents, the last entries of θ."""
    step = np.zeros(len(theta))
    step[0] = floor
    step[-2:] = exponents
    return step


def _resample_weights(points: Points, own: bool, n: int, seed: int) -> Iterator[Array]:
    """n times how often each point is drawn, (points,)."""
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(points.family == family) for family in points.families]
    for family, member in zip(points.families, members, strict=True):
        if (trunks := len(set(points.trunk[member].tolist()))) < 3:
            raise ScalingError(f"family {family!r} has {trunks} trunks, intervals need 3 or more")
    for _ in range(n):
        weight = np.zeros(len(points))
        for member in members:
            weight[member] = _drawn(points[member], 3 if own else 2, rng)
        yield weight


def _drawn(mine: Points, sizes: int, rng: np.random.Generator) -> Array:
    """How often each point of one family is drawn, in a resample with enough sizes to fit."""
    while True:
        (index,) = cluster_resamples(mine.trunk, 1, int(rng.integers(2**31)))
        if len(np.unique(mine.forward_flops[index])) >= sizes:
            return np.bincount(index, minlength=len(mine)).astype(float)


def multiplier_of(
    points: Points, law: FamilyLaw, draws: Draws, baseline: str, family: str
) -> Multiplier:
    """`compute_multiplier` from a fit and its draws that are there already."""
    pair = (baseline, family)
    budgets = {name: points.budget[points.family == name] for name in pair}
    # A family's frontier is inside its points between the losses at its outermost budgets.
    ceiling = min(float(law.frontier(name, budgets[name].min()).loss) for name in pair)
    floor = max(float(law.frontier(name, budgets[name].max()).loss) for name in pair)
    largest = float(budgets[baseline].max())
    reference = float(law.frontier(baseline, largest).loss)
    end = min(floor, float(law.frontier(baseline, _REACH * largest).loss))
    losses = np.linspace(max(ceiling, floor), end, _GRID)

    def compute(at: ArrayLike) -> Estimate:
        ratio, drawn = (
            some.compute_for(baseline, at) / some.compute_for(family, at)
            for some in (law, draws.law)
        )
        return estimate(ratio, drawn)

    seconds = fit_seconds(points)

    def time(at: ArrayLike) -> Estimate | None:
        if seconds is None or draws.seconds is None:
            return None
        ratio, drawn = (
            rate.for_loss(some, baseline, at) / rate.for_loss(some, family, at)
            for rate, some in ((seconds, law), (draws.seconds, draws.law))
        )
        return estimate(ratio, drawn)

    with np.errstate(invalid="ignore"):  # inf/inf where a draw's E is above the loss
        return Multiplier(
            family=family,
            baseline=baseline,
            losses=losses,
            extrapolated=(losses > ceiling + 1e-12) | (losses < floor - 1e-12),
            compute=compute(losses),
            seconds=time(losses),
            reference_budget=largest,
            reference_loss=reference,
            reference_extrapolated=reference < floor - 1e-12,
            reference_compute=compute(reference),
            reference_seconds=time(reference),
            draws=draws,
        )


def estimate(value: Array, drawn: Array) -> Estimate:
    """A value with the percentiles of its draws (draws, ...); undefined draws are left out."""
    tails = [np.nanpercentile(drawn, [50 - w / 2, 50 + w / 2], axis=0) for w in (80, 95)]
    return Estimate(np.asarray(value), *tails)


def fit_seconds(points: Points, weight: Array | None = None) -> Seconds | None:
    """Regress ln(device-seconds a training FLOP) on ln M in each family; None where not measured.

    Points without a time are left out. A family needs times at 2 sizes.
    """
    weight = np.ones(len(points)) if weight is None else weight
    slopes, intercepts = [], []
    for family in points.families:
        timed = (points.family == family) & np.isfinite(points.device_seconds) & (weight > 0)
        timed &= points.device_seconds > 0
        x = np.log(points.forward_flops[timed])
        if len(np.unique(x)) < 2:
            return None
        y = np.log(points.device_seconds[timed] / points.training_flops[timed])
        # polyfit squares its weights.
        slope, intercept = np.polyfit(x, y, 1, w=np.sqrt(weight[timed]))
        slopes.append(slope)
        intercepts.append(intercept)
    return Seconds(points.families, np.array(slopes), np.array(intercepts))
