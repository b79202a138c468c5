"""A step kept by one rank; real runs that stop and are replayed: test_replay.py."""

import json

import pytest
import torch
from faults import options

from sparse_gpt.config.load import load_config
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train.checkpoint.random_state import rng_state
from sparse_gpt.train.incident import write_incident


def skipped_step(engine, batch):
    """Train until a step is taken for a spike: its batch and the random numbers before it."""
    for step in range(20):
        rng = rng_state(engine.world.device)
        now = batch(step)
        engine.step(now.tokens, now.targets, step)
        if engine.guard.trouble:
            return now, rng, step + 1
    raise AssertionError("no step is above the mean of the two before")


@pytest.mark.parametrize(("zero_stage", "precision"), [(0, "fp32"), (2, "bf16"), (3, "fp32")])
def test_everything_that_the_step_needs_is_kept(engine, batch, tmp_path, zero_stage, precision):
    made = engine(*options(zero_stage, precision, spike="skip", window=2, threshold=1e-9))
    now, rng, step = skipped_step(made, batch)
    said = write_incident(tmp_path, made, now, rng, step)
    folder = tmp_path / f"incidents/step-{step:08}"
    assert said.startswith(f"{folder} (")
    assert sorted(path.name for path in folder.parent.iterdir()) == [folder.name]

    record = json.loads((folder / "incident.json").read_text())
    assert record == {
        "step": step,
        "trouble": made.guard.trouble,
        "loss": float(made.guard.loss),
        "grad_norm": float(made.guard.norm),
        "world_size": 1,
    }
    rank = torch.load(folder / "rank-0.pt", weights_only=True)
    assert torch.equal(rank["tokens"], now.tokens)
    assert torch.equal(rank["targets"], now.targets)
    assert rank["samples"].tolist() == now.samples.tolist()
    assert rank["documents"] is None
    assert torch.equal(rank["rng"]["cpu"], rng["cpu"])
    config = load_config(folder / "config.yaml")
    assert config == made.config
    weights = torch.load(folder / "weights.pt", weights_only=True)
    GPT(config.model).load_state_dict(weights)  # which refuses what is missing, or of other shapes
    own = made.module.state_dict() if zero_stage < 3 else made.statistics.buffers  # it holds parts
    assert own
    assert all(torch.equal(weights[name], value) for name, value in own.items())


def test_an_incident_of_an_earlier_start_gives_way(engine, batch, tmp_path):
    made = engine(*options(1, spike="skip", window=2, threshold=1e-9))
    now, rng, step = skipped_step(made, batch)
    folder = tmp_path / f"incidents/step-{step:08}"
    folder.mkdir(parents=True)
    (folder / "rank-7.pt").touch()
    write_incident(tmp_path, made, now, rng, step)
    assert not (folder / "rank-7.pt").exists()
    assert (folder / "incident.json").exists()


def test_where_it_cannot_be_written_that_is_said_and_nothing_is_left(engine, batch, tmp_path):
    made = engine(*options(1, spike="skip", window=2, threshold=1e-9))
    now, rng, step = skipped_step(made, batch)
    (tmp_path / "incidents").touch()  # no folder
    said = write_incident(tmp_path, made, now, rng, step)
    assert said.startswith(f"{tmp_path}/incidents/step-{step:08} could not be written (")
    assert [path.name for path in tmp_path.iterdir() if path.name != "small.yaml"] == ["incidents"]
