"""One law for several architectures, with M = forward FLOPs a token in place of parameters.

    L_f(M, D) = E + A_f / M^α + B_f / D^β

E, the entropy of the data, and the exponents are shared; each family f has its own A and B. Where
that does not hold, families have an α of their own, or share nothing (`LawKind`).
Parameters are no common measure of models that use them differently; FLOPs are what is paid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import minimize_scalar
from scipy.special import erf

from .law import check_grid, positive_columns
from .points import Array, Points, ScalingError
from .problem import HUBER_DELTA, LawProblem

LawKind = Literal["shared", "own", "separate"]
"""What families share: E, α and β; E and β, with an α of their own; nothing."""


class Optimum(NamedTuple):
    """The best use of a compute budget: forward FLOPs a token, tokens, and the loss in nats."""

    m: Array
    d: Array
    loss: Array


@dataclass(frozen=True, eq=False)
class FamilyLaw:
    """L_f(M, D) = E + A_f/M^α_f + B_f/D^β_f, nats a token, with one entry a family.

    E, A, B, alpha, beta, flops_ratio: (families,), with equal entries for what is shared. A set of
    bootstrap draws is the same object with a leading axis of draws: (draws, families), and
    objective (draws,). Methods then take scalars or 1-D arrays and put the draws first.

    kind: what is shared.
    flops_ratio: k, training FLOPs of a token over its forward FLOPs, about 3.
    objective: 1e3 × Σ Huber_{1e-3}(log residual).
    aicc: corrected Akaike criterion of the Huber density exp(−Huber(r)/s)/Z(s), the error model
        whose maximum-likelihood fit this is; s is a parameter too. It takes points as independent;
        those that share a trunk are not, so it leans to more parameters than it should.
        Of separate fits it is their sum, with an s for each.
    agreement: the share of starts that ended at this optimum; of separate fits the smallest.
    """

    families: tuple[str, ...]
    E: Array
    A: Array
    B: Array
    alpha: Array
    beta: Array
    flops_ratio: Array
    kind: LawKind
    objective: Array
    aicc: float
    agreement: float

    def predict(self, family: str, m: ArrayLike, d: ArrayLike) -> Array:
        """Loss of models of m forward FLOPs a token, trained on d tokens."""
        m, d = np.broadcast_arrays(np.asarray(m, float), np.asarray(d, float))
        e, a, b, alpha, beta, _ = self._of(family, m.ndim)
        return e + a * m**-alpha + b * d**-beta

    def frontier(self, family: str, flops: ArrayLike) -> Optimum:
        """The M and D with M·D = flops/k that minimise the loss, for training FLOPs `flops`.

        Closed form of Hoffmann et al. 2022, equation 4, with k in place of 6.
        """
        flops = np.asarray(flops, float)
        e, _, _, alpha, beta, k = self._of(family, flops.ndim)
        log_g, log_gain, gamma = self._frontier_terms(family, flops.ndim)
        log_p = np.log(flops / k)
        with np.errstate(over="ignore"):  # of draws that nothing bounds
            m = np.exp(log_g + beta / (alpha + beta) * log_p)
            d = np.exp(alpha / (alpha + beta) * log_p - log_g)
            return Optimum(m, d, e + np.exp(log_gain - gamma * log_p))

    def compute_for(self, family: str, loss: ArrayLike) -> Array:
        """Training FLOPs at which the family's frontier reaches a loss; infinite at E and below."""
        loss = np.asarray(loss, float)
        e, _, _, _, _, k = self._of(family, loss.ndim)
        _, log_gain, gamma = self._frontier_terms(family, loss.ndim)
        with np.errstate(all="ignore"):
            log_excess = np.log(np.maximum(loss - e, 0.0))
            return k * np.exp((log_gain - log_excess) / gamma)

    def size_for(self, family: str, loss: ArrayLike) -> Array:
        """Forward FLOPs a token with which the frontier reaches a loss; infinite at E and below.

        On the frontier α·A/M^α = β·B/D^β, so that L − E = (1 + α/β)·A/M^α.
        """
        loss = np.asarray(loss, float)
        e, a, _, alpha, beta, _ = self._of(family, loss.ndim)
        with np.errstate(all="ignore"):
            log_excess = np.log(np.maximum(loss - e, 0.0))
            return np.exp((np.log(a) + np.log1p(alpha / beta) - log_excess) / alpha)

    def _frontier_terms(self, family: str, ndim: int) -> tuple[Array, Array, Array]:
        """ln G, ln K and γ of M* = G·P^(β/(α+β)), L* = E + K·P^−γ, where P = M·D."""
        _, a, b, alpha, beta, _ = self._of(family, ndim)
        log_g = (np.log(alpha * a) - np.log(beta * b)) / (alpha + beta)
        log_gain = np.logaddexp(np.log(a) - alpha * log_g, np.log(b) + beta * log_g)
        return log_g, log_gain, alpha * beta / (alpha + beta)

    def _of(self, family: str, ndim: int) -> list[Array]:
        """E, A, B, α, β, k of a family, with `ndim` axes appended to broadcast against."""
        at = index_of(self.families, family)
        rows = (self.E, self.A, self.B, self.alpha, self.beta, self.flops_ratio)
        chosen = [row[..., at] for row in rows]
        return [np.reshape(value, np.shape(value) + (1,) * ndim) for value in chosen]

    def alone(self, family: str) -> FamilyLaw:
        """One family of a separate fit, as the fit of its points that it was (but for `aicc`)."""
        at = index_of(self.families, family)
        columns: dict[str, Any] = {name: getattr(self, name)[..., [at]] for name in _COLUMNS}
        return replace(self, families=(family,), kind="shared", **columns)

    @classmethod
    def side_by_side(cls, laws: Sequence[FamilyLaw]) -> FamilyLaw:
        """Fits of a family each, or equally many draws of each, as one law that shares nothing."""
        columns: dict[str, Any] = {
            name: np.concatenate([getattr(law, name) for law in laws], axis=-1) for name in _COLUMNS
        }
        return cls(
            families=tuple(family for law in laws for family in law.families),
            kind="separate",
            objective=np.sum([law.objective for law in laws], axis=0),
            aicc=sum(law.aicc for law in laws),
            agreement=min(law.agreement for law in laws),
            **columns,
        )


