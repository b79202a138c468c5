"""Kills in every way, in short: scripts/studies/chaos.py in full has 50."""

import json
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT


@pytest.mark.parametrize("kills", [2, pytest.param(6, marks=pytest.mark.long)])
def test_a_run_survives_every_way_of_dying(tmp_path, kills):
    report = tmp_path / "chaos.json"
    length = ["--kills", str(kills), "--steps", str(10 * kills)]
    command = [sys.executable, ROOT / "scripts/studies/chaos.py", *length]
    done = subprocess.run(
        [*command, "--json", report], env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert sum(found["kills"].values()) == kills
    assert len(found["kills"]) >= min(kills, 5)  # 6 where a small disk can be mounted
    assert found["orphans"] == 0
