"""`compile: true`: the same training from faster blocks."""

import shutil

import pytest
import ranks
from ranks import finish, metrics, start_ranks

# The gradient's norm would differ: its derivative jumps where selected coefficients change.
LOSSES = ("train/loss", "val/loss")
# More blocks than dynamo would compile variants of, were each block a variant.
OPTIONS = ("model.n_layer=10", "optimizer.lr=1e-4", "duration.steps=4", "eval.every=2")
OPTIONS += ("checkpoint.every=2",)


@pytest.fixture
def compiling(monkeypatch):
    """Ranks that may compile, and say when they do so again."""
    environment = {**ranks.ENVIRONMENT, "TORCH_LOGS": "recompiles,graph_breaks"}
    environment.pop("TORCHDYNAMO_DISABLE", None)
    monkeypatch.setattr(ranks, "ENVIRONMENT", environment)


def losses(run_dir):
    """The losses of a run's steps, as one list."""
    return [row[tag] for row in metrics(run_dir) for tag in LOSSES if tag in row]


def run(run_file, folder, *options, world_size):
    """Train to step 4 (on from a checkpoint in `folder`, if there is one); what rank 0 printed."""
    options = (*OPTIONS, *options, f"run_dir={folder}")
    return finish(start_ranks(run_file, *options, world_size=world_size), timeout=600)[0]


def test_a_compiled_run_is_the_eager_one(compiling, run_file, tmp_path):
    """Its losses, its sampled steps, and a checkpoint that eager training goes on from."""
    eager, compiled, back = (tmp_path / name for name in ("eager", "yes", "back"))
    options = ("deepspeed={zero_optimization: {stage: 2}}", "model.ffn.feedback={}")
    run(run_file, eager, *options, world_size=2)
    output = run(run_file, compiled, *options, "compile=true", world_size=2)
    assert output.count("Recompiling function") == 1  # training differs from validation
    assert "Graph break" not in output
    assert len(losses(eager)) == 7
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-4)

    sampled, other = metrics(compiled)[1:3]
    for part in ("attention", "ffn.spectral", "ffn.projection"):
        assert sampled[f"time/block_09/{part}"] > 0
    assert sampled["sparsity/block_00/ffn.spectral"] == 2 / 64
    assert 0 <= sampled["sparsity/block_00/ffn.feedback"] < 1
    assert sampled["routing/block_09/energy_entropy"] > 0
    assert other["routing/block_09/load_max_over_mean"] > 1
    assert not any(tag.startswith("time/") for tag in other)

    shutil.copytree(compiled / "checkpoints", back / "checkpoints")
    shutil.rmtree(back / "checkpoints/step-00000004")
    run(run_file, back, *options, world_size=2)
    assert losses(back) == pytest.approx(losses(compiled)[-3:], rel=1e-4)


@pytest.mark.long
def test_a_dense_model_compiles_in_half_precision(compiling, run_file, tmp_path):
    eager, compiled = tmp_path / "eager", tmp_path / "compiled"
    options = ("model.ffn=dense", "precision=bf16")
    run(run_file, eager, *options, world_size=1)
    run(run_file, compiled, *options, "compile=true", world_size=1)
    assert losses(compiled) == pytest.approx(losses(eager), rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("ffn", ["light", "default"])
def test_compiled_blocks_may_be_recomputed(compiling, run_file, tmp_path, ffn):
    own, full = (f"model.ffn={ffn}",), ("compile=true", "activation_checkpointing=full")
    run(run_file, tmp_path / "plain", *own, world_size=1)
    run(run_file, tmp_path / "full", *own, *full, world_size=1)
    assert losses(tmp_path / "full") == pytest.approx(losses(tmp_path / "plain"), rel=1e-4)
    # With dropout: the masks of the second forward must be those of the first.
    own += ("model.dropout=0.1",)
    run(run_file, tmp_path / "dropout", *own, full[0], world_size=1)
    run(run_file, tmp_path / "both", *own, *full, world_size=1)
    assert losses(tmp_path / "both") == pytest.approx(losses(tmp_path / "dropout"), rel=1e-4)
