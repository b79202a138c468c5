"""Training under real ranks: what a run leaves behind, and that kills change nothing."""

import json
import math
import os
import re
import shutil
import signal
import subprocess

import pytest
import torch
import yaml
from ranks import EXACT, ROOT, exact, finish, metrics, sparse_gpt, start_ranks, until
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tracked import INSTALLED, READ_BACK, in_tensorboard

from sparse_gpt.data import Batch, prepare
from sparse_gpt.errors import ConfigError
from sparse_gpt.train import loop
from sparse_gpt.train.feed import open_data
from sparse_gpt.train.guard import RunStopped
from sparse_gpt.train.loop import batch_hash, validate
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.preemption import Preempted


def test_a_run_under_the_deepspeed_launcher_leaves_everything_section_7_names(gpt2_run_file):
    done = sparse_gpt("train", gpt2_run_file, "--devices", "2", "model.ffn.feedback={}")
    assert done.returncode == 0, done.stderr
    run_dir = gpt2_run_file.parent / "run"

    lines = [line for line in done.stdout.splitlines() if line.startswith("step")]
    assert len(lines) == 17  # one a step, and the validation before the first
    shape = r"step 16/16  loss \S+  lr \S+  grad \S+  \S+ tok/s  \S+ TFLOP/s  ETA 0:00:00  .*\d$"
    assert re.match(shape, lines[-1])

    rows = metrics(run_dir)
    assert [row["step"] for row in rows] == list(range(17))
    assert rows[-1]["train/loss"] < rows[1]["train/loss"] - 0.5
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.5

    board = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0})
    board.Reload()
    tags = set(board.Tags()["scalars"])
    parts = ("norm_in", "spectral", "feedback", "projection")
    components = ["ln_1", "attention", *(f"ffn.{part}" for part in parts)]
    assert {
        *EXACT,
        *(f"perf/{name}" for name in ("tokens_per_second", "tflops", "step_ms", "data_wait_ms")),
        "memory/rss_gb",
        *("compute/train_loss", "compute/val_loss"),
        *(f"{kind}/block_01/{name}" for kind in ("flops", "time") for name in components),
        "flops/block_00/vs_dense",
        *("sparsity/block_00/ffn.spectral", "sparsity/block_01/ffn.feedback"),
        *(f"routing/block_01/{name}" for name in ("load_max_over_mean", "dead_blocks")),
        "routing/block_00/energy_entropy",
    } <= tags
    assert "perf/mfu" not in tags  # a CPU has no peak that we know
    assert {"custom_scalars__config__", "_hparams_/session_start_info"} <= {
        *board.summary_metadata,
    }
    assert board.Scalars("sparsity/block_00/ffn.spectral")[0].value == 2 / 64
    assert 1 < rows[-1]["routing/block_00/load_max_over_mean"] < 64
    assert 0 <= rows[-1]["routing/block_00/dead_blocks"] < 64
    entropies = [event.value for event in board.Scalars("routing/block_01/energy_entropy")]
    assert len(entropies) == 4  # of the sampled steps
    assert all(0 < value < math.log(64) for value in entropies)
    gflops = [event.step for event in board.Scalars("compute/train_loss")]
    assert gflops == [round(row["gflops"]) for row in rows if "train/loss" in row]

    [start] = json.loads((run_dir / "provenance.json").read_text())["starts"]
    assert (start["step"], start["hardware"]["world_size"]) == (0, 2)
    assert start["versions"]["deepspeed"]
    assert (run_dir / "checkpoints/latest").read_text() == "step-00000016"
    assert not list((run_dir / "checkpoints").glob(".*"))

    again = sparse_gpt("train", gpt2_run_file, "--devices", "2", "model.ffn.feedback={}")
    assert again.returncode == 0, again.stderr
    assert "this run is finished" in again.stdout
    assert metrics(run_dir) == rows


LONG_ZERO = (
    *(f"stage: {stage}" for stage in range(4)),
    *(f"stage: {stage}, offload_optimizer: {{device: cpu}}" for stage in (1, 2)),
    "stage: 3, offload_optimizer: {device: cpu}, offload_param: {device: cpu}",
)


