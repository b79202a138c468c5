"""Damaged inputs in short: scripts/studies/fuzz.py takes as many as wanted."""

import json
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT


@pytest.mark.parametrize("inputs", [160, pytest.param(5000, marks=pytest.mark.long)])
def test_damaged_inputs_are_used_or_refused_in_one_line(tmp_path, inputs):
    report = tmp_path / "fuzz.json"
    command = [sys.executable, ROOT / "scripts/studies/fuzz.py", "--inputs", str(inputs)]
    done = subprocess.run(
        [*command, "--json", report], env=ENVIRONMENT, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stdout + done.stderr
    counts = json.loads(report.read_text())["counts"]
    assert sum(sum(of_kind.values()) for of_kind in counts.values()) == inputs
    assert all(of_kind["refused"] for of_kind in counts.values())
    assert all(of_kind.keys() <= {"fine", "refused"} for of_kind in counts.values())
