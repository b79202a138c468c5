"""Bad steps under real ranks, of which one errs: see faulty_train.py."""

import json
import math

import pytest
import torch
from faults import FAULTY, faults, options, stopped
from ranks import finish, metrics, run_on_ranks, start_ranks

from sparse_gpt.train.checkpoint.zero_state import snapshot


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
    assert val[14] < val[0] - 0.2
    assert "step 6: skipped, loss nan" in outputs[0]
    assert "samples 80 to 95" in outputs[0]


@pytest.mark.parametrize(
    "zero_stage", [1, *(pytest.param(stage, marks=pytest.mark.long) for stage in (0, 2, 3))]
)
@pytest.mark.long
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


def err(module, change):
    """Change the gradient, or what the first block puts out, until the handle is removed."""
    return module.blocks[0].register_forward_hook(lambda block, inputs, output: change(output))


def nan_loss(output):
    return output * math.nan


def inf_gradient(output):
    output.register_hook(lambda grad: grad * math.inf)
    return output


def spike(output):
    output.register_hook(lambda grad: grad * 1e4)
    return output


def state_of(engine):
    """Everything that a step may change, as bytes."""
    saved = snapshot(engine.deepspeed, 0, 1)
    parts = [part for fragment in saved["fragments"].values() for part in fragment.values()]
    parts += engine.statistics_and_scale()["statistics"].values()
    return [saved["step"], *(torch.as_tensor(part).numpy().tobytes() for part in parts)]


@pytest.mark.parametrize(
    ("zero_stage", "precision"),
    [
        *((zero_stage, "fp32") for zero_stage in range(4)),
        pytest.param(1, "bf16", marks=pytest.mark.slow),
        (2, "bf16"),
        (3, "bf16"),
    ],
)
@pytest.mark.parametrize("fault", [nan_loss, inf_gradient, spike])
def test_a_bad_step_changes_nothing_and_the_next_one_goes_on(
    engine, batch, fault, zero_stage, precision
):
    made = engine(
        *options(zero_stage, precision, spike="skip", window=4, threshold=50),
        "model.ffn.feedback={}",
    )
    guard = made.guard
    for step in range(5):
        made.step(batch(step).tokens, batch(step).targets, step)
        assert guard.trouble is None
    before = state_of(made)
    handle = err(made.module, fault)
    made.step(batch(5).tokens, batch(5).targets, 5)
    handle.remove()
    assert state_of(made) == before
    assert (guard.skipped, guard.in_a_row) == (1, 1)
    assert guard.spiked == (fault is spike)
    assert guard.trouble.endswith("spike" if guard.spiked else "not finite")
    made.step(batch(6).tokens, batch(6).targets, 6)
    assert guard.trouble is None
    assert (guard.skipped, guard.in_a_row) == (1, 0)
    assert state_of(made) != before


def test_a_resumed_guard_judges_as_the_one_that_was_saved(engine, batch):
    settings = options(1, spike="skip", window=3, threshold=50)
    made, resumed = engine(*settings), engine(*settings)
    for step in range(4):
        made.step(batch(step).tokens, batch(step).targets, step)
    state = json.loads(json.dumps(made.guard.state()))
    assert len(state["window"]) == 3
    resumed.guard.load(state)
    assert resumed.guard.state() == made.guard.state()
    err(resumed.module, spike)
    resumed.step(batch(4).tokens, batch(4).targets, 4)
    assert resumed.guard.spiked  # with the window that it was given


def test_a_rollback_to_before_bad_steps_does_not_end_their_count(engine, batch):
    made = engine(*options(1))
    handle = err(made.module, nan_loss)
    made.step(batch(0).tokens, batch(0).targets, 8)
    handle.remove()
    made.step(batch(1).tokens, batch(1).targets, 4)  # taken back to step 4
    assert made.guard.in_a_row == 1
    made.step(batch(2).tokens, batch(2).targets, 8)
    assert made.guard.in_a_row == 0


COMPARING = """
import os, torch
from sparse_gpt.train.distributed import join_world
from sparse_gpt.train.guard import RunStopped, compare_replicas

world = join_world()
torch.manual_seed(0)
module = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4).to(torch.bfloat16))
compare_replicas(module, world, 1)
if world.rank == 1:
    module[1].weight.data.view(torch.int16)[2, 3] ^= 1
try:
    compare_replicas(module, world, 2)
except RunStopped as stopped:
    print(stopped)
os._exit(0)
"""


def test_the_rank_that_differs_from_most_is_named():
    first, *others = run_on_ranks(COMPARING, world_size=3)
    what, suspects = first.split("; suspect ")
    assert what == "step 2: 1.weight differ in their bits between replicas"
    assert suspects.startswith("rank 1 (")
    assert "rank 0" not in first
    assert others == [first, first]
