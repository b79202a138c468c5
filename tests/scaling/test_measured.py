from dataclasses import replace

import numpy as np
import pytest

from sparse_gpt.scaling import ScalingError, isoflop_minima, measured_multiplier


def true_multiplier(law, losses):
    return law.compute_for("dense", losses) / law.compute_for("sparse", losses)


def test_a_known_law_without_noise_gives_its_multiplier(law, sweep):
    points = sweep(law, sizes=15, budgets=13)
    got = measured_multiplier(points, "dense", "sparse", draws=50)
    inside = ~got.extrapolated
    np.testing.assert_allclose(
        got.compute.value[inside], true_multiplier(law, got.losses[inside]), rtol=0.02
    )
    np.testing.assert_allclose(got.losses, law.frontier("sparse", got.budgets).loss, rtol=1e-3)
    np.testing.assert_allclose(got.compute.interval_95[0], got.compute.value)  # seeds are equal
    np.testing.assert_allclose(got.baseline_compute, got.compute.value * got.budgets)
    # Seconds a FLOP fall as M^-0.1.
    sizes = law.size_for("dense", got.losses) / law.size_for("sparse", got.losses)
    expected = got.compute.value * sizes**-0.1
    np.testing.assert_allclose(got.seconds.value[inside], expected[inside], rtol=0.01)
    # The sparse family's last budgets do better than anything dense.
    assert got.extrapolated.tolist() == [
        loss < float(law.frontier("dense", 1e17).loss) for loss in got.losses
    ]
    assert 0 < got.extrapolated.sum() < 6
    assert not got.edge.any()
    assert not got.baseline_edge.any()


def test_a_family_against_itself_is_1_and_the_minima_are_those_of_isoflop(noisy):
    dense = noisy[noisy.family == "dense"]
    family = np.array(["twin"] * len(dense))
    trunk = np.array([f"twin {name}" for name in dense.trunk])
    twin = replace(dense, family=family, trunk=trunk)
    rows = [*dense.rows(), *twin.rows()]
    got = measured_multiplier(type(noisy).from_rows(rows), "dense", "twin", draws=10)
    np.testing.assert_allclose(got.compute.value, 1)
    np.testing.assert_allclose(got.seconds.value, 1)
    assert not got.extrapolated.any()
    minima = isoflop_minima(dense.budget, dense.params, dense.loss)
    at = np.isin(got.budgets, minima.flops)
    np.testing.assert_allclose(got.losses[at], minima.loss)
    np.testing.assert_allclose(got.params[at], minima.params)
    assert (at == ~got.edge).all()


def test_edges_are_flagged_and_read_at_the_lowest_mean(law, sweep):
    points = sweep(law, sizes=9)
    large = points.forward_flops > 5e6
    only_small = points[(points.family == "dense") | ~large]
    got = measured_multiplier(only_small, "dense", "sparse", draws=10)
    assert got.edge.tolist() == [False, True, True, True]
    assert not got.baseline_edge.any()
    mine = only_small[only_small.family == "sparse"]
    last = mine.loss[mine.budget == mine.budget.max()]
    assert got.losses[-1] == pytest.approx(last.min())
    assert got.params[-1] == pytest.approx(mine.params.max())
    other = measured_multiplier(only_small, "sparse", "dense", draws=10)
    assert not other.edge.any()
    assert other.baseline_edge.any()
    two = points[np.isin(points.forward_flops, np.unique(points.forward_flops)[3:5])]
    assert measured_multiplier(two, "dense", "sparse", draws=10).edge.all()  # no curve of 2 sizes


def test_extrapolation_goes_on_with_the_outermost_slopes(law, sweep):
    points = sweep(law, sizes=9)
    loss = np.where(points.family == "sparse", points.loss - 0.05, points.loss)
    got = measured_multiplier(replace(points, loss=loss), "dense", "sparse", draws=10)
    alone = measured_multiplier(points, "sparse", "dense", draws=10)  # dense's own minima
    c, y = np.log(alone.budgets), alone.losses
    expected = c[-1] + (got.losses[-1] - y[-1]) * (c[-1] - c[-2]) / (y[-1] - y[-2])
    assert got.extrapolated[-1]
    assert got.baseline_compute[-1] == pytest.approx(np.exp(expected))
    loss = np.where(points.family == "sparse", points.loss + 1.5, points.loss)
    got = measured_multiplier(replace(points, loss=loss), "dense", "sparse", draws=10)
    expected = c[0] + (got.losses[0] - y[0]) * (c[1] - c[0]) / (y[1] - y[0])
    assert got.extrapolated[0]
    assert got.baseline_compute[0] == pytest.approx(np.exp(expected))
    assert got.compute.value[0] < 1


def test_a_frontier_that_does_not_fall_is_not_reached(law, sweep):
    points = sweep(law, sizes=9, trunk_noise=0.001)
    worse = (points.family == "dense") & (points.budget == points.budget.max())
    got = measured_multiplier(
        replace(points, loss=points.loss + 2.0 * worse), "dense", "sparse", draws=10
    )
    assert got.extrapolated[-1]
    assert got.compute.value[-1] == np.inf
    assert np.isfinite(got.compute.value[:2]).all()


def test_seconds_are_none_where_not_measured(law, sweep):
    points = sweep(law, sizes=5)
    untimed = replace(points, device_seconds=np.full(len(points), np.nan))
    assert measured_multiplier(untimed, "dense", "sparse", draws=10).seconds is None
    last = (points.family == "sparse") & (points.budget == points.budget.max())
    some = replace(points, device_seconds=np.where(last, 0, points.device_seconds))
    got = measured_multiplier(some, "dense", "sparse", draws=10)
    assert np.isnan(got.seconds.value).tolist() == [False, False, False, True]
    assert np.isnan(got.seconds.interval_80[0]).tolist() == [False, False, False, True]


def test_one_seed_has_the_others_spread_and_no_seeds_no_interval(noisy):
    sparse_once = noisy[(noisy.family == "dense") | (noisy.seed == 0)]
    got = measured_multiplier(sparse_once, "dense", "sparse", draws=100)
    assert got.spread[0] == got.spread[1] > 0
    assert (got.compute.interval_80[0] < got.compute.interval_80[1]).all()
    assert (got.compute.interval_95[0] < got.compute.interval_80[0]).all()
    alone = measured_multiplier(noisy[noisy.seed == 0], "dense", "sparse", draws=100)
    assert np.isfinite(alone.compute.value).all()
    assert np.isnan(alone.compute.interval_80).all()
    assert np.isnan(alone.spread).all()


def test_a_baseline_of_one_budget_has_no_frontier(exact):
    points = exact[(exact.family == "sparse") | (exact.budget == exact.budget[0])]
    with pytest.raises(ScalingError, match="'dense' has one budget, a frontier needs 2"):
        measured_multiplier(points, "dense", "sparse", draws=2)


def test_80_percent_intervals_cover_what_the_minima_say_without_noise(law, sweep):
    true = measured_multiplier(sweep(law, sizes=5), "dense", "sparse", draws=1).compute.value
    inside = []
    for seed in range(40):
        points = sweep(law, trunk_noise=0.004, own_noise=0.001, seeds=3, sizes=5, seed=seed)
        got = measured_multiplier(points, "dense", "sparse", draws=200, seed=seed)
        low, high = got.compute.interval_80
        inside.append((low <= true) & (true <= high))
    assert 0.7 < np.mean(inside) < 0.92
