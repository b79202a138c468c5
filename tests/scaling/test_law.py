import csv
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import check_grad

from sparse_gpt.scaling import ScalingError, fit_law, isoflop_minima
from sparse_gpt.scaling.problem import LawProblem

CSV = Path(__file__).parents[1] / "assets/isoflop_points.csv"
PUBLISHED = {
    "base_long_kaplan_kaplan": 0.834,
    "base_long_kaplan_standard": 0.701,
    "base_short_kaplan_standard": 0.604,
    "base_short_chinchilla_standard": 0.571,
    "tuned_short_const_standard": 0.497,
}


def grid(sizes=6, tokens=6):
    n, d = np.meshgrid(np.geomspace(1e6, 1e8, sizes), np.geomspace(2e7, 2e9, tokens))
    return n.ravel(), d.ravel()


def hoffmann(n, d):
    return 1.69 + 406.4 / n**0.34 + 410.7 / d**0.28


@settings(max_examples=5)
@given(
    st.floats(1.0, 2.5),
    st.floats(0.1, 1.5),
    st.floats(0.1, 1.5),
    st.floats(0.2, 0.6),
    st.floats(0.2, 0.6),
)
def test_noise_free_coefficients_are_recovered(e, a, b, alpha, beta):
    n, d = grid()
    # a and b are the terms' sizes at the middle of the grid.
    big_a, big_b = a * 1e7**alpha, b * 2e8**beta
    law = fit_law(n, d, e + big_a / n**alpha + big_b / d**beta)
    assert law.alpha == pytest.approx(alpha, rel=1e-4)
    assert law.beta == pytest.approx(beta, rel=1e-4)
    np.testing.assert_allclose([law.E, law.A, law.B], [e, big_a, big_b], rtol=1e-3)
    assert law.agreement > 0.9
    np.testing.assert_allclose(law.predict(n, d), e + big_a / n**alpha + big_b / d**beta)


@pytest.mark.parametrize("noise", [0.003, 0.01, 0.03])
def test_all_starts_end_at_one_optimum_and_fast(noise):
    rng = np.random.default_rng(1)
    n, d = np.exp(rng.uniform(np.log([[1e6], [2e7]]), np.log([[1e8], [2e9]]), (2, 250)))
    began = time.process_time()
    law = fit_law(n, d, hoffmann(n, d) * np.exp(noise * rng.standard_normal(250)))
    assert law.agreement == 1
    assert time.process_time() - began < 5


def test_an_outlier_hardly_moves_the_fit():
    n, d = grid()
    loss = hoffmann(n, d)
    loss[7] *= 1.2
    law = fit_law(n, d, loss)
    assert law.alpha == pytest.approx(0.34, rel=1e-3)
    assert law.beta == pytest.approx(0.28, rel=1e-3)


@settings(max_examples=20)
@given(st.integers(0, 2**31), st.booleans())
def test_gradient_equals_finite_differences(seed, own):
    rng = np.random.default_rng(seed)
    group = np.eye(2)[np.arange(20) % 2]
    x, z, y = rng.normal(size=(3, 20))
    problem = LawProblem(x, z, y, group, rng.uniform(0, 3, 20), own)
    theta = rng.normal(size=7 + own)
    error = check_grad(
        lambda t: problem.objective(t)[0], lambda t: problem.objective(t)[1], theta, epsilon=1e-7
    )
    assert error < 1e-4 * max(1, np.linalg.norm(problem.objective(theta)[1]))


@pytest.mark.parametrize("setup", PUBLISHED)
def test_isoflop_exponents_are_the_published_ones(setup):
    with CSV.open() as file:
        rows = [row for row in csv.DictReader(file) if row["setup"] == setup]
    columns = [[float(row[name]) for row in rows] for name in ("flops", "params", "loss")]
    assert isoflop_minima(*columns).exponent == pytest.approx(PUBLISHED[setup], abs=0.005)


@pytest.mark.parametrize(("method", "tolerance"), [("akima", 0.02), ("parabola", 0.01)])
def test_minima_of_a_known_law(method, tolerance):
    flops, params = (a.ravel() for a in np.meshgrid(np.geomspace(1e15, 1e17, 5), np.ones(9)))
    best = 3e6 * (flops / 1e16) ** 0.45
    params = best * np.tile(np.geomspace(0.3, 3.3, 9)[:, None], 5).ravel()
    minima = isoflop_minima(flops, params, np.exp(1 + np.log(params / best) ** 2 / 50), method)
    assert minima.exponent == pytest.approx(0.45, abs=tolerance)
    np.testing.assert_allclose(minima.loss, np.e, rtol=tolerance / 10)
    np.testing.assert_allclose(
        minima.params, 3e6 * (minima.flops / 1e16) ** 0.45, rtol=tolerance * 2
    )
    assert minima.left_out == ()


@pytest.mark.parametrize("method", ["akima", "parabola"])
def test_budgets_without_an_interior_minimum_are_listed(method):
    curves = {1e15: [3.0, 2.9, 2.8, 2.7], 1e16: [2.5, 2.4, 2.45, 2.6], 1e17: [2.0, 2.1, 2.2, 2.3]}
    rows = [(c, 10.0**i, y) for c, losses in curves.items() for i, y in enumerate(losses)]
    rows += [(1e18, 1.0, 2.0), (1e18, 2.0, 1.9)]
    minima = isoflop_minima(*zip(*rows, strict=True), method)
    assert minima.flops.tolist() == [1e16]
    assert np.isnan(minima.exponent)
    assert re.search("largest|no minimum", minima.left_out[0])
    assert re.search("smallest|no minimum", minima.left_out[1])
    assert "2 sizes" in minima.left_out[2]


def test_isoflop_averages_equal_sizes():
    c, n, y = np.ones(4), np.array([1.0, 2.0, 4.0, 8.0]), np.array([3.0, 2.0, 2.1, 3.0])
    split = isoflop_minima([*c, 1], [*n, 2], [*y[:1], 1.9, *y[2:], 2.1])
    assert split.params == pytest.approx(isoflop_minima(c, n, y).params)


def test_another_isoflop_method_is_refused():
    with pytest.raises(ValueError, match="'akima' or 'parabola'"):
        isoflop_minima([1], [1], [1], "spline")


N, D = grid()
L = hoffmann(N, D)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ((N[:5], D[:5], L[:5]), "5 points, a law of 5 parameters needs 6"),
        ((np.full(36, 1e6), D, L), "1 different model sizes, the exponents need 3"),
        ((N, np.full(36, 1e9), L), "1 different token counts, the exponents need 3"),
        ((N, 1e15 / N, L), "vary only together"),
        ((N, 20 * N, L), "vary only together"),
        ((N, D, np.where(N > 5e7, np.nan, L)), "loss has 6 non-finite values"),
        ((N, D, L - L.min()), "loss has 1 values that are not positive"),
        ((-N, D, L), "params has 36 values that are not positive"),
        ((N, D, L[:-1]), "not 1-D arrays of one length"),
    ],
)
def test_what_cannot_be_fitted_is_one_clear_line(columns, message):
    with pytest.raises(ScalingError, match=message) as error:
        fit_law(*columns)
    assert "\n" not in str(error.value)
