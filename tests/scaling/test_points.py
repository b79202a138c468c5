from dataclasses import replace

import numpy as np
import pytest

from sparse_gpt.scaling import Points, ScalingError, best_learning_rates, usable


def test_rows_round_trip_also_as_text(exact):
    rows = exact.rows()
    text = [{name: str(value) for name, value in row.items()} for row in rows]
    assert Points.from_rows(rows).rows() == rows
    assert Points.from_rows(text).rows() == rows
    assert exact.families == ("dense", "sparse")
    assert len(exact) == len(rows)


def test_points_are_chosen_by_mask_slice_and_index(exact):
    assert exact[exact.family == "sparse"].families == ("sparse",)
    assert exact[:3].rows() == exact[[0, 1, 2]].rows() == exact.rows()[:3]
    assert len(exact[np.zeros(len(exact), bool)]) == 0


def test_seconds_may_be_absent_and_losses_empty(exact):
    row = {**exact.rows()[0], "loss": None}
    del row["device_seconds"]
    points = Points.from_rows([row])
    assert np.isnan(points.device_seconds[0])
    assert np.isnan(points.loss[0])


def test_bad_rows_are_one_clear_line(exact):
    row = exact.rows()[0]
    with pytest.raises(ScalingError, match=r"row 1 of the points has no column 'tokens'"):
        Points.from_rows([row, {k: v for k, v in row.items() if k != "tokens"}])
    with pytest.raises(ScalingError, match=r"row 0 of the points: lr is 'fast', not a number"):
        Points.from_rows([{**row, "lr": "fast"}])
    with pytest.raises(ScalingError, match="one length"):
        replace(exact, loss=exact.loss[:-1])


def test_usable_names_what_it_leaves_out(exact):
    loss = exact.loss.copy()
    loss[[1, 5]] = np.nan, np.inf
    kept, lines = usable(replace(exact, loss=loss))
    assert len(kept) == len(exact) - 2
    assert len(lines) == 2
    assert "budget 4.64e+15" in lines[0]
    assert "loss is nan" in lines[0]


def test_best_learning_rate_has_the_lowest_mean_over_seeds(exact):
    cell = exact.rows()[0]
    losses = {1e-3: (3.0, 3.4), 3e-3: (3.1, 3.2), 1e-2: (3.2, 3.3)}
    rows = [
        {**cell, "lr": lr, "seed": seed, "loss": loss}
        for lr, pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    rows.append({**cell, "budget": 9e15, "lr": 1e-2})
    kept = best_learning_rates(Points.from_rows(rows))
    assert kept.lr.tolist() == [3e-3, 3e-3, 1e-2]
