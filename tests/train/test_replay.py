"""Incidents of real runs, run again here."""

import json
import math

import pytest
from faults import FAULTY, faults, options, stopped
from ranks import sparse_gpt, start_ranks


def test_a_diverged_run_stops_and_its_last_step_can_be_replayed(run_file):
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
    done = sparse_gpt("replay", incident, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["reproduced"]
    assert not any(sample["finite"] for sample in found["samples"])
    numbers = sorted(sample["sample"] for sample in found["samples"])
    assert numbers == list(range((step - 1) * 16, step * 16))

    (incident / "weights.pt").write_bytes(b"")
    broken = sparse_gpt("replay", incident)
    assert broken.returncode == 2
    assert "is no whole incident" in broken.stderr


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
