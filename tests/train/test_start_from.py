"""A run from another's weights: equal at step 0, new from there on, sparse from dense, chained."""

import json

import pytest
import torch
import yaml
from one_rank import train_here, world  # noqa: F401 - fixtures
from ranks import sparse_gpt
from small_gpt2 import gpt2

from sparse_gpt.config.load import load_config
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.run_dir import read_provenance


@pytest.fixture
def source(train_here, tmp_path):  # noqa: F811
    """A dense run of 8 steps, with checkpoints after 4 and 8."""
    train_here("duration.steps=8", "model.ffn=dense", "eval.every=4")
    return tmp_path / "run"


@pytest.fixture
def again(train_here, tmp_path):  # noqa: F811
    """Trains another run from one, and gives its folder."""

    def train(start, *overrides):
        out = tmp_path / "again"
        named = (f"start_from={json.dumps(str(start))}", f"run_dir={out}")
        train_here("duration.steps=2", "model.ffn=dense", *named, *overrides)
        return out

    return train


def losses(run):
    return {row["step"]: row["val/loss"] for row in read_metrics(run) if "val/loss" in row}


@pytest.mark.parametrize("step", [4, 8])
def test_step_0_is_the_source_and_the_next_is_another(source, again, step):
    out = again(f"{source}@{step}" if step == 4 else source)
    assert losses(out)[0] == pytest.approx(losses(source)[step], rel=1e-6)
    assert losses(out)[2] != losses(source)[8]
    record = read_provenance(out)["started_from"]
    assert (record["run"], record["step"]) == (str(source), step)
    assert record["provenance"]["data_manifest_hash"] == read_provenance(out)["data_manifest_hash"]


def test_width_transfer_does_not_scale_what_was_learned(train_here, again, tmp_path):  # noqa: F811
    options = ("optimizer.width_transfer=true", "model.ffn={preset: dense, fan_in_init: true}")
    train_here("duration.steps=8", *options)
    out = again(tmp_path / "run", *options)
    assert losses(out)[0] == pytest.approx(losses(tmp_path / "run")[8], rel=1e-6)


@pytest.mark.parametrize("ffn", ["default", pytest.param("light", marks=pytest.mark.long)])
def test_a_sparse_run_from_a_dense_one_is_fitted_first(source, again, ffn):
    out = again(source, f"model.ffn={ffn}")
    fitted, dense, new = losses(out)[0], losses(source)[8], losses(source)[0]
    assert fitted - dense < 0.2 * (new - dense)


def test_a_resumed_run_does_not_start_again(source, again, tmp_path):
    out = again(source, "checkpoint.every=1", "duration.steps=1")
    (source / "config.yaml").unlink()  # what it started from is no longer needed
    out = again(source, "checkpoint.every=1", "duration.steps=2")
    assert [row["step"] for row in read_metrics(out)][-1] == 2
    assert read_provenance(out)["started_from"]["step"] == 8


@pytest.mark.long
def test_two_ranks_start_from_what_one_fits(source, again, run_file, tmp_path):
    alone = again(source, "model.ffn=default", "duration.steps=1")
    out = tmp_path / "on-2"
    words = ("model.ffn=default", "duration.steps=1", f"start_from={json.dumps(str(source))}")
    done = sparse_gpt("train", str(run_file), *words, f"run_dir={out}", "--devices", "2")
    assert done.returncode == 0, done.stderr
    assert "start_from: FFNs fitted" in done.stdout
    assert losses(out)[0] == pytest.approx(losses(alone)[0], rel=1e-5)


def test_a_gpt2_of_transformers_is_started_from(again, run_file, tmp_path):
    """Its loss on the same batch is transformers' own."""
    from sparse_gpt.train.feed import held_out, open_data

    sizes = {"vocab_size": 1024, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    theirs = gpt2(**sizes, initializer_range=0.1, activation_function="gelu_new")
    theirs.save_pretrained(tmp_path / "gpt2")
    out = again(tmp_path / "gpt2")
    config = load_config(run_file)
    split = open_data(config.data).sources[0].dataset.held_out
    total = count = 0.0
    with torch.no_grad():
        for batch in held_out(config, split, 1):
            logits = theirs(batch.tokens).logits.flatten(0, 1)
            total += torch.nn.functional.cross_entropy(
                logits, batch.targets.flatten(), reduction="sum"
            ).item()
            count += (batch.targets >= 0).sum().item()
    assert losses(out)[0] == pytest.approx(total / count, rel=1e-5)
    assert read_provenance(out)["started_from"] == {"transformers": str(tmp_path / "gpt2")}


def test_what_does_not_fit_is_named(command, source, run_file, tmp_path):
    sizes = {"vocab_size": 1024, "n_positions": 32, "n_embd": 32, "n_layer": 2, "n_head": 2}
    gpt2(**sizes, activation_function="relu").save_pretrained(tmp_path / "relu")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/config.json").write_text(json.dumps({"model_type": "llama"}))
    for words, says in (
        (["start_from=runs/none"], "runs/none: is no run"),
        ([f"start_from={source}@3"], f"{source}: has no checkpoint of step 3; there are: 4, 8"),
        ([f"start_from={source}", "model.d_model=64"], "has d_model 32, model 64"),
        ([f"start_from={source}", "model.n_layer=3"], "has n_layer 2, model 3"),
        ([f"start_from={tmp_path / 'relu'}"], "activation_function is 'relu'"),
        ([f"start_from={tmp_path / 'other'}"], "it is a llama, not a GPT-2"),
    ):
        done = command("train", str(run_file), *words, f"run_dir={tmp_path / 'new'}", "--dry-run")
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert says in done.stderr
        assert not (tmp_path / "new").exists()


def test_a_sparse_source_is_of_the_same_ffn(command, train_here, run_file, tmp_path):  # noqa: F811
    train_here("duration.steps=1")
    tree = yaml.safe_load(run_file.read_text())
    tree |= {"start_from": str(tmp_path / "run"), "run_dir": str(tmp_path / "new")}
    for ffn in ("light", "dense"):
        tree["model"]["ffn"] = ffn
        run_file.write_text(yaml.safe_dump(tree))
        done = command("train", str(run_file), "--dry-run")
        assert done.returncode == 2
        assert "has another sparse FFN than model.ffn; set that one" in done.stderr
