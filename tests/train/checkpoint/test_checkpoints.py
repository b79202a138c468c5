"""Killed, stopped, moved to other ranks, out of disk: a run goes on as if nothing had happened."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import xxhash
from ranks import ENVIRONMENT, finish, metrics, start_ranks

from sparse_gpt.cluster.prove_resume import Proof
from sparse_gpt.train.checkpoint.manifest import read_manifest, write_manifest
from sparse_gpt.train.checkpoint.weights import load_weights
from sparse_gpt.train.metrics_file import read_metrics

DROPOUT = ("model.dropout=0.1", "model.ffn.dropout=0.1", "model.ffn.feedback={}")


def stage(number):
    return f"deepspeed={{zero_optimization: {{stage: {number}}}}}"


def wait_for(condition, ranks, seconds=240):
    deadline = time.monotonic() + seconds
    while not condition():
        assert ranks[0].poll() is None, ranks[0].communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def rewrite(change, field=None):
    """A function that changes the newest checkpoint, so that its hashes are right again."""

    def tamper(run_dir: Path) -> None:
        folder = max((run_dir / "checkpoints").glob("step-*"))
        manifest = read_manifest(folder)
        change(manifest)
        for name in manifest["files"]:
            content = torch.load(folder / name, weights_only=True)
            if field is not None:
                field(content)
            torch.save(content, folder / name)
            digest = xxhash.xxh3_128_hexdigest((folder / name).read_bytes())
            manifest["files"][name] = digest
        write_manifest(folder, manifest)

    return tamper


def nothing(_):
    pass


def skip_a_batch(manifest):
    manifest["samples"] += 16


def other_random_numbers(content):
    content["rng"]["cpu"] = torch.Generator().manual_seed(7).get_state()


def forgotten_moments(content):
    for fragment in content["fragments"].values():
        fragment["exp_avg"].zero_()


@pytest.mark.long
def test_resume_is_proved_and_tampering_found(run_file, tmp_path, monkeypatch):
    """ZeRO 1 and 2: test_train.py, without the launcher; ZeRO 0: test_sweep.py."""
    monkeypatch.setattr("os.environ", ENVIRONMENT)
    proof = Proof(run_file, [*DROPOUT, stage(3)], tmp_path / "proof", steps=12, ranks=2)
    proof.train()
    cut = proof.resumed("cut", 2)
    assert cut.holds, cut
    for change in (skip_a_batch, other_random_numbers, forgotten_moments):
        fields = (change, None) if change is skip_a_batch else (nothing, change)
        tampered = proof.resumed(change.__name__, 2, between=rewrite(*fields))
        assert not tampered.holds, change
        # The first loss is of the weights as they were; the update after it needs the moments.
        assert tampered.first_difference == (14 if change is forgotten_moments else 13)
        assert tampered.same_tokens == (change is not skip_a_batch)


def test_any_stage_and_world_size_take_over_from_any_other(run_file, tmp_path):
    """Stopped by a signal to one rank each time; the batches and losses stay those of one run."""
    log = "log={batch_hash: true}"
    finish(start_ranks(run_file, log, "duration.steps=60", stage(1), f"run_dir={tmp_path / 'one'}"))
    moved = tmp_path / "moved"
    options = (log, "duration.steps=60", "checkpoint.every=1000", f"run_dir={moved}")
    reached = 0
    path = ((1, 2, 4), (3, 1, 8), (0, 2, 2), (2, 4, 4), (3, 2, 8))
    for zero_stage, world_size, micro_batch in path:
        overrides = (*options, stage(zero_stage), f"batch.micro_batch={micro_batch}")
        ranks = start_ranks(run_file, *overrides, world_size=world_size)
        if (zero_stage, world_size) == (3, 2):
            finish(ranks)
            break
        rows = reached + 2
        wait_for(lambda at=rows: any(row["step"] >= at for row in read_metrics(moved)), ranks)
        ranks[-1].send_signal(signal.SIGTERM if zero_stage % 2 else signal.SIGUSR1)
        outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
        assert [rank.returncode for rank in ranks] == [75] * world_size, outputs
        assert "stopped on a signal after step" in outputs[0]
        reached = max(
            int(folder.name.split("-")[1]) for folder in (moved / "checkpoints").glob("step-*")
        )
    one, other = metrics(tmp_path / "one"), metrics(moved)
    assert [row["step"] for row in other] == list(range(61))
    for a, b in zip(one[1:], other[1:], strict=True):
        assert a.get("data/batch_hash") == b.get("data/batch_hash")
        assert a.get("train/loss") == pytest.approx(b.get("train/loss"), rel=1e-4)
    weights = [load_weights(run / "checkpoints/step-00000060") for run in (tmp_path / "one", moved)]
    # By norm, of all together: a token near its threshold moves TokenFeedback's few weights.
    one, other = (torch.cat([found[name] for name in sorted(found)]) for found in weights)
    assert (one - other).norm() <= 1e-2 * one.norm()


def test_a_flipped_bit_in_a_manifest_is_found(tmp_path):
    manifest = {"step": 40, "samples": 640, "guard": {"norms": [0.5, 1.25]}, "files": {"a": "1f"}}
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    path = tmp_path / "manifest.json"
    whole = path.read_bytes()
    for bit in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        assert read_manifest(tmp_path) is None, bit


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 64 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    if (done := subprocess.run(mount, capture_output=True, text=True)).returncode:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_a_full_disk_stops_nothing(run_file, small_disk):
    run_dir, filler = small_disk / "run", small_disk / "filler"
    checkpoints = run_dir / "checkpoints"
    output = (run_file.parent / "output").open("w+")
    command = [sys.executable, "-m", "sparse_gpt", "train", str(run_file), f"run_dir={run_dir}"]
    command += ["duration.steps=100000", "model.n_layer=1", "checkpoint.keep_last=1"]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=output, stderr=output)
    wait_for(lambda: (checkpoints / "latest").exists(), [process])
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1 << 16))
        except OSError:
            pass

    def said():
        return (run_file.parent / "output").read_text()

    wait_for(lambda: "could not be written by rank 0" in said(), [process])
    kept = (checkpoints / "latest").read_text()
    assert (checkpoints / kept / "manifest.json").exists()
    filler.unlink()
    wait_for(lambda: (checkpoints / "latest").read_text() > kept, [process])
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=60)
    steps = [row["step"] for row in metrics(run_dir)]
    assert steps == list(range(len(steps)))
