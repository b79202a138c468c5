"""Bad steps under real ranks, of which one errs: see faulty_train.py."""

import json
import math

import pytest
from faults import FAULTY, faults, options, stopped
from ranks import finish, metrics, start_ranks


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [(0, "fp32"), (1, "bf16"), pytest.param(2, "fp32", marks=pytest.mark.long), (3, "fp32")],
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing(run_file, zero_stage, precision):
    """Neither weights, nor moments, nor running statistics."""
    outputs = finish(
        start_ranks(
            run_file,
            *faults(("loss", 5), ("grad", 9)),
            *options(zero_stage, precision),
            *("model.ffn.feedback={}", "eval={every: 1, max_tokens: 512}", "duration.steps=14"),
            script=FAULTY,
        )
    )
    rows = {row["step"]: row for row in metrics(run_file.parent / "run")}
    skipped = [row.get("guard/skipped") for row in rows.values()][1:]
    assert skipped == [0] * 5 + [1] * 4 + [2] * 5
    assert math.isnan(rows[6]["train/loss"])
    assert math.isfinite(rows[10]["train/loss"])
    assert not math.isfinite(rows[10]["train/grad_norm"])
    val = [row["val/loss"] for row in rows.values()]
    same = [step for step in range(1, 15) if val[step] == val[step - 1]]
    assert same == [6, 10]
    assert val[14] < val[0] - 0.3
    assert "step 6: skipped, loss nan" in outputs[0]
    assert "samples 80 to 95" in outputs[0]


@pytest.mark.parametrize(
    "zero_stage", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 2, 3))]
)
def test_a_run_saved_before_its_first_update_goes_on_bit_equal(run_file, tmp_path, zero_stage):
    """Its optimizer has no moments yet: the first step was skipped, and saved after."""
    run = (*faults(("loss", 0)), *options(zero_stage), "eval={every: 1, max_tokens: 512}")
    rows = {}
    for name, lengths in (("whole", (6,)), ("cut", (1, 6))):
        folder = f"run_dir={tmp_path / name}"
        for steps in lengths:
            finish(start_ranks(run_file, *run, folder, f"duration.steps={steps}", script=FAULTY))
        rows[name] = {row["step"]: row for row in metrics(tmp_path / name)}
    for step, row in rows["whole"].items():
        again = rows["cut"][step]
        assert row["val/loss"] == again["val/loss"]
        assert step < 2 or row["train/loss"] == again["train/loss"]
    assert rows["cut"][6]["guard/skipped"] == 1


def test_a_flipped_bit_stops_the_run_before_it_is_learnt(run_file):
    error = stopped(
        start_ranks(
            run_file,
            *faults(("flip", 7)),
            *options(2, "bf16", checksum_every=4),
            script=FAULTY,
        )
    )
    assert "step 8: blocks.1.attention.qkv.weight differ" in error
    assert metrics(run_file.parent / "run")[-1]["step"] == 7


@pytest.mark.parametrize(
    ("policy", "zero_stage", "precision"),
    [
        ("skip", 3, "fp32"),
        ("rollback", 0, "fp32"),
        pytest.param("skip", 1, "bf16", marks=pytest.mark.long),
        pytest.param("skip", 2, "fp32", marks=pytest.mark.long),
    ],
)
def test_a_spike_is_skipped_or_rolled_back(run_file, policy, zero_stage, precision):
    outputs = finish(
        start_ranks(
            run_file,
            *faults(("spike", 13)),
            *options(zero_stage, precision, spike=policy, window=6, threshold=50),
            script=FAULTY,
        )
    )
    assert "step 14: skipped, loss" in outputs[0]
    run_dir = run_file.parent / "run"
    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(17))
    assert rows[-1]["guard/skipped"] == 1
    state = json.loads((run_dir / "checkpoints/step-00000016/manifest.json").read_text())
    # A rollback to step 12 leaves the samples of steps 13 and 14 out.
    assert state["samples"] == 16 * (18 if policy == "rollback" else 16)
    assert state["guard"]["skipped"] == 1


@pytest.mark.long
def test_spikes_that_come_back_after_each_rollback_end_the_run(run_file):
    error = stopped(
        start_ranks(
            run_file,
            *faults(("spike", 13), ("spike", 13), ("spike", 13)),
            *options(2, spike="rollback", window=6, threshold=50, stop_after=3),
            script=FAULTY,
        )
    )
    assert "3 bad steps in a row" in error