@pytest.mark.parametrize(
    ("zero", "precision"),
    [
        ("stage: 1", "bf16"),
        *(pytest.param(zero, "fp32", marks=pytest.mark.long) for zero in LONG_ZERO),
    ],
)
def test_a_killed_run_goes_on_bit_equal(run_file, tmp_path, zero, precision):
    """Dropout, running statistics and every tracker included. All stages: test_engine.py.

    At a constant learning rate the steps do not depend on the length of the run: the one that is
    killed has no end that it could reach before.
    """
    options = (
        f"precision={precision}",
        f"deepspeed={{zero_optimization: {{{zero}}}}}",
        "model.dropout=0.1",
        "model.ffn.dropout=0.1",
        "model.ffn.feedback={}",
        "batch={global_tokens: 256, micro_batch: 2}",
        "checkpoint.every=8",
        "schedule.final_lr_ratio=1",
        f"log.trackers=[{', '.join(INSTALLED)}]",
    )
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    ranks = start_ranks(run_file, *options, "duration.steps=100000", f"run_dir={cut}")
    until((cut / "checkpoints/step-00000008").exists, ranks[0])
    for rank in ranks:
        rank.send_signal(signal.SIGKILL)
    for rank in ranks:
        rank.communicate()
    reached = read_metrics(cut)[-1]["step"]

    end = f"duration.steps={reached + 4}"
    finish(start_ranks(run_file, *options, end, f"run_dir={cut}"))
    finish(start_ranks(run_file, *options, end, f"run_dir={whole}"))
    assert exact(cut) == exact(whole)
    assert [row["step"] for row in metrics(cut)] == list(range(reached + 5))
    first, second = json.loads((cut / "provenance.json").read_text())["starts"]
    assert first["step"] == 0
    assert second["step"] in range(8, reached + 1, 8)  # the newest checkpoint that was whole

    drawn = in_tensorboard(cut)
    assert len(drawn["train/loss"]) == reached + 4
    for tracker in INSTALLED:
        found = READ_BACK[tracker](cut)
        assert found.keys() == drawn.keys(), tracker
        for tag, points in drawn.items():
            assert found[tag] == [(at, pytest.approx(value)) for at, value in points], (
                tracker,
                tag,
            )


def test_documents_are_masked_the_same_on_any_ranks(run_file, shards, tmp_path):
    """Each paragraph is a document, so that most rows hold several."""
    novels = sorted((ROOT / "data/novels").glob("*.txt"))
    paragraphs = tmp_path / "paragraphs"
    vocab = shards.with_name("bpe")
    prepare(novels, paragraphs, separator="\n\n", held_out=0.1, vocab=vocab, progress=False)
    masked = (f"data.path={paragraphs}", "model.document_mask=true", "duration.steps=12")
    finish(start_ranks(run_file, *masked, f"run_dir={tmp_path / 'two'}"))
    finish(start_ranks(run_file, *masked, f"run_dir={tmp_path / 'one'}", world_size=1))
    finish(start_ranks(run_file, masked[0], masked[2], f"run_dir={tmp_path / 'unmasked'}"))
    two, one, unmasked = (
        [row["val/loss"] for row in metrics(tmp_path / name) if "val/loss" in row]
        for name in ("two", "one", "unmasked")
    )
    assert one == pytest.approx(two, rel=1e-5)
    assert unmasked != pytest.approx(two, rel=5e-5)


def test_losses_do_not_depend_on_world_size_or_grad_accum(gpt2_run_file, tmp_path):
    """Nor does the balance of blocks. And the learning rate is the schedule's."""
    tree = yaml.safe_load(gpt2_run_file.read_text())
    tree["schedule"] = {"kind": "wsd", "warmup_steps": 4, "final_lr_ratio": 0.0}
    gpt2_run_file.write_text(yaml.safe_dump(tree))
    losses, blocks = {}, {}
    for world_size, micro_batch in ((1, 16), (2, 2)):
        run_dir = tmp_path / f"{world_size}-{micro_batch}"
        options = (f"run_dir={run_dir}", f"batch.micro_batch={micro_batch}")
        finish(start_ranks(gpt2_run_file, *options, world_size=world_size))
        losses[world_size] = exact(run_dir)
        blocks[world_size] = moves(run_dir / "checkpoints/step-00000012")
    rates = [row.get("train/learning_rate") for row in metrics(run_dir)][1:]
    assert rates[:5] == pytest.approx([7.5e-4, 1.5e-3, 2.25e-3, 3e-3, 3e-3])
    assert rates[-1] == 0.0
    for step, row in losses[1].items():
        for tag, a, b in zip(EXACT, row, losses[2][step], strict=True):
            # A token that is undecided to the last bit may get another block, and β follow it.
            near = 2e-4 if tag == "train/grad_norm" else 5e-5
            assert a == b == None or a == pytest.approx(b, rel=near)  # noqa: E711
    apart = blocks[1] - blocks[2]
    assert apart.abs().max() <= 1  # where a block had its share but for a token that is undecided
    assert apart.count_nonzero() < 0.05 * blocks[1].count_nonzero()


def moves(checkpoint):
    """Those of all dictionaries, as one tensor; all ranks saved the same."""
    found = [
        torch.load(file, weights_only=True)["engine"]["statistics"]
        for file in sorted(checkpoint.glob("rank-*.pt"))
    ]
    every = [torch.cat([of[name] for name in sorted(of) if "moves" in name]) for of in found]
    assert all(torch.equal(one, every[0]) for one in every)
    return every[0]


@pytest.mark.long
def test_half_precision_trains(gpt2_run_file):
    finish(
        start_ranks(gpt2_run_file, "precision=bf16", "deepspeed={zero_optimization: {stage: 2}}")
    )
    rows = metrics(gpt2_run_file.parent / "run")
    assert rows[-1]["val/loss"] < rows[0]["val/loss"] - 0.5


