"""The optimisation behind every fit of the law E + A/N^α + B/D^β.

Sources: Hoffmann et al. 2022 (arXiv:2203.15556) section 3.3 and appendix D.3 (log-sum-exp form,
Huber loss of log residuals, quasi-Newton from a grid of starts); Besiroglu et al. 2024
(arXiv:2404.10102), who show that a mean in place of a sum and a loose tolerance end it early.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from scipy.optimize import minimize

from .points import Array

HUBER_DELTA = 1e-3
_SCALE = 1e3
# Exponents outside this range are not measurable by any realistic grid; the clip keeps a line
# search from overflowing.
_LOG_EXPONENTS = (np.log(1e-3), np.log(10.0))
# Two ends are one optimum if their objectives differ by less than this fraction, or by what log
# residuals near 1e-5 add up to.
_AGREE, _NOTHING = 1e-3, 1e-6


@dataclass(frozen=True, eq=False)
class LawProblem:
    """A robust fit of ln L = LSE(a_f − α ln M, b_f − β ln D, e), one a and b a group of points.

    log_size, log_tokens, log_loss, weight: (points,), the first two centred.
    group: (points, groups), one-hot.
    own_alpha: whether each group has an α of its own; β is always shared.
    Parameters θ: e, a (groups), b (groups), ln α (1 or groups), ln β.
    """

    log_size: Array
    log_tokens: Array
    log_loss: Array
    group: Array
    weight: Array
    own_alpha: bool = False

    def residuals(self, theta: Array) -> tuple[Array, Array]:
        """Log residuals (points,), and their Jacobian (points, parameters)."""
        splits = self._splits
        owner = self.group if self.own_alpha else np.ones((len(self.weight), 1))
        alpha, d_alpha = _exponent(theta[splits[2] : splits[3]])
        beta, d_beta = _exponent(theta[splits[3]])
        terms = np.empty((3, len(self.weight)))
        terms[0] = theta[0]
        terms[1] = self.group @ theta[1 : splits[1]] - (owner @ alpha) * self.log_size
        terms[2] = self.group @ theta[splits[1] : splits[2]] - beta * self.log_tokens
        top = terms.max(axis=0)
        shares = np.exp(terms - top)
        total = shares.sum(axis=0)
        shares /= total
        jacobian = np.empty((len(self.weight), len(theta)))
        jacobian[:, 0] = shares[0]
        jacobian[:, splits[0] : splits[1]] = shares[1][:, None] * self.group
        jacobian[:, splits[1] : splits[2]] = shares[2][:, None] * self.group
        by_alpha = (-shares[1] * self.log_size)[:, None]
        jacobian[:, splits[2] : splits[3]] = by_alpha * owner * d_alpha
        jacobian[:, splits[3]] = -shares[2] * self.log_tokens * d_beta
        return top + np.log(total) - self.log_loss, jacobian

    def objective(self, theta: Array) -> tuple[float, Array]:
        """1e3 × Σ weight × Huber_{1e-3}(log residual), and its gradient."""
        residual, jacobian = self.residuals(theta)
        clipped = np.clip(residual, -HUBER_DELTA, HUBER_DELTA)
        # r²/2 inside, δ(|r| − δ/2) outside: both are c(r − c/2) with c the clipped residual.
        value = np.sum(self.weight * clipped * (residual - clipped / 2))
        return float(_SCALE * value), _SCALE * (self.weight * clipped) @ jacobian

    def coefficients(self, theta: Array) -> tuple[float, Array, Array, Array, float]:
        """e, a, b, α (1 or groups), β."""
        e, a, b, log_alpha, log_beta = np.split(theta, list(self._splits))
        return float(e[0]), a, b, _exponent(log_alpha)[0], float(_exponent(log_beta)[0][0])

    @property
    def _splits(self) -> tuple[int, int, int, int]:
        """Where a, b, α and β begin in θ, after e."""
        groups = self.group.shape[1]
        return 1, 1 + groups, 1 + 2 * groups, 1 + 2 * groups + (groups if self.own_alpha else 1)

    def starts(self) -> list[Array]:
        """A grid over E, α, β; a and b are then the least-squares ones."""
        loss = np.exp(self.log_loss)
        alphas = self.group.shape[1] if self.own_alpha else 1
        grid = product((0.3, 0.6, 0.9), (0.15, 0.35, 0.8), (0.15, 0.35, 0.8))
        found = []
        for floor, alpha, beta in grid:
            e = floor * loss.min()
            columns = np.exp(np.stack([-alpha * self.log_size, -beta * self.log_tokens], axis=1))
            pairs = [
                np.linalg.lstsq(columns[member], loss[member] - e, rcond=None)[0]
                for member in self.group.T.astype(bool)
            ]
            a, b = np.log(np.maximum(pairs, 0.01 * (loss.mean() - e))).T
            found.append(np.concatenate([[np.log(e)], a, b, np.log([alpha] * alphas + [beta])]))
        return found

    def solve(self, starts: Sequence[Array]) -> tuple[Array, float, float]:
        """The best optimum from several starts: θ, objective, and the share of starts ending there.

        BFGS in coordinates whitened by the Gauss-Newton Hessian of where it begins, and again from
        where it ends, until that changes nothing: the Huber sum is nearly piecewise linear with
        narrow valleys, in which it would stop early.
        """
        with np.errstate(all="ignore"):  # a search may step out of all bounds, and comes back
            ends = [self._descend(start) for start in starts]
        values = np.array([value for _, value in ends])
        best = int(values.argmin())
        agree = values <= values[best] * (1 + _AGREE) + _NOTHING
        return ends[best][0], float(values[best]), float(agree.mean())

    def _descend(self, theta: Array) -> tuple[Array, float]:
        value = np.inf
        for _ in range(8):
            residual, jacobian = self.residuals(theta)
            bend = self.weight / np.maximum(np.abs(residual) / HUBER_DELTA, 1)
            hessian = jacobian.T @ (bend[:, None] * jacobian) * _SCALE
            # The ridge bounds the step along what the points do not determine.
            hessian += 1e-9 * np.trace(hessian) * np.eye(len(theta))
            white = np.linalg.inv(np.linalg.cholesky(hessian)).T
            before = value
            theta, value = _bfgs(self, theta, white)
            if not before - value > 1e-7 * value:
                break
        return theta, value


def _bfgs(problem: LawProblem, theta: Array, basis: Array) -> tuple[Array, float]:
    """BFGS over z, for θ + basis·z.

    Not L-BFGS, which only saves memory that 5 to 20 parameters do not need: SciPy's gives 7×7
    matrices to a threaded LAPACK, and was 25 times slower where other processes kept cores busy.
    """

    def objective(z: Array) -> tuple[float, Array]:
        value, gradient = problem.objective(theta + basis @ z)
        return value, gradient @ basis

    # Where the Hessian is near 1, a gradient g leaves g²/2 of the objective: 1e-14 here.
    options = {"gtol": 1e-7, "maxiter": 1000}
    found = minimize(objective, np.zeros(len(theta)), jac=True, method="BFGS", options=options)
    return theta + basis @ found.x, float(found.fun)


def _exponent(log_value: Any) -> tuple[Any, Any]:
    """An exponent from its clipped logarithm, and its derivative by that logarithm."""
    clipped = np.minimum(np.maximum(log_value, _LOG_EXPONENTS[0]), _LOG_EXPONENTS[1])
    value = np.exp(clipped)
    return value, value * (clipped == log_value)
