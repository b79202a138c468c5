"""Killed, stopped, moved to other ranks, out of disk: a run goes on as if nothing had happened."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from ranks import exact, finish, metrics, stage, start, start_ranks, until

from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checkpoint.checkpoints import CheckpointError, Checkpoints
from sparse_gpt.train.checkpoint.manifest import TrainState, step_of, tag_of
from sparse_gpt.train.checkpoint.weights import load_weights
from sparse_gpt.train.checkpoint.zero_state import snapshot
from sparse_gpt.train.metrics_file import read_metrics

_PATH = ((1, 2, 4), (3, 1, 8), (0, 2, 2), (2, 4, 4), (3, 2, 8))  # ZeRO stage, ranks, micro-batch


@pytest.mark.parametrize("path", [_PATH[:3], pytest.param(_PATH, marks=pytest.mark.long)])
def test_any_stage_and_world_size_take_over_from_any_other(run_file, tmp_path, path):
    """Stopped by a signal to one rank each time; the batches and losses stay those of one run.

    At a constant learning rate the steps do not depend on the length of the run, so that until its
    last part it has no end that a late signal could miss.
    """
    options = ("log={batch_hash: true}", "schedule.final_lr_ratio=1", "checkpoint.every=1000")
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    reached = 0
    for part in path:
        zero_stage, world_size, micro_batch = part
        last = part == path[-1]
        steps = f"duration.steps={reached + 4 if last else 100_000}"
        overrides = (steps, stage(zero_stage), f"batch.micro_batch={micro_batch}")
        ranks = start_ranks(
            run_file, *options, *overrides, f"run_dir={moved}", world_size=world_size
        )
        if last:
            finish(ranks)
            break
        rows = reached + 2
        until(lambda at=rows: any(row["step"] >= at for row in read_metrics(moved)), ranks[0])
        ranks[-1].send_signal(signal.SIGTERM if zero_stage % 2 else signal.SIGUSR1)
        outputs = [rank.communicate(timeout=300)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [75] * world_size, outputs
        assert "stopped on a signal after step" in outputs[0]
        reached = max(
            int(folder.name.split("-")[1]) for folder in (moved / "checkpoints").glob("step-*")
        )
    end = reached + 4
    finish(start_ranks(run_file, *options, f"duration.steps={end}", stage(1), f"run_dir={whole}"))
    one, other = metrics(whole), metrics(moved)
    assert [row["step"] for row in other] == list(range(end + 1))
    for a, b in zip(one[1:], other[1:], strict=True):
        assert a.get("data/batch_hash") == b.get("data/batch_hash")
        assert a.get("train/loss") == pytest.approx(b.get("train/loss"), rel=1e-4)
    weights = [load_weights(run / f"checkpoints/step-{end:08}") for run in (whole, moved)]
    # By norm, of all together: a token near its threshold moves TokenFeedback's few weights.
    one, other = (torch.cat([found[name] for name in sorted(found)]) for found in weights)
    assert (one - other).norm() <= 1e-2 * one.norm()


def test_a_full_disk_stops_nothing(run_file, small_disk):
    small_disk.resize(64)
    run_dir, log = small_disk.folder / "run", run_file.parent / "output"
    latest = run_dir / "checkpoints/latest"
    command = [sys.executable, "-m", "sparse_gpt", "train", run_file, f"run_dir={run_dir}"]
    command += ["duration.steps=100000", "model.n_layer=1", "checkpoint.keep_last=1"]
    with log.open("w") as file:
        process = start(command, stdout=file, stderr=subprocess.STDOUT)
    until(latest.exists, process)

    def full():
        small_disk.fill()  # also with the room of a checkpoint that was removed since
        return "could not be written by rank 0" in log.read_text()

    until(full, process)
    kept = latest.read_text()
    assert (latest.parent / kept / "manifest.json").exists()
    small_disk.empty()
    until(lambda: latest.read_text() > kept, process)
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=300)
    steps = [row["step"] for row in metrics(run_dir)]
    assert steps == list(range(len(steps)))


def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_used(run_file):
    finish(start_ranks(run_file))
    before = exact(run_file.parent / "run")
    checkpoints = run_file.parent / "run/checkpoints"
    victim = max((checkpoints / "step-00000016").iterdir(), key=lambda path: path.stat().st_size)
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    (checkpoints / "damaged-step-00000016").mkdir()  # damaged before, and trained again since
    (checkpoints / "damaged-step-00000016/rank-7.pt").touch()
    outputs = finish(start_ranks(run_file))
    assert f"{victim.name} is damaged; set aside" in "".join(outputs)  # the rank that read it
    assert "step 13/16" in outputs[0]
    assert "step 12/16" not in outputs[0]
    assert exact(run_file.parent / "run") == before
    assert (checkpoints / "damaged-step-00000016" / victim.name).read_bytes() == data
    assert (checkpoints / "latest").read_text() == "step-00000016"


@pytest.fixture
def checkpoints(engine, tmp_path):
    """Opens the checkpoints of a run in this process, with an engine of its own."""

    def make(*overrides):
        return Checkpoints(tmp_path / "checkpoints", engine(*overrides), {"config_hash": "c"})

    return make


def train_to(checkpoints, batch, start, end, stop_at=None):
    """Steps as the loop takes them; the step at which it was to stop, if it was."""
    for step in range(start, end):
        checkpoints.engine.step(batch(step).tokens, batch(step).targets, step)
        state = TrainState(step + 1, 16 * (step + 1), checkpoints.engine.guard.state())
        if checkpoints.after_step(state, step + 1 == end, step + 1 == stop_at):
            return step + 1
    return None


def steps_of(checkpoints):
    return sorted(step_of(path.name) for path in checkpoints.root.glob("step-*"))


def test_it_is_saved_when_due_and_what_is_old_goes(checkpoints, batch):
    made = checkpoints("checkpoint={every: 2, keep_last: 2, keep_every: 6, at: [3]}")
    train_to(made, batch, 0, 5)
    copy = made.root / "step-00000004-backup"  # somebody's
    shutil.copytree(made.root / tag_of(4), copy)
    train_to(made, batch, 5, 13)
    shutil.rmtree(copy)
    assert steps_of(made) == [3, 6, 12, 13]
    assert (made.root / "latest").read_text() == "step-00000013"
    assert not list(made.root.glob(".*"))


def test_what_is_loaded_is_what_was_saved(checkpoints, batch):
    made, other = checkpoints(stage(1)), checkpoints(stage(3), "seed=1")
    train_to(made, batch, 0, 5)
    before = torch.get_rng_state()
    torch.rand(3)
    assert other.load_newest() == TrainState(5, 80, made.engine.guard.state())
    assert torch.equal(torch.get_rng_state(), before)
    saved = [snapshot(each.engine.deepspeed, 0, 1)["fragments"] for each in (made, other)]
    for name, fragment in saved[0].items():
        assert torch.equal(fragment["exp_avg_sq"], saved[1][name]["exp_avg_sq"])
        assert torch.equal(fragment["master"], saved[1][name]["master"])
    statistics = [each.engine.statistics_and_scale() for each in (made, other)]
    torch.testing.assert_close(*statistics, rtol=0, atol=0)
    [*moves] = (value for name, value in statistics[0]["statistics"].items() if "moves" in name)
    assert any(any(each) for each in moves)


def test_a_new_run_begins_at_nothing(checkpoints):
    assert checkpoints().load_newest() == TrainState()


def test_a_stop_is_a_checkpoint_of_the_step_at_which_all_ranks_know(checkpoints, batch):
    made = checkpoints("checkpoint.every=1000")
    assert train_to(made, batch, 0, 20, stop_at=7) == 8
    assert steps_of(made) == [8]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").unlink(),
        lambda folder: (folder / "manifest.json").write_text("{}"),
        lambda folder: (folder / "rank-0.pt").unlink(),
        lambda folder: (folder / "rank-0.pt").write_bytes(b""),
        lambda folder: os.truncate(folder / "rank-0.pt", 10_000),
    ],
)
def test_the_newest_that_is_whole_is_loaded(checkpoints, batch, capsys, damage):
    made = checkpoints("checkpoint={every: 2, keep_last: 3}")
    train_to(made, batch, 0, 6)
    damage(made.root / "step-00000006")
    assert checkpoints().load_newest().step == 4
    assert steps_of(made) == [2, 4]
    assert (made.root / "damaged-step-00000006").is_dir()
    assert "set aside, trying the one before" in capsys.readouterr().err


def unreadable(path):
    """A link to itself: what is there cannot be opened, by root neither."""
    path.rename(path.with_name("kept"))
    path.symlink_to(path)


def gone(path):
    """As where a link leads to a mount that is not there."""
    path.rename(path.with_name("kept"))
    path.symlink_to("nowhere")


@pytest.mark.parametrize("hide", [unreadable, gone])
@pytest.mark.parametrize("what", ["", "step-00000004", "step-00000004/manifest.json"])
def test_what_cannot_be_read_now_stops_the_run_and_stays(checkpoints, batch, hide, what):
    made = checkpoints("checkpoint={every: 2, keep_last: 3}")
    train_to(made, batch, 0, 4)
    hide(made.root / what)
    with pytest.raises(
        ConfigError, match=rf"{what}.*cannot be read now: \w.*nothing was set aside"
    ):
        checkpoints().load_newest()
    assert not list(made.root.parent.rglob("damaged-*"))
    path = made.root / what
    path.unlink()
    path.with_name("kept").rename(path)
    assert checkpoints().load_newest().step == 4


def test_a_run_that_had_checkpoints_does_not_begin_anew_by_itself(checkpoints, batch):
    made = checkpoints("checkpoint={every: 2, keep_last: 1}")
    train_to(made, batch, 0, 4)
    (made.root / "step-00000004/rank-0.pt").write_bytes(b"")
    for _ in range(2):  # as well when it was set aside before
        with pytest.raises(ConfigError, match="there were checkpoints, and none of them is whole"):
            checkpoints().load_newest()
    assert (made.root / "damaged-step-00000004").is_dir()


def test_that_of_another_model_is_refused(checkpoints, batch):
    train_to(checkpoints(), batch, 0, 4)
    with pytest.raises(ConfigError, match="step-00000004: is not of this model"):
        checkpoints("model.n_layer=3").load_newest()
    with pytest.raises(ConfigError, match="step-00000004: is not of this model"):
        checkpoints("model.d_model=64").load_newest()


def test_one_that_fails_is_tried_again_and_the_last_must_be_written(checkpoints, capsys):
    made = checkpoints("checkpoint={every: 50, keep_last: 9}")
    made.root.touch()  # in the way of the folder
    for step in range(1, 70):
        if step == 58:
            made.root.unlink()
        made.after_step(TrainState(step, 16 * step), last=False, stop=False)
        until_written(made)
    warned = re.findall(r"step-(\d+) could not be written by rank 0", capsys.readouterr().err)
    assert list(map(int, warned)) == [50, 55]
    assert steps_of(made) == [60]
    shutil.rmtree(made.root)
    made.root.touch()
    with pytest.raises(CheckpointError, match=r"00070: the last checkpoint could not be written"):
        made.after_step(TrainState(70, 16 * 70), last=True, stop=False)


def until_written(checkpoints):
    while checkpoints.writing:
        time.sleep(0.001)
