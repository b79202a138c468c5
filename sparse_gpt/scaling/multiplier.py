"""How much compute one family saves against another, with bootstrap intervals.

The compute multiplier CM(L) = C_baseline(L) / C_family(L) is the ratio of the training FLOPs that
the two frontiers need for a loss L: 2 means that the family needs half. With shared exponents it
is the same at every loss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .families import FamilyFit, FamilyLaw, LawKind, by_family, fit_families, index_of
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
        with np.errstate(over="ignore", invalid="ignore"):  # of a loss that nothing reaches
            rate = np.exp(intercept + slope * np.log(law.size_for(family, loss)))
            return rate * law.compute_for(family, loss)

    def predict(self, points: Points) -> Array:
        """Device-seconds of each point, (points,), by one regression (not draws of it)."""
        at = [index_of(self.families, family) for family in points.family.tolist()]
        slope, intercept = self.slope[at], self.intercept[at]
        return np.exp(intercept + slope * np.log(points.forward_flops)) * points.training_flops


@dataclass(frozen=True, eq=False)
class Draws:
    """Bootstrap draws of all coefficients.

    law: with a leading axis of draws. seconds: likewise; None where times are not measured.
    clusters: by family, the number of trunks whose errors were drawn.
    """

    law: FamilyLaw
    seconds: Seconds | None
    clusters: dict[str, int]


@dataclass(frozen=True, eq=False)
class Estimate:
    """A point estimate with percentile intervals.

    value: scalar or (losses,). interval_80, interval_95: (2,) or (2, losses), low and high;
    infinite where draws are, NaN where none is defined.
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
    extrapolated: NDArray[np.bool_]
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
    kind: LawKind = "shared",
) -> Multiplier:
    """Fit all families of the points and compare two of them.

    points: finite losses at the best learning rates (`usable`, `best_learning_rates`).
    Raises ScalingError as `fit_families` and `bootstrap` do, and where either family is missing.
    """
    for name in (baseline, family):
        index_of(points.families, name)
    law = fit_families(points, kind)
    draws = bootstrap(points, law, n_bootstrap, seed)
    return multiplier_of(points, law, draws, baseline, family)


