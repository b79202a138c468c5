"""Everything that a sweep over several architectures says, at once."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from .families import FamilyLaw, LawKind, by_family, fit_families, index_of
from .law import Minima, isoflop_minima
from .measured import MeasuredMultiplier, measured_multiplier
from .multiplier import Draws, Multiplier, bootstrap, multiplier_of
from .points import Array, Points, ScalingError, best_learning_rates, cells, seed_spread, usable


@dataclass(frozen=True)
class HeldOut:
    """How well a fit without the largest budget predicts it.

    budget: the budget that was left out, training FLOPs. points: how many points it has.
    rms_log, mean_log: root mean square and mean of ln(predicted/measured); a positive mean is
        pessimism. rms_nats, mean_nats: the same of predicted − measured, nats a token.
    """

    budget: float
    points: int
    rms_log: float
    mean_log: float
    rms_nats: float
    mean_nats: float


def held_out_error(points: Points, kind: LawKind = "shared") -> HeldOut:
    """Fit the families' law without the largest budget, and predict that budget's losses.

    Raises ScalingError where what is left cannot be fitted, or misses a family.
    """
    largest = points.budget == points.budget.max() if len(points) else np.zeros(0, bool)
    rest, held = points[~largest], points[largest]
    if not len(rest):
        raise ScalingError("without the largest budget no points are left")
    law = fit_families(rest, kind)
    predicted = predict_points(law, held)
    log, nats = np.log(predicted / held.loss), predicted - held.loss
    return HeldOut(
        budget=float(held.budget[0]),
        points=len(held),
        rms_log=float(np.sqrt(np.mean(log**2))),
        mean_log=float(log.mean()),
        rms_nats=float(np.sqrt(np.mean(nats**2))),
        mean_nats=float(nats.mean()),
    )


def predict_points(law: FamilyLaw, points: Points) -> Array:
    """The law's loss for each point, (points,), nats a token."""
    predicted = np.empty(len(points))
    for family in points.families:
        mine = points.family == family
        predicted[mine] = law.predict(family, points.forward_flops[mine], points.tokens[mine])
    return predicted


@dataclass(frozen=True, eq=False)
class Comparison:
    """The fits of a sweep, and what they say of each family against the baseline.

    points: the results that were fitted: finite losses at the best learning rates.
    left_out: one line for each result, budget or question that could not be used.
    shared, own, separate: the law with one α, with an α a family, and of each family by itself
        (own E, α and β too); the last two None where the points cannot determine them.
    chosen: the name of one of these. reason: why, a sentence.
    held_out: by law, the prediction of the largest budget, where it can be made.
    minima: by family, its isoFLOP minima, sizes in parameters; mean loss over seeds.
    multipliers: by family other than the baseline, from the chosen law.
    measured: the same at each budget, from the isoFLOP minima alone.
    seed_spread: by family, the pooled standard deviation of loss over seeds, nats; NaN with one.
    draws: bootstrap draws of the chosen law's coefficients.
    """

    baseline: str
    points: Points
    left_out: tuple[str, ...]
    shared: FamilyLaw
    own: FamilyLaw | None
    separate: FamilyLaw | None
    chosen: LawKind
    reason: str
    held_out: dict[LawKind, HeldOut]
    minima: dict[str, Minima]
    multipliers: dict[str, Multiplier]
    measured: dict[str, MeasuredMultiplier]
    seed_spread: dict[str, float]
    draws: Draws

    @property
    def law(self) -> FamilyLaw:
        """The chosen law."""
        law = {"shared": self.shared, "own": self.own, "separate": self.separate}[self.chosen]
        assert law is not None
        return law

    def frontier_band(self, family: str, flops: ArrayLike, level: float = 80.0) -> Array:
        """The interval of L*(C), nats: shape (2, flops), low and high, at a level in percent."""
        drawn = self.draws.law.frontier(family, flops).loss
        return np.asarray(np.percentile(drawn, [50 - level / 2, 50 + level / 2], axis=0))

    def to_dict(self) -> dict[str, Any]:
        """All but points and draws as plain JSON values; what is not finite becomes None."""
        plain: dict[str, Any] = _plain(self)
        return plain