_COLUMNS = ("E", "A", "B", "alpha", "beta", "flops_ratio")


def fit_families(points: Points, kind: LawKind = "shared") -> FamilyLaw:
    """Fit the families' law to points with finite losses at their best learning rates.

    Raises ScalingError as `fit_law` does, for each family alone where nothing is shared; otherwise
    for a family with fewer than 2 sizes or 2 token counts (3 sizes with an own α): its A and B
    would be undetermined.
    """
    if kind == "separate":
        return FamilyLaw.side_by_side([fit_families(p) for p in by_family(points)])
    fit = FamilyFit(points, own_exponents=kind == "own")
    return fit.law(*fit.problem.solve(fit.problem.starts()))


def by_family(points: Points) -> list[Points]:
    """The points of each family; ScalingError where there are none."""
    if not len(points):
        raise ScalingError("there are no points")
    return [points[points.family == family] for family in points.families]


class FamilyFit:
    """The optimisation problem of some points, and the way from its optimum to a law.

    A bootstrap solves the same problem with other weights, so this is made once.
    """

    def __init__(self, points: Points, own_exponents: bool) -> None:
        size, tokens, loss, training = positive_columns(
            forward_flops=points.forward_flops,
            tokens=points.tokens,
            loss=points.loss,
            training_flops=points.training_flops,
        )
        self.families = points.families
        _check_families(points, own_exponents)
        x, z = np.log(size), np.log(tokens)
        self.center = float(x.mean()), float(z.mean())
        group = np.stack([points.family == f for f in self.families], axis=1).astype(float)
        log_ratio = np.log(training / (size * tokens))
        self.ratio = np.exp(log_ratio @ group / group.sum(axis=0))
        self.problem = LawProblem(
            x - self.center[0],
            z - self.center[1],
            np.log(loss),
            group,
            np.ones(len(points)),
            own_exponents,
        )

    def theta(self, law: FamilyLaw) -> Array:
        """The parameters of a law of these families, to start from; the inverse of `law`."""
        a = np.log(law.A) - law.alpha * self.center[0]
        b = np.log(law.B) - law.beta * self.center[1]
        alpha = law.alpha if law.kind == "own" else law.alpha[:1]
        return np.concatenate([np.log(law.E[:1]), a, b, np.log(alpha), np.log(law.beta[:1])])

    def law(self, theta: Array, objective: float, agreement: float) -> FamilyLaw:
        """The law at an optimum."""
        e, a, b, alpha, beta = self.problem.coefficients(theta)
        alpha = np.broadcast_to(alpha, a.shape).copy()
        return FamilyLaw(
            families=self.families,
            E=np.full(a.shape, _exp(e)),
            A=_exp(a + alpha * self.center[0]),
            B=_exp(b + beta * self.center[1]),
            alpha=alpha,
            beta=np.full(a.shape, beta),
            flops_ratio=self.ratio,
            kind="own" if self.problem.own_alpha else "shared",
            objective=np.asarray(objective),
            aicc=_aicc(objective, len(self.problem.weight), len(theta) + 1),
            agreement=agreement,
        )


