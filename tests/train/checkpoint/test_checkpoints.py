"""Killed, stopped, moved to other ranks, out of disk: a run goes on as if nothing had happened."""

import signal
import subprocess
import sys

import pytest
import torch
from ranks import exact, finish, metrics, stage, start, start_ranks, until

from sparse_gpt.train.checkpoint.weights import load_weights
from sparse_gpt.train.metrics_file import read_metrics


def test_any_stage_and_world_size_take_over_from_any_other(run_file, tmp_path):
    """Stopped by a signal to one rank each time; the batches and losses stay those of one run.

    At a constant learning rate the steps do not depend on the length of the run, so that until its
    last part it has no end that a late signal could miss.
    """
    options = ("log={batch_hash: true}", "schedule.final_lr_ratio=1", "checkpoint.every=1000")
    moved, whole = tmp_path / "moved", tmp_path / "whole"
    reached = 0
    path = ((1, 2, 4), (3, 1, 8), (0, 2, 2), (2, 4, 4), (3, 2, 8))
    for zero_stage, world_size, micro_batch in path:
        last = (zero_stage, world_size) == (3, 2)
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
