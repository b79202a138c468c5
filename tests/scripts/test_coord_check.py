"""The coordinate check passes with transfer, and fails when transfer does nothing."""

import json
import subprocess
import sys

from ranks import ENVIRONMENT, ROOT

SHORT = ["--d-model", "128", "512", "--seeds", "1", "--batch", "8", "--only", "dense", "default"]
BROKEN = """
import sys
sys.path.insert(0, "scripts/studies")
import coord_check
from sparse_gpt.train import engine
engine.lr_multipliers = lambda model: dict.fromkeys(dict(model.named_parameters()), 1.0)
coord_check.main()
"""


def run(*command):
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=ROOT
    )


def test_the_change_by_training_is_equal_over_widths_with_transfer_alone(tmp_path):
    files = ("--json", tmp_path / "check.json", "--plot", tmp_path / "check.png")
    done = run("scripts/studies/coord_check.py", *SHORT, *files)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "check.json").read_text())["slopes"]
    assert len(rows) == 2 * 4 * 2
    for row in rows:
        slope = row["change"]["slope"]
        assert abs(slope) < 0.25 if row["transfer"] else slope > 0.25, row
    assert (tmp_path / "check.png").stat().st_size > 10_000


def test_it_fails_without_the_multipliers(tmp_path):
    done = run("-c", BROKEN, *SHORT[:-1])
    assert done.returncode == 1, done.stdout + done.stderr
    assert "dense, ffn: slope +" in done.stdout
