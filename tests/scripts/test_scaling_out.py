"""The tables of docs/scaling-out.md, as its script makes them."""

import importlib.util
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT

SCRIPT = ROOT / "scripts/studies/scaling_out.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("scaling_out", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["scaling_out"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["scaling_out"]


def setting(script, network=50e9):
    return script.Setting("H100", 0.4, 2**22, 8, network)


def test_the_page_has_the_tables_of_the_script(tmp_path):
    """Those of one size, within the page's."""
    page = tmp_path / "page.md"
    names = ("sizes", "steps", "fits", "worth")
    page.write_text("".join(f"<!-- scaling_out: {name} -->\n\n<!-- end -->\n" for name in names))
    command = [sys.executable, SCRIPT, "--page", page, "--sizes", "124m", "--gpus", "8", "1024"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 4 * 2 + 1 + 2 + 1 + 2
    assert set(rows) <= set((ROOT / "docs/scaling-out.md").read_text().splitlines())
    refused = subprocess.run(
        [sys.executable, SCRIPT, "--page", SCRIPT, "--sizes", "124m", "--gpus", "8"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode == 2
    assert "has no <!-- scaling_out: sizes -->" in refused.stderr


def test_sharded_by_block_a_rank_holds_less_and_tokens_travel(script):
    ours = script.over_ranks(setting(script), "124m", 64, ranks=8)
    stages = script.in_stages(setting(script), "124m", "default", 64)
    assert ours.name == "blocks over 8"
    assert ours.step.products_seconds == pytest.approx(stages[0].step.products_seconds)
    assert ours.step.reduced_bytes < stages[0].step.reduced_bytes / 2
    assert script.over_ranks(setting(script), "124m", 8, ranks=16) is None
    tokens, k, layers, d = 2**22 // 64, 2, 12, 768
    travel = 4 * tokens * k * layers * d * 2 * 7 / 8
    assert 0 < ours.step.gathered_bytes - travel < stages[0].step.gathered_bytes
    slow = script.over_ranks(setting(script, network=5e9), "124m", 64, ranks=8)
    assert slow.step.reduce_seconds == pytest.approx(10 * ours.step.reduce_seconds)


def test_a_multiplier_is_worth_less_where_links_take_longer(script):
    rows = list(script.worth_table(setting(script), ["124m"], [8, 1024], 2))[1:]
    few, many = ([float(cell) for cell in row[4:]] for row in rows)
    assert few[0] == pytest.approx(2, abs=0.02)
    assert many[1] < few[1]