def bootstrap(
    points: Points,
    law: FamilyLaw,
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Draws:
    """Refit the families' law to losses that it could as well have met: a wild cluster bootstrap.

    points: those that `law` was fitted to. A draw's losses are the fitted ones, plus or minus the
    errors of each trunk: one sign by chance for all its points, since points that were cooled down
    from one trunk share its noise. Each refit starts at the full fit and at two others.
    Of a separate law each family is drawn by itself. `progress` is told the share that is done.
    Raises ScalingError for a family with fewer than 3 trunks.
    """
    if law.kind == "separate":
        families, drawn = by_family(points), []
        for number, mine in enumerate(families):

            def part(share: float, before: int = number) -> None:
                progress((before + share) / len(families))

            alone = law.alone(mine.families[0])
            drawn.append(bootstrap(mine, alone, n_bootstrap, seed + number, part))
        return _side_by_side(drawn)
    trunks, shrink = _trunks(points)
    fit = FamilyFit(points, law.kind == "own")
    best = fit.theta(law)
    starts = [best, best + _shift(best, -0.3, -0.3), best + _shift(best, 0.1, 0.3)]

    # Residuals are smaller than errors, as the fit has bent to them; a trunk's errors are taken
    # from a fit without it. Only signs are drawn, for the scatter of a fit that is nearly one of
    # least absolute errors depends on how many are small (Feng, He & Hu 2011).
    error = np.empty(len(points))
    solutions = len(trunks) + n_bootstrap
    for done, trunk in enumerate(trunks):
        progress(done / solutions)
        without, _, _ = replace(fit.problem, weight=1.0 - trunk).solve(starts)
        error[trunk] = fit.problem.residuals(without)[0][trunk]
    rng = np.random.default_rng(seed)
    sign = rng.choice([-1.0, 1.0], (n_bootstrap, len(trunks))) @ trunks
    fitted = fit.problem.log_loss + fit.problem.residuals(best)[0]
    laws = []
    for done, log_loss in enumerate(fitted + sign * shrink * error, len(trunks)):
        progress(done / solutions)
        laws.append(fit.law(*replace(fit.problem, log_loss=log_loss).solve(starts)))
    stacked: dict[str, Any] = {
        name: np.array([getattr(each, name) for each in laws])
        for name in ("E", "A", "B", "alpha", "beta", "flops_ratio", "objective")
    }
    agreement = float(np.mean([each.agreement for each in laws]))
    clusters = {f: len(set(points.trunk[points.family == f].tolist())) for f in points.families}
    seconds = _draw_seconds(points, trunks, sign * shrink)
    return Draws(replace(law, **stacked, agreement=agreement), seconds, clusters)


def _side_by_side(drawn: list[Draws]) -> Draws:
    """Draws of a family each, as draws of all."""
    law = FamilyLaw.side_by_side([one.law for one in drawn])
    clusters = {family: number for one in drawn for family, number in one.clusters.items()}
    known = [one.seconds for one in drawn if one.seconds is not None]
    if len(known) < len(drawn):
        return Draws(law, None, clusters)
    columns = ([getattr(one, name) for one in known] for name in ("slope", "intercept"))
    seconds = Seconds(law.families, *(np.concatenate(column, axis=1) for column in columns))
    return Draws(law, seconds, clusters)


def _draw_seconds(points: Points, trunks: NDArray[np.bool_], factor: Array) -> Seconds | None:
    """The regression of seconds in each draw; factor: (draws, points), of each trunk's errors."""
    full = fit_seconds(points)
    if full is None:
        return None
    measured = np.where(points.device_seconds > 0, points.device_seconds, np.nan)
    error = np.empty(len(points))
    for trunk in trunks:
        # Without a family's only trunk of a second size there is no slope: its residuals then.
        without = fit_seconds(points[~trunk]) or full
        error[trunk] = np.log(measured / without.predict(points))[trunk]
    drawn = [
        fit_seconds(replace(points, device_seconds=seconds))
        for seconds in full.predict(points) * np.exp(factor * error)
    ]
    slope, intercept = (np.array([getattr(r, n) for r in drawn]) for n in ("slope", "intercept"))
    return Seconds(points.families, slope, intercept)


def _shift(theta: Array, floor: float, exponents: float) -> Array:
    """A step in ln E and in the logarithms of the exponents, the last entries of θ."""
    step = np.zeros(len(theta))
    step[0] = floor
    step[-2:] = exponents
    return step


def _trunks(points: Points) -> tuple[NDArray[np.bool_], Array]:
    """Which points are of which trunk, (trunks, points), and what scales errors, (points,).

    What a mean of n trunks without one of them is off by is √(n/(n−1)) times the errors' size.
    """
    shrink = np.empty(len(points))
    trunks = []
    for family in points.families:
        mine = points.family == family
        names = dict.fromkeys(points.trunk[mine].tolist())
        if len(names) < 3:
            raise ScalingError(
                f"family {family!r} has {len(names)} trunks, intervals need 3 or more"
            )
        trunks += [mine & (points.trunk == name) for name in names]
        shrink[mine] = np.sqrt(1 - 1 / len(names))
    return np.array(trunks), shrink


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

    # inf/inf where a draw's E is above the loss, and what comes near it.
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
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
    # Between a number and infinity nothing lies.
    method: Literal["linear", "nearest"] = "linear" if np.isfinite(drawn).all() else "nearest"
    defined = ~np.isnan(drawn).all(axis=0)
    there = np.where(defined, drawn, 0.0)
    tails = (
        np.nanpercentile(there, [50 - w / 2, 50 + w / 2], axis=0, method=method) for w in (80, 95)
    )
    return Estimate(np.asarray(value), *(np.where(defined, tail, np.nan) for tail in tails))


def fit_seconds(points: Points) -> Seconds | None:
    """Regress ln(device-seconds a training FLOP) on ln M in each family; None where not measured.

    Points without a time are left out. A family needs times at 2 sizes.
    """
    slopes, intercepts = [], []
    for family in points.families:
        timed = (points.family == family) & np.isfinite(points.device_seconds)
        timed &= points.device_seconds > 0
        x = np.log(points.forward_flops[timed])
        if len(np.unique(x)) < 2:
            return None
        y = np.log(points.device_seconds[timed] / points.training_flops[timed])
        slope, intercept = np.polyfit(x, y, 1)
        slopes.append(slope)
        intercepts.append(intercept)
    return Seconds(points.families, np.array(slopes), np.array(intercepts))
