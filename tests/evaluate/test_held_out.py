"""Held-out loss of a checkpoint: the run's own number, by data set, in bits a byte."""

import errno
import json
import math
import shutil

import numpy as np
import pytest
import torch
import yaml
from one_rank import train_here, world  # noqa: F401 - fixtures
from other_file_systems import where_refused
from ranks import ROOT

from sparse_gpt import GPT
from sparse_gpt.data import load_tokenizer, open_shards, prepare
from sparse_gpt.evaluate.checkpoint import load_trained
from sparse_gpt.evaluate.held_out import evaluate
from sparse_gpt.train.metrics_file import read_metrics


def evaluated(command, *arguments):
    done = command("evaluate", *map(str, arguments), "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)["held_out"]


def recorded(run, step):
    return next(row["val/loss"] for row in read_metrics(run) if row["step"] == step)


@pytest.mark.parametrize(
    "ffn", ["dense", "default", "light", pytest.param("paper", marks=pytest.mark.long)]
)
def test_the_loss_is_the_runs_own(command, train_here, tmp_path, ffn):  # noqa: F811
    train_here("duration.steps=2", f"model.ffn={ffn}")
    run = tmp_path / "run"
    [found] = evaluated(command, run)
    assert found["loss"] == pytest.approx(recorded(run, 2), rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert (found["checkpoint"], found["tokens"]) == (f"{run}@2", 1024)
    assert found["bits_per_byte"] < 8


def test_a_step_has_its_own_checkpoint_and_several_make_a_table(command, run):
    first, last = evaluated(command, f"{run}@2", run)
    assert [first["checkpoint"], last["checkpoint"]] == [f"{run}@2", f"{run}@4"]
    for found, step in ((first, 2), (last, 4)):
        assert found["loss"] == pytest.approx(recorded(run, step), rel=1e-6)
    table = command("evaluate", str(run), f"{run}@2").stdout
    assert f"{first['loss']:.4f}" in table
    assert f"{last['loss']:.4f}" in table


def test_bits_a_byte_count_the_bytes_of_the_text(command, run, shards):
    """Of the whole held-out split, which windows read from its second token on."""
    [found] = evaluated(command, run, "--data", shards)
    split, tokenizer = open_shards(shards).held_out, load_tokenizer(shards.parent / "bpe")
    ids = np.empty((1, found["tokens"] + 1), split.dtype)
    split.read(np.zeros(1, np.int64), ids)
    text = tokenizer.decode(ids[0, 1:]).replace("<|endoftext|>", "")
    assert found["bytes"] == len(text.encode())
    bits = found["loss"] * found["tokens"] / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"])


@pytest.mark.parametrize("count", [2, 3])
def test_devices_share_the_work_and_the_result_is_the_same(run, shards, count):
    trained = load_trained(str(run))
    [alone] = evaluate(trained, [str(shards)])
    [shared] = evaluate(trained, [str(shards)], devices=[torch.device("cpu")] * count)
    assert shared.loss == pytest.approx(alone.loss, rel=1e-6)
    assert (shared.tokens, shared.bytes) == (alone.tokens, alone.bytes)


def test_without_the_vocabulary_there_are_no_bits(command, run):
    (run / "vocab.tiktoken").unlink()
    [found] = evaluated(command, run)
    assert found["bytes"] is found["bits_per_byte"] is None
    assert found["loss"] == pytest.approx(recorded(run, 4), rel=1e-6)


def test_each_data_set_has_its_row_and_together_they_are_the_whole(command, run, shards, pair):
    data = [word for folder in (*pair, shards) for word in ("--data", folder)]
    *parts, whole = evaluated(command, run, *data)
    assert [part["data"] for part in parts] == pair
    total = sum(part["loss"] * part["tokens"] for part in parts)
    assert total / sum(p["tokens"] for p in parts) == pytest.approx(whole["loss"], rel=1e-2)


def test_a_damaged_checkpoint_is_passed_over_and_refused_by_its_name(command, run):
    path = run / "checkpoints/step-00000004/rank-0.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    [found] = evaluated(command, run)
    assert found["checkpoint"] == f"{run}@2"
    done = command("evaluate", f"{run}@4")
    assert (done.returncode, done.stderr) == (
        2,
        f"error: {run}@4: has no whole checkpoint (steps tried: 4)\n",
    )


def test_bad_input_is_one_line(command, run, shards, tmp_path):
    other = tmp_path / "gpt2"
    prepare([str(ROOT / "data/novels/persuasion.txt")], other, separator="\nChapter ", held_out=0.2)
    empty = tmp_path / "none"
    novel = str(ROOT / "data/novels/persuasion.txt")
    prepare([novel], empty, separator="\nChapter ", held_out=0, vocab=shards.parent / "bpe")
    for arguments, says in (
        (["runs/none"], "runs/none: is no run; give the folder of one, or FOLDER@STEP"),
        ([f"{run}@3"], f"{run}: has no checkpoint of step 3; there are: 2, 4"),
        ([f"{run}@x"], f"{run}: has no checkpoint of step x; there are: 2, 4"),
        ([run, "--data", other], f"{other}: has another vocabulary than {run} was trained in"),
        ([run, "--data", empty], "the split is empty"),
        ([run, "--data", tmp_path / "x"], f"{tmp_path / 'x'}"),
    ):
        done = command("evaluate", *map(str, arguments))
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert says in done.stderr


@pytest.mark.parametrize("what", ["evaluate", "inspect"])
def test_a_run_that_cannot_be_written_is_refused_before_anything_is_computed(
    command, run, monkeypatch, what
):
    monkeypatch.setattr(GPT, "forward", None)
    refused = dict.fromkeys(("access", "faccessat", "faccessat2"), errno.EROFS)
    done = where_refused(refused, lambda: command(what, str(run)))
    assert done.returncode == 2
    assert f"{run / 'evaluations'}: cannot be written" in done.stderr


def test_data_that_are_gone_are_said_to_be_the_runs(command, run, tmp_path):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["data"]["path"] = str(tmp_path / "moved")
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    done = command("evaluate", str(run))
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: the data of {run}: ")
    assert done.stderr.endswith("; name others with --data\n")


def test_a_folder_may_have_an_at_in_its_name(run, tmp_path):
    moved = tmp_path / "run@2"
    shutil.move(run, moved)
    assert load_trained(str(moved)).step == 4
    assert load_trained(f"{moved}@2").step == 2


def test_a_model_of_another_shape_is_refused(command, run):
    tree = yaml.safe_load((run / "config.yaml").read_text())
    tree["model"]["d_model"] = 64
    (run / "config.yaml").write_text(yaml.safe_dump(tree))
    done = command("evaluate", str(run))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "is not of the model in" in done.stderr


def test_it_is_in_evaluation_mode_and_moves_nothing(run, shards):
    trained = load_trained(str(run))
    assert not trained.model.training
    before = {key: value.clone() for key, value in trained.model.named_buffers()}
    with torch.no_grad():
        trained.model(torch.zeros(1, 8, dtype=torch.int64))
    assert all(torch.equal(before[k], v) for k, v in trained.model.named_buffers())
