"""Kills in every way, in short: scripts/studies/chaos.py in full has 50."""

import json
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT


@pytest.mark.long
def test_a_run_survives_every_way_of_dying(tmp_path):
    report = tmp_path / "chaos.json"
    command = [sys.executable, ROOT / "scripts/studies/chaos.py", "--kills", "6", "--steps", "60"]
    done = subprocess.run(
        [*command, "--json", report], env=ENVIRONMENT, capture_output=True, text=True, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert sum(found["kills"].values()) == 6
    assert len(found["kills"]) >= 5  # 6 where a small disk can be mounted
    assert found["orphans"] == 0
