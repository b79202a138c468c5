"""The proof holds, and finds a resume that is not exact."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import xxhash
from ranks import ENVIRONMENT, stage

from sparse_gpt.cluster.prove_resume import Comparison, Proof
from sparse_gpt.cluster.prove_resume import _compare as compare
from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checkpoint.manifest import read_manifest, write_manifest
from sparse_gpt.train.metrics_file import read_metrics

DROPOUT = ("model.dropout=0.1", "model.ffn.dropout=0.1", "model.ffn.feedback={}")


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
    """ZeRO 1 and 2: train/test_loop.py, without the launcher; ZeRO 0: sweep/test_sweep.py."""
    monkeypatch.setattr("os.environ", ENVIRONMENT)
    # Steps that validate are slow enough for the kill to come before the end.
    slow = "eval={every: 1, max_tokens: 8192}"
    proof = Proof(run_file, [*DROPOUT, stage(3), slow], tmp_path / "proof", steps=12, ranks=2)
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


def comparison(**changes):
    usual = {"same_tokens": True, "first_difference": None, "loss": 0.0, "weights": 0.0}
    return Comparison("cut", (2, 2), True, 12, **(usual | changes))


@pytest.mark.parametrize(
    ("changes", "exact", "elastic"),
    [
        ({}, True, True),
        ({"same_tokens": False}, False, False),
        ({"first_difference": 13}, False, True),
        ({"loss": 0.9e-3, "weights": 0.9e-3, "first_difference": 13}, False, True),
        ({"weights": 1e-12}, False, True),
        ({"loss": 1.1e-3}, True, False),
        ({"weights": 1.1e-3}, False, False),
    ],
)
def test_equal_ranks_must_be_exact_and_others_close(changes, exact, elastic):
    found = comparison(**changes)
    assert found.holds == exact
    assert replace(found, exact=False).holds == elastic


@pytest.fixture
def trained_both_ways(train_here, run_file, tmp_path):
    """A proof whose runs this process has trained: the whole one, and one cut at step 3."""
    proof = Proof(run_file, ["schedule.final_lr_ratio=1"], tmp_path / "proof", steps=3, ranks=1)
    train_here(*proof.settings, f"run_dir={proof.out / 'whole'}")
    train_here(*proof.settings, "duration.steps=3", f"run_dir={proof.out / 'cut'}")

    def resumed(*overrides):
        train_here(*proof.settings, *overrides, f"run_dir={proof.out / 'cut'}")
        return compare("cut", (1, 1), True, 3, proof.out / "whole", proof.out / "cut")

    return resumed, proof


def test_a_run_that_went_on_is_compared_with_the_whole_one(trained_both_ways):
    resumed, proof = trained_both_ways
    rows = (proof.out / "whole/metrics.jsonl").read_text()
    assert rows.count("data/batch_hash") == 6
    found = resumed()
    assert (found.same_tokens, found.loss, found.weights) == (True, 0, 0)
    assert found.first_difference == 3  # the run that was cut in this process validated there


@pytest.mark.parametrize(
    ("tamper", "first", "tokens"),
    [
        (rewrite(skip_a_batch), 4, False),
        (rewrite(nothing, forgotten_moments), 5, True),
    ],
)
def test_a_resume_that_is_another_run_is_found(trained_both_ways, tamper, first, tokens):
    resumed, proof = trained_both_ways
    tamper(proof.out / "cut")
    found = resumed()
    assert not found.holds
    assert found.same_tokens == tokens
    assert found.loss > 0
    assert found.weights > 0
    losses = [
        [row.get("train/loss") for row in read_metrics(proof.out / name)]
        for name in ("whole", "cut")
    ]
    differ = [step for step, (a, b) in enumerate(zip(*losses, strict=True)) if a != b]
    assert differ[0] == first


def test_a_folder_in_use_is_refused(run_file, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(ConfigError, match="is not empty; give a new folder with --out"):
        Proof(run_file, [], tmp_path, steps=3, ranks=1)
    with pytest.raises(ConfigError, match="unknown key"):
        Proof(run_file, ["model.n_layr=1"], tmp_path / "new", steps=3, ranks=1)
    assert not (tmp_path / "new").exists()


@pytest.mark.launches
def test_a_run_that_fails_is_said_with_its_log(run_file, tmp_path):
    proof = Proof(run_file, ["batch.micro_batch=3"], tmp_path / "proof", steps=3, ranks=1)
    with pytest.raises(ConfigError, match=r"whole: ended with exit code 2; see .*whole\.log"):
        proof.train()
    assert "batch.micro_batch 3 does not divide" in (tmp_path / "proof/whole.log").read_text()
