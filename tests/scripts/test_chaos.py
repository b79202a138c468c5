"""Kills in every way, in short: scripts/studies/chaos.py in full has 50, of each command 10."""

import json
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT


@pytest.mark.long
def test_a_run_survives_every_way_of_dying(tmp_path):
    report = tmp_path / "chaos.json"
    command = [sys.executable, ROOT / "scripts/studies/chaos.py", "--kills", "12"]
    command += ["--steps", "150"]
    done = subprocess.run(
        [*command, "--json", report], env=ENVIRONMENT, capture_output=True, text=True, timeout=3600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(report.read_text())
    assert sum(found["kills"].values()) == 12
    assert len(found["kills"]) >= 9  # 12 where root, a C compiler and a small disk can be had
    assert found["orphans"] == 0


@pytest.mark.long
def test_what_a_killed_or_raced_command_leaves_is_whole_or_has_no_name():
    command = [sys.executable, ROOT / "scripts/studies/chaos_commands.py", "--moments", "1"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count(": 0 complaints") == 5
