import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from sparse_gpt.scaling import (
    ScalingError,
    bootstrap,
    compare,
    compute_multiplier,
    fit_families,
    held_out_error,
)
from sparse_gpt.scaling.multiplier import estimate, fit_seconds
from sparse_gpt.sweep import plots
from sparse_gpt.sweep.summary import BOUND, summarize

OTHER = {
    "shared": {},
    "own": {"alpha": (0.35, 0.3)},
    "separate": {"alpha": (0.35, 0.3), "entropy": (1.7, 1.5)},
}


@pytest.mark.parametrize("kind", OTHER)
def test_noise_free_families_are_recovered(true_law, sweep, kind):
    true = true_law(**OTHER[kind])
    law = fit_families(sweep(true), kind)
    assert law.kind == true.kind == kind
    for name in ("E", "A", "B", "alpha", "beta", "flops_ratio"):
        np.testing.assert_allclose(getattr(law, name), getattr(true, name), rtol=1e-3)
    assert law.agreement == 1


@settings(max_examples=20)
@given(st.floats(14, 19), st.floats(0.2, 0.6), st.sampled_from(["dense", "sparse"]))
def test_frontier_is_the_minimum_and_has_an_inverse(true_law, log_flops, alpha, family):
    law = true_law((alpha, 0.33))
    flops = 10**log_flops
    best = law.frontier(family, flops)
    ratio = law.flops_ratio[law.families.index(family)]
    assert best.m * best.d * ratio == pytest.approx(flops)
    assert law.predict(family, best.m, best.d) == pytest.approx(float(best.loss))

    def at(log_m):
        return float(law.predict(family, np.exp(log_m), flops / ratio / np.exp(log_m)))

    numeric = minimize_scalar(at, bounds=(5, 40), method="bounded", options={"xatol": 1e-10})
    assert numeric.fun == pytest.approx(float(best.loss), rel=1e-10)
    assert numeric.x == pytest.approx(float(np.log(best.m)), abs=1e-3)
    assert law.compute_for(family, best.loss) == pytest.approx(flops)
    assert law.size_for(family, best.loss) == pytest.approx(float(best.m))


def test_no_compute_reaches_the_entropy(law):
    assert law.compute_for("dense", [1.7, 1.0, 1.8]).tolist()[:2] == [np.inf, np.inf]


def test_multiplier_of_a_known_ratio(law, exact):
    flops = 1e17
    true = float(law.compute_for("dense", 2.9) / law.compute_for("sparse", 2.9))
    got = compute_multiplier(exact, n_bootstrap=20)
    np.testing.assert_allclose(got.compute.value, true, rtol=1e-3)
    np.testing.assert_allclose(got.reference_compute.interval_95, true, rtol=1e-2)
    assert got.reference_budget == pytest.approx(flops)
    assert got.reference_loss == pytest.approx(float(law.frontier("dense", flops).loss), rel=1e-4)
    assert not got.reference_extrapolated
    # Seconds a FLOP fall as M^-0.1, so the ratio of best sizes enters.
    sizes = law.size_for("dense", got.losses) / law.size_for("sparse", got.losses)
    assert got.seconds is not None
    np.testing.assert_allclose(got.seconds.value, true * sizes**-0.1, rtol=1e-3)
    # Extrapolated is the stretch past what the baseline reached, at the end of the curve.
    assert (np.diff(got.losses) < 0).all()
    np.testing.assert_array_equal(got.extrapolated, got.losses < got.reference_loss - 1e-12)
    assert 0 < got.extrapolated.sum() < len(got.losses)


def test_multiplier_is_reciprocal(exact):
    one = compute_multiplier(exact, "dense", "sparse", n_bootstrap=3)
    other = compute_multiplier(exact, "sparse", "dense", n_bootstrap=3)
    assert one.reference_compute.value * other.reference_compute.value == pytest.approx(1, rel=1e-4)
    assert other.reference_extrapolated


def test_unmeasured_seconds_give_no_seconds(exact):
    points = replace(exact, device_seconds=np.full(len(exact), np.nan))
    got = compute_multiplier(points, n_bootstrap=2)
    assert got.seconds is None
    assert got.reference_seconds is None


def test_draws_are_reproducible_and_bracket_the_fit(noisy):
    law = fit_families(noisy)
    draws = bootstrap(noisy, law, 40, seed=3)
    again = bootstrap(noisy, law, 5, seed=3)
    np.testing.assert_array_equal(draws.law.alpha[:5], again.law.alpha)
    assert draws.law.alpha.shape == (40, 2)
    assert draws.law.E.shape == (40, 2)
    np.testing.assert_array_equal(draws.law.E[:, 0], draws.law.E[:, 1])
    assert draws.clusters == {"dense": 12, "sparse": 12}
    assert draws.law.agreement > 0.95
    assert (draws.law.alpha.min(axis=0) < law.alpha).all()
    assert (draws.law.alpha.max(axis=0) > law.alpha).all()
    assert draws.law.frontier("dense", [1e15, 1e16, 1e17]).loss.shape == (40, 3)


