"""Incidents of real runs, run again here."""

import json
import math

import pytest
from faults import FAULTY, faults, options, stopped
from ranks import sparse_gpt, stage, start_ranks

from sparse_gpt.train.guard import RunStopped
from sparse_gpt.train.replay import replay


def test_a_diverged_run_stops_and_its_last_step_can_be_replayed(command, run_file):
    error = stopped(
        start_ranks(
            run_file,
            *options(3, stop_after=3),
            *("optimizer.lr=1e20", "duration.steps=12", "model.document_mask=true"),
        )
    )
    assert "3 bad steps in a row" in error
    [incident] = (run_file.parent / "run/incidents").iterdir()
    assert str(incident) in error
    step = json.loads((incident / "incident.json").read_text())["step"]
    done = command("replay", incident, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["reproduced"]
    assert not any(sample["finite"] for sample in found["samples"])
    numbers = sorted(sample["sample"] for sample in found["samples"])
    assert numbers == list(range((step - 1) * 16, step * 16))

    (incident / "weights.pt").write_bytes(b"")
    broken = command("replay", incident)
    assert broken.returncode == 2
    assert "is no whole incident" in broken.stderr


@pytest.mark.long
def test_a_fault_of_the_machine_does_not_reproduce(run_file):
    """And bf16 weights, dropout and its random numbers come back as they were."""
    stopped(
        start_ranks(
            run_file,
            *faults(("grad", 7)),
            *options(1, "bf16", stop_after=1),
            "model.dropout=0.1",
            script=FAULTY,
        )
    )
    [incident] = (run_file.parent / "run/incidents").iterdir()
    done = sparse_gpt("replay", incident)
    assert done.returncode == 0, done.stderr
    assert "does not reproduce" in done.stdout
    found = json.loads(sparse_gpt("replay", incident, "--json").stdout)
    assert found["replayed"]["loss"] == pytest.approx(found["recorded"]["loss"], rel=1e-6)
    assert math.isfinite(found["replayed"]["grad_norm"])


@pytest.fixture
def stopped_here(train_here, run_file):
    """Trains in this process until the guard stops it; the folder of the incident."""

    def run(*overrides):
        with pytest.raises(RunStopped, match="1 bad steps in a row"):
            train_here("schedule.final_lr_ratio=1", *overrides)
        [incident] = (run_file.parent / "run/incidents").iterdir()
        return incident

    return run


@pytest.mark.parametrize(("precision", "rounding"), [("fp32", 1e-5), ("bf16", 1e-3)])
def test_a_spike_of_the_run_itself_reproduces(command, stopped_here, precision, rounding):
    """With dropout: from the random numbers of before the step."""
    guard = "guard={spike: skip, window: 2, threshold: 1e-9, stop_after: 1}"
    incident = stopped_here(guard, stage(2), f"precision={precision}", "model.dropout=0.1")
    found = replay(incident)
    assert found.reproduced
    assert found.replayed == pytest.approx(found.recorded, rel=rounding)
    assert len(found.samples) == 16
    norms = [sample.grad_norm for sample in found.samples]
    assert norms == sorted(norms, reverse=True)  # the worst first
    shown = command("replay", incident)
    assert shown.returncode == 0
    assert "the step reproduces" in shown.stdout
    printed = json.loads(command("replay", incident, "--json").stdout)
    assert printed["step"] == found.step
    assert "tokens" not in printed["samples"][0]


@pytest.mark.parametrize("name", ["incident.json", "config.yaml", "weights.pt", "rank-0.pt"])
@pytest.mark.parametrize("content", [None, b"", b"{"])
def test_what_is_no_whole_incident_is_refused(refused, stopped_here, name, content):
    incident = stopped_here("guard={spike: skip, window: 2, threshold: 1e-9, stop_after: 1}")
    (incident / name).unlink()
    if content is not None:
        (incident / name).write_bytes(content)
    line = refused("replay", incident)
    assert str(incident) in line