def compare(
    points: Points,
    baseline: str = "dense",
    n_bootstrap: int = 1000,
    seed: int = 0,
    progress: Callable[[float], None] = lambda share: None,
) -> Comparison:
    """Fit and compare all families of a sweep.

    points: any results; those without a finite loss and those at other than the best learning
        rate of their (family, size, budget) are left out here.
    Exponents of its own are kept for a family only where both AICc and the prediction of the
    largest budget prefer them: AICc alone counts points of one trunk as independent. Families are
    fitted by themselves only where that predicts the largest budget at least 5% better than both
    other laws do, and where each has two (size, budget) or more a coefficient.
    `progress` is told the share of the bootstrap that is done.
    Raises ScalingError as `fit_families` and `bootstrap` do, and for a missing baseline.
    """
    finite, left_out = usable(points)
    best = best_learning_rates(finite)
    index_of(best.families, baseline)
    shared = fit_families(best)
    laws: dict[LawKind, FamilyLaw] = {"shared": shared}
    others: tuple[LawKind, ...] = ("own", "separate") if len(best.families) > 1 else ()
    for kind in others:
        try:
            if kind == "separate":
                _check_alone(best)
            laws[kind] = fit_families(best, kind)
        except ScalingError as error:
            left_out.append(f"{_NAMES[kind]}: {error}")
    held_out: dict[LawKind, HeldOut] = {}
    for kind in laws:
        try:
            held_out[kind] = held_out_error(best, kind)
        except ScalingError as error:
            left_out.append(f"prediction of the largest budget, {_NAMES[kind]}: {error}")
    chosen, reason = _choose(laws, held_out)
    minima = {}
    for family in best.families:
        minima[family] = _family_minima(best[best.family == family])
        left_out += [f"{family}, isoFLOP minimum: {line}" for line in minima[family].left_out]
    measured = {}
    for family in best.families:
        try:
            if family != baseline:
                measured[family] = measured_multiplier(best, baseline, family, seed=seed)
        except ScalingError as error:
            left_out.append(f"{family}, multiplier from the isoFLOP minima: {error}")
    law = laws[chosen]
    draws = bootstrap(best, law, n_bootstrap, seed, progress)
    return Comparison(
        baseline=baseline,
        points=best,
        left_out=tuple(left_out),
        shared=shared,
        own=laws.get("own"),
        separate=laws.get("separate"),
        chosen=chosen,
        reason=reason,
        held_out=held_out,
        minima=minima,
        multipliers={
            family: multiplier_of(best, law, draws, baseline, family)
            for family in best.families
            if family != baseline
        },
        measured=measured,
        seed_spread={f: seed_spread(best[best.family == f]) for f in best.families},
        draws=draws,
    )


_NAMES: dict[LawKind, str] = {
    "shared": "shared exponents",
    "own": "an α a family",
    "separate": "each family by itself",
}
# E, A, B, α and β, of one family.
_COEFFICIENTS = 5
# Of 14 made-up sweeps whose families do share E and β (5 sizes, 4 budgets, 2 seeds), a fit of each
# by itself predicts the largest budget better by chance in 4 to 6, but in 0 or 1 by this factor.
_MARGIN = 0.95


def _check_alone(points: Points) -> None:
    """ScalingError where a family has too few results for coefficients that nothing else shares."""
    for mine in by_family(points):
        number = len(set(cells(mine)))
        if number < 2 * _COEFFICIENTS:
            raise ScalingError(
                f"family {mine.families[0]!r} has {number} sizes and budgets, "
                f"{_COEFFICIENTS} coefficients need {2 * _COEFFICIENTS}"
            )


def _choose(
    laws: dict[LawKind, FamilyLaw], held_out: dict[LawKind, HeldOut]
) -> tuple[LawKind, str]:
    """Which law, and why."""
    if len(laws["shared"].families) == 1:
        return "shared", "There is one family, so nothing to share."
    if len(laws) == 1:
        return "shared", "Shared exponents: the points cannot determine more."
    facts = "AICc " + ", ".join(f"{law.aicc:.1f} with {_NAMES[k]}" for k, law in laws.items())
    if "shared" not in held_out or len(held_out) == 1:
        return "shared", f"Shared exponents: the largest budget cannot be predicted ({facts})."
    facts += "; largest budget predicted within " + ", ".join(
        f"{held.rms_nats:.4f} nats rms with {_NAMES[kind]}" for kind, held in held_out.items()
    )
    errors = {kind: held.rms_log for kind, held in held_out.items()}
    alone = errors.pop("separate", math.inf)
    if alone < _MARGIN * min(errors.values()):
        margin = f"at least {1 - _MARGIN:.0%} better than the others do"
        return (
            "separate",
            f"Each family by itself: this predicts the largest budget {margin} ({facts}).",
        )
    if "own" not in errors:
        return "shared", f"Shared exponents: nothing else predicts clearly better ({facts})."
    better = (
        laws["own"].aicc < laws["shared"].aicc,
        errors["own"] < errors["shared"],
    )
    if all(better):
        return "own", f"An α a family: both tests prefer it to shared exponents ({facts})."
    verdict = "one test of two prefers" if any(better) else "neither test prefers"
    return "shared", f"Shared exponents: {verdict} an α a family ({facts})."


def _family_minima(mine: Points) -> Minima:
    return isoflop_minima(mine.budget, mine.params, mine.loss)


def _plain(value: Any) -> Any:
    """Dataclasses, arrays and numpy scalars as dicts, lists and numbers, recursively."""
    if is_dataclass(value) and not isinstance(value, type):
        items = {f.name: getattr(value, f.name) for f in fields(value)}
        return {k: _plain(v) for k, v in items.items() if not isinstance(v, (Points, Draws))}
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (np.ndarray, np.generic)):
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