def test_seconds_are_drawn_too_where_they_are_measured(noisy):
    noise = 0.1 * np.random.default_rng(0).standard_normal(len(noisy))
    seconds = noisy.device_seconds * np.exp(noise)
    seconds[[0, 1]] = np.nan, 0
    points = replace(noisy, device_seconds=seconds)
    full, drawn = fit_seconds(points), bootstrap(points, fit_families(points), 30).seconds
    assert drawn.slope.shape == drawn.intercept.shape == (30, 2)
    assert (drawn.slope.min(axis=0) < full.slope).all()
    assert (drawn.slope.max(axis=0) > full.slope).all()
    assert drawn.slope.std() < 0.03


def test_held_out_error_of_noise_free_points_is_zero(exact):
    held = held_out_error(exact)
    assert held.budget == pytest.approx(1e17)
    assert held.points == 16
    assert held.rms_log < 1e-6
    assert held.rms_nats < 1e-6


def test_held_out_error_sees_a_bias(exact):
    late = np.where(exact.budget > 9e16, np.exp(0.01), 1.0)
    held = held_out_error(replace(exact, loss=exact.loss * late))
    assert held.mean_log == pytest.approx(-0.01, rel=1e-3)
    assert held.rms_log == pytest.approx(0.01, rel=1e-3)
    assert held.mean_nats < 0


def test_compare_says_everything_in_plain_json(noisy):
    bad = noisy.loss.copy()
    bad[0] = np.nan
    got = compare(replace(noisy, loss=bad), n_bootstrap=10)
    plain = json.loads(json.dumps(got.to_dict(), allow_nan=False))
    assert got.chosen == "shared"
    assert set(got.multipliers) == {"sparse"}
    assert set(got.held_out) == {"shared", "own", "separate"}
    assert set(got.measured) == {"sparse"}
    assert len(plain["measured"]["sparse"]["compute"]["value"]) == 4
    assert set(got.minima) == {"dense", "sparse"}
    assert len(got.points) == len(noisy) - 1
    assert "loss is nan" in got.left_out[0]
    # The trunk's noise and its own, of a loss near 3.5.
    assert 0.005 < got.seed_spread["dense"] < 0.03
    assert plain["multipliers"]["sparse"]["reference_compute"]["value"] > 1
    assert plain["held_out"]["shared"]["points"] == 24
    assert "points" not in plain
    assert "draws" not in plain
    low, high = got.frontier_band("sparse", [1e16, 1e18])
    assert (low < high).all()


def test_compare_keeps_exponents_that_differ(true_law, sweep):
    points = sweep(true_law((0.35, 0.25)), own_noise=0.001, seeds=1, seed=1)
    got = compare(points, n_bootstrap=2)
    assert got.chosen == "own"
    assert got.law.kind == "own"
    assert "both tests" in got.reason


def test_compare_fits_families_by_themselves_where_that_predicts_best(true_law, sweep):
    points = sweep(true_law((0.35, 0.25), entropy=(1.7, 2.0)), own_noise=0.001, seeds=1, sizes=6)
    got = compare(points, n_bootstrap=3)
    assert got.chosen == "separate"
    assert got.law is got.separate
    assert (
        "Each family by itself: this predicts the largest budget at least 5% better" in got.reason
    )
    rms = {kind: held.rms_log for kind, held in got.held_out.items()}
    assert rms["separate"] == min(rms.values())
    np.testing.assert_allclose(got.law.E, [1.7, 2.0], atol=0.15)
    assert got.draws.law.E.shape == got.draws.law.beta.shape == (3, 2)
    assert got.draws.law.kind == "separate"
    assert got.draws.clusters == {"dense": 6, "sparse": 6}
    assert got.draws.seconds.slope.shape == (3, 2)
    json.dumps(got.to_dict(), allow_nan=False)


def test_separate_draws_are_those_of_each_family(true_law, sweep):
    points = sweep(true_law(entropy=(1.7, 2.0)), own_noise=0.001)
    law = fit_families(points, "separate")
    draws = bootstrap(points, law, 4, seed=5)
    sparse = points[points.family == "sparse"]
    alone = bootstrap(sparse, fit_families(sparse), 4, seed=6)
    for name in ("E", "A", "B", "alpha", "beta"):
        got, expected = getattr(draws.law, name)[:, 1], getattr(alone.law, name)[:, 0]
        np.testing.assert_allclose(got, expected)
    low, high = draws.law.E.min(axis=0), draws.law.E.max(axis=0)
    assert (low < law.E).all()
    assert (high > law.E).all()
    assert draws.law.predict("sparse", 1e6, [1e9, 2e9]).shape == (4, 2)