def test_a_run_learns_leaves_its_files_and_goes_on_bit_equal(train_here, tmp_path):
    """In this process, from its checkpoint; at a constant learning rate the steps do not depend on
    the length of the run."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    options = ("schedule.final_lr_ratio=1", "model.dropout=0.1", "model.ffn.feedback={}")
    train_here(*options, "duration.steps=12", f"run_dir={whole}")
    rows = metrics(whole)
    assert [row["step"] for row in rows] == list(range(13))
    assert rows[-1]["train/loss"] < rows[1]["train/loss"] - 0.3
    assert [row["step"] for row in rows if "val/loss" in row] == [0, 8, 12]
    assert [row["step"] for row in rows if "time/block_00/attention" in row] == [1, 5, 9]
    names = {"config.yaml", "provenance.json", "metrics.jsonl", "tensorboard", "checkpoints"}
    names.add("vocab.tiktoken")
    assert {path.name for path in whole.iterdir()} == names
    assert (whole / "checkpoints/latest").read_text() == "step-00000012"

    train_here(*options, "duration.steps=6", f"run_dir={cut}")
    train_here(*options, "duration.steps=12", f"run_dir={cut}")
    cut_rows = exact(cut)
    cut_rows[6][-1] = None  # the short run ends there, and validates
    assert cut_rows == exact(whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_checkpoint_at_the_end_of_the_step(train_here, tmp_path, monkeypatch, number):
    run_dir = tmp_path / "run"
    hashed = loop.batch_hash

    def told(*arguments):
        if len(read_metrics(run_dir)) == 3:
            os.kill(os.getpid(), number)
        return hashed(*arguments)

    monkeypatch.setattr(loop, "batch_hash", told)
    with pytest.raises(Preempted):
        train_here("log.batch_hash=true", "checkpoint.every=1000", "duration.steps=100")
    last = metrics(run_dir)[-1]["step"]
    assert last in (3, 4)  # the votes are counted a step later
    assert (run_dir / "checkpoints/latest").read_text() == f"step-{last:08}"


def read_only(folder):
    """Let nothing be made in it, by root neither."""
    (folder / "checkpoints").mkdir()
    for each in (folder / "checkpoints", folder):
        if subprocess.run(["chattr", "+i", each], capture_output=True).returncode:
            each.chmod(0o555)
    if os.access(folder / "checkpoints", os.W_OK):
        pytest.skip("root can write everywhere here")


LOSSES = {
    shutil.rmtree: "run: was deleted or moved away while it trained",
    lambda folder: folder.rename(folder.with_name("moved")): "run: was deleted or moved away",
    read_only: r"run/checkpoints/\.tmp-step-\d+: (Operation not permitted|Permission denied)",
}


@pytest.mark.parametrize("lose", LOSSES)
def test_a_run_whose_folder_is_lost_ends_in_a_line_and_makes_no_other(
    train_here, tmp_path, monkeypatch, lose
):
    run_dir = tmp_path / "run"
    hashed, kept = loop.batch_hash, []

    def losing(*arguments):
        if len(read_metrics(run_dir)) == 6:
            lose(run_dir)
            kept.extend(sorted(run_dir.rglob("*")))
        return hashed(*arguments)

    monkeypatch.setattr(loop, "batch_hash", losing)
    try:
        with pytest.raises(ConfigError, match=f"{LOSSES[lose]}.*; nothing more can be kept there"):
            train_here("log.batch_hash=true", "checkpoint.every=8", "duration.steps=100")
    finally:
        subprocess.run(["chattr", "-R", "-i", run_dir], capture_output=True)
    assert sorted(run_dir.rglob("*")) == kept


def test_a_run_that_ends_in_nan_has_failed(train_here, tmp_path):
    wild = ("duration.steps=3", "optimizer.lr=1e30", "optimizer.grad_clip=0.0")
    for _ in range(2):  # as well when it is started again at its end
        with pytest.raises(RunStopped, match="run: ended with a loss of nan: is the learning rate"):
            train_here(*wild)
    assert [row["step"] for row in read_metrics(tmp_path / "run")][-1] == 3


def test_validation_is_by_source_and_weighted_as_training_is(engine, blend_file, pair):
    made = engine()
    blend = open_data(made.config.data)
    found = validate(made.config, made, blend)
    one, other = (found[f"val/loss/{path.split('/')[-1]}"] for path in pair)
    assert one != other
    assert found["val/loss"] == pytest.approx(0.75 * one + 0.25 * other)


def test_validation_of_nothing_held_out_is_nothing(engine, shards, tmp_path):
    novel = ROOT / "data/novels/persuasion.txt"
    prepare([novel], tmp_path / "all", vocab=shards.parent / "bpe", held_out=0, progress=False)
    made = engine(f"data.path={tmp_path / 'all'}")
    assert validate(made.config, made, open_data(made.config.data)) == {}


def test_a_batch_has_one_hash_in_any_order_and_another_for_any_other_token(world, batch):
    whole = batch(3)
    expected = batch_hash(whole, world)
    assert 0 <= expected < 2**53
    rows = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert batch_hash(Batch(whole.windows[rows], whole.samples[rows]), world) == expected
    windows = whole.windows.to(torch.int64)
    windows[5, 7] ^= 1
    assert batch_hash(Batch(windows.to(torch.uint16), whole.samples), world) != expected
