"""The law L(N, D) = E + A/N^α + B/D^β of one family, and the minima of its isoFLOP curves.

Sources: Hoffmann et al. 2022 (arXiv:2203.15556) section 3.2 (isoFLOP) and 3.3 (the law);
Porian et al. 2024 (arXiv:2406.19146) (Akima interpolation of isoFLOP curves).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.interpolate import Akima1DInterpolator

from .points import Array, ScalingError
from .problem import LawProblem


@dataclass(frozen=True)
class Law:
    """L(N, D) = E + A/N^α + B/D^β, nats a token.

    objective: 1e3 × Σ Huber_{1e-3}(log residual) at the optimum.
    agreement: the share of starts that ended at this optimum; well under 1 means that the points
        do not determine the law.
    """

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    objective: float
    agreement: float

    def predict(self, n: ArrayLike, d: ArrayLike) -> Array:
        """Loss of models of size n trained on d tokens, arrays that broadcast."""
        n, d = np.asarray(n, float), np.asarray(d, float)
        return self.E + self.A * n**-self.alpha + self.B * d**-self.beta


def fit_law(params: ArrayLike, tokens: ArrayLike, loss: ArrayLike) -> Law:
    """Fit L(N, D) to training results.

    params, tokens, loss: 1-D arrays of one length; loss in nats a token.
    Raises ScalingError for numbers that are not finite and positive, for fewer than 6 points, for
    fewer than 3 sizes or token counts, and where sizes and tokens vary only together (one
    budget, or one number of tokens a parameter), which leaves α and β undetermined.
    """
    n, d, y = positive_columns(params=params, tokens=tokens, loss=loss)
    check_grid(n, d, parameters=5)
    x, z = np.log(n), np.log(d)
    ones = np.ones(len(n))
    problem = LawProblem(x - x.mean(), z - z.mean(), np.log(y), ones[:, None], ones)
    theta, objective, agreement = problem.solve(problem.starts())
    e, a, b, alpha, beta = problem.coefficients(theta)
    return Law(
        E=float(np.exp(e)),
        A=float(np.exp(a[0] + alpha[0] * x.mean())),
        B=float(np.exp(b[0] + beta * z.mean())),
        alpha=float(alpha[0]),
        beta=beta,
        objective=objective,
        agreement=agreement,
    )


@dataclass(frozen=True, eq=False)
class Minima:
    """The best size of each FLOP budget, and its power law N* ∝ C^exponent.

    flops, params, loss: (budgets,), ascending in flops; the minimum of each isoFLOP curve.
    exponent, intercept: least squares of ln N* on ln C; NaN with fewer than two minima.
    left_out: one line for each budget without an interior minimum.
    """

    flops: Array
    params: Array
    loss: Array
    exponent: float
    intercept: float
    left_out: tuple[str, ...]


def isoflop_minima(
    flops: ArrayLike, params: ArrayLike, loss: ArrayLike, method: str = "akima"
) -> Minima:
    """The minimum of each isoFLOP curve.

    flops, params, loss: 1-D arrays of one length; points of one curve have equal flops (use the
        nominal budget). Losses of equal size within a budget are averaged.
    method: "akima" interpolates ln loss over ln params and takes the lowest point; "parabola" is
        a least-squares parabola in the same coordinates: less sensitive to noise, but biased
        where the sizes reach far from the minimum.

    A budget is left out, with a line that says so, if it has fewer than 3 sizes or if the minimum
    of its *curve* lies at the smallest or largest size. (The lowest measured point may be the
    outermost one: Akima's cubics can turn just inside it. The published exponents need this.)
    Raises ScalingError for numbers that are not finite and positive, and ValueError for another
    method.
    """
    if method not in ("akima", "parabola"):
        raise ValueError(f"method must be 'akima' or 'parabola', not {method!r}")
    lowest = _akima_minimum if method == "akima" else _parabola_minimum
    c, n, y = positive_columns(flops=flops, params=params, loss=loss)
    minima, left_out = [], []
    for budget in np.unique(c):
        chosen = c == budget
        sizes, where = np.unique(n[chosen], return_inverse=True)
        if len(sizes) < 3:
            left_out.append(f"budget {budget:.4g}: {len(sizes)} sizes, an isoFLOP curve needs 3")
            continue
        mean = np.bincount(where, y[chosen]) / np.bincount(where)
        found = lowest(np.log(sizes), np.log(mean))
        if isinstance(found, str):
            left_out.append(f"budget {budget:.4g}: {found}")
        else:
            minima.append([budget, *np.exp(found)])
    at, size, height = np.array(minima).reshape(-1, 3).T
    exponent, intercept = np.nan, np.nan
    if len(at) >= 2:
        exponent, intercept = np.polyfit(np.log(at), np.log(size), 1)
    return Minima(at, size, height, float(exponent), float(intercept), tuple(left_out))


def akima_minima(x: Array, y: Array) -> tuple[Array, Array]:
    """Place and height, each (curves,), of the lowest points of Akima's curves through y.

    x: (nodes,), ascending, 2 or more. y: (nodes, curves). A lowest point that is an end of x is
    exactly there.
    """
    bend, curve, slope, start = np.asarray(Akima1DInterpolator(x, y).c)  # each (nodes - 1, curves)
    # The minimum of a cubic is the root of its derivative with a positive second derivative.
    with np.errstate(divide="ignore", invalid="ignore"):
        t = -slope / (curve + np.sqrt(curve**2 - 3 * bend * slope))
    turns = (t > 0) & (t < np.diff(x)[:, None])
    t = np.where(turns, t, 0.0)
    height = ((bend * t + curve) * t + slope) * t + start
    places = np.concatenate([x[:-1, None] + t, np.broadcast_to(x[-1], (1, y.shape[1]))])
    heights = np.concatenate([height, y[-1:]])
    best = heights.argmin(axis=0)[None]
    return np.take_along_axis(places, best, 0)[0], np.take_along_axis(heights, best, 0)[0]


def _akima_minimum(x: Array, y: Array) -> tuple[float, float] | str:
    """(x, y) of the interpolant's lowest point, or why there is none."""
    (place,), (height,) = akima_minima(x, y[:, None])
    if place in (x[0], x[-1]):
        return f"the lowest loss is at the {'smallest' if place == x[0] else 'largest'} size"
    return float(place), float(height)


def _parabola_minimum(x: Array, y: Array) -> tuple[float, float] | str:
    """(x, y) of the vertex, or why there is none."""
    middle = x.mean()
    bend, slope, height = np.polyfit(x - middle, y, 2)
    if bend <= 0:
        return "the parabola has no minimum"
    vertex = -slope / (2 * bend)
    if not x[0] < vertex + middle < x[-1]:
        end = "smallest" if vertex + middle <= x[0] else "largest"
        return f"the parabola's minimum is beyond the {end} size"
    return float(vertex + middle), float(height - slope**2 / (4 * bend))


def positive_columns(**columns: ArrayLike) -> list[Array]:
    """The columns as float64 arrays of one length, finite and positive, or ScalingError."""
    arrays = {name: np.asarray(values, dtype=np.float64) for name, values in columns.items()}
    shapes = {array.shape for array in arrays.values()}
    if len(shapes) != 1 or len(shapes.pop()) != 1:
        raise ScalingError(f"{', '.join(arrays)} are not 1-D arrays of one length")
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise ScalingError(f"{name} has {np.sum(~np.isfinite(array))} non-finite values")
        if (array <= 0).any():
            raise ScalingError(f"{name} has {np.sum(array <= 0)} values that are not positive")
    return list(arrays.values())


def check_grid(size: Array, tokens: Array, parameters: int, who: str = "the points") -> None:
    """ScalingError where a grid of runs cannot determine a law of so many parameters."""
    if len(size) <= parameters:
        raise ScalingError(
            f"{who}: {len(size)} points, a law of {parameters} parameters needs {parameters + 1}"
        )
    for name, values in (("model sizes", size), ("token counts", tokens)):
        if (number := len(np.unique(values))) < 3:
            raise ScalingError(f"{who}: {number} different {name}, the exponents need 3")
    if abs(np.corrcoef(np.log(size), np.log(tokens))[0, 1]) > 0.999:
        raise ScalingError(
            f"{who}: sizes and tokens vary only together (one budget, or one tokens-to-size ratio)"
        )