def _exp(log: ArrayLike) -> Array:
    """e^log, but that a term which vanishes, or outgrows all, keeps a logarithm."""
    return np.asarray(np.exp(np.clip(log, -700, 700)))


def index_of(families: tuple[str, ...], family: str) -> int:
    """The position of a family, or ScalingError that lists those there are."""
    if not families:
        raise ScalingError("there are no points")
    if family not in families:
        raise ScalingError(f"no family {family!r} in the points, only {', '.join(families)}")
    return families.index(family)


def _check_families(points: Points, own_exponents: bool) -> None:
    """ScalingError where the points cannot determine the law."""
    if not len(points):
        raise ScalingError("there are no points")
    if len(set(points.budget.tolist())) < 2:
        raise ScalingError("all points are of one budget, the law needs 2 or more")
    parameters = 2 + 2 * len(points.families) + (len(points.families) if own_exponents else 1)
    who = f"family {points.families[0]!r}" if len(points.families) == 1 else "the points"
    check_grid(points.forward_flops, points.tokens, parameters, who)
    sizes_needed = 3 if own_exponents else 2
    for family in points.families:
        mine = points[points.family == family]
        sizes, tokens = len(np.unique(mine.forward_flops)), len(np.unique(mine.tokens))
        if sizes < sizes_needed:
            raise ScalingError(f"family {family!r} has {sizes} model sizes, needs {sizes_needed}")
        if tokens < 2:
            raise ScalingError(f"family {family!r} has 1 token count, needs 2")


def _aicc(objective: float, points: int, parameters: int) -> float:
    """AICc of the Huber density at the objective's optimum; infinite with too few points."""
    if points <= parameters + 1:
        return float("inf")
    total, delta = objective / 1e3, HUBER_DELTA

    def nll(log_s: float) -> float:
        # Z(s) is the integral of exp(−Huber(r)/s): a Gaussian middle and two exponential tails.
        s = np.exp(log_s)
        middle = np.sqrt(2 * np.pi * s) * erf(delta / np.sqrt(2 * s))
        tails = 2 * s / delta * np.exp(-(delta**2) / (2 * s))
        return float(points * np.log(middle + tails) + total / s)

    best = minimize_scalar(nll, bounds=(-60.0, 5.0), method="bounded", options={"xatol": 1e-9})
    correction = 2 * parameters * (parameters + 1) / (points - parameters - 1)
    return 2 * float(best.fun) + 2 * parameters + correction