def test_a_family_of_few_points_is_not_fitted_by_itself(true_law, sweep):
    points = sweep(true_law((0.35, 0.25), entropy=(1.7, 2.0)), own_noise=0.001, seeds=1)
    few = points[(points.family == "dense") | (np.arange(len(points)) % 4 % 3 > 0)]
    few = few[(few.family == "dense") | (few.forward_flops > 1.1e6)]
    got = compare(few, n_bootstrap=2)
    assert got.separate is None
    assert got.chosen != "separate"
    assert any(
        "by itself: family 'sparse' has 6 sizes and budgets, 5 coefficients need 10" in line
        for line in got.left_out
    )


def test_compare_of_one_family_fits_it(exact):
    got = compare(exact[exact.family == "dense"], n_bootstrap=2)
    assert got.multipliers == {}
    assert got.shared.alpha[0] == pytest.approx(0.35, rel=1e-3)


def with_value(points, column, value):
    values = getattr(points, column).copy()
    values[0] = value
    return replace(points, **{column: values})


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda p: p[:0], "there are no points"),
        (lambda p: p[p.budget == p.budget.max()], "all points are of one budget"),
        (lambda p: p[p.size == p.size[0]], "1 different model sizes"),
        (lambda p: p[(p.family == "dense") | (p.size == p.size[0])], "'sparse' has 1 model sizes"),
        (lambda p: p[[0, 9, 19, 26, 33, 43, 48]], "7 points, a law of 7 parameters needs 8"),
        (lambda p: p[p.family == "dense"], "no family 'sparse' in the points, only dense"),
        (lambda p: with_value(p, "loss", np.nan), "loss has 1 non-finite"),
        (lambda p: with_value(p, "tokens", 0.0), "tokens has 1 values that are not positive"),
        (lambda p: with_value(p, "forward_flops", -1.0), "forward_flops has 1 values"),
    ],
)
def test_what_cannot_be_compared_is_one_clear_line(exact, spoil, message):
    with pytest.raises(ScalingError, match=message) as error:
        compute_multiplier(spoil(exact), n_bootstrap=1)
    assert "\n" not in str(error.value)


def test_two_trunks_make_no_interval(law, exact):
    few = replace(exact, trunk=np.array([f"{s == exact.size[0]}" for s in exact.size]))
    with pytest.raises(ScalingError, match="family 'dense' has 2 trunks, intervals need 3"):
        bootstrap(few, law, 1)


def test_two_budgets_cannot_be_held_out(exact):
    two = exact[np.isin(exact.budget, np.unique(exact.budget)[:2])]
    with pytest.raises(ScalingError, match="all points are of one budget"):
        held_out_error(two)


@pytest.mark.filterwarnings("error::RuntimeWarning")
def test_what_the_runs_do_not_bound_is_said_so(law, sweep):
    """Losses off by a third: no interval is bounded from above, and nothing warns."""
    pytest.importorskip("matplotlib")
    points = sweep(law, own_noise=0.3, sizes=3, budgets=2, seeds=1, seed=1)
    shares = []
    found = compare(points, n_bootstrap=8, progress=shares.append)
    assert shares == sorted(shares)
    assert 0 == shares[0] < shares[-1] < 1
    headline, *_, advice = summarize(found)
    assert "to unbounded, 95% " in headline
    assert advice.startswith("unbounded: these runs leave that end")
    figure = plots.multiplier(found)
    assert figure.axes[0].get_ylim()[1] < BOUND


def test_percentiles_among_infinite_and_undefined_draws():
    drawn = np.array([[1.0, 1.0, np.nan]] * 50 + [[2.0, np.inf, np.nan]] * 50)
    found = estimate(np.ones(3), drawn)
    assert found.interval_80[:, 0].tolist() == [1, 2]
    assert found.interval_80[:, 1].tolist() == [1, np.inf]
    assert np.isnan(found.interval_80[:, 2]).all()


@pytest.mark.slow
@pytest.mark.long
def test_80_percent_intervals_cover(law, sweep):
    """A short look; `scripts/studies/check_fit_coverage.py` measures it."""
    true = float(np.log(law.compute_for("dense", 2.9) / law.compute_for("sparse", 2.9)))
    inside = 0
    for seed in range(5):
        points = sweep(law, trunk_noise=0.004, own_noise=0.002, seeds=3, seed=seed)
        drawn = bootstrap(points, fit_families(points), 24, seed).law
        ratio = drawn.compute_for("dense", 2.9) / drawn.compute_for("sparse", 2.9)
        low, high = np.percentile(np.log(ratio), [10, 90])
        inside += low <= true <= high
    assert inside >= 3
