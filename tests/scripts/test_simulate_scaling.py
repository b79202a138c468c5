"""The tables of docs/scaling-out.md, as their script makes them, and published steps."""

import importlib.util
import json
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT

STUDIES = ROOT / "scripts/studies"
SCRIPT = STUDIES / "simulate_scaling.py"
TABLES = ("published", "sizes", "answers", "weak", "steps", "fits")


@pytest.fixture(scope="module")
def script():
    sys.path.insert(0, str(STUDIES))
    spec = importlib.util.spec_from_file_location("simulate_scaling", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["simulate_scaling"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["simulate_scaling"]
    sys.path.remove(str(STUDIES))


def setting(script, network=50e9):
    return script.Setting("H100", 0.4, 2**22, 8, network)


def test_the_page_has_the_tables_of_the_script(tmp_path):
    """Those of one size, within the page's; and what the plot is of."""
    page = tmp_path / "page.md"
    page.write_text("".join(f"<!-- simulate_scaling: {n} -->\n\n<!-- end -->\n" for n in TABLES))
    options = ["--sizes", "124m", "--gpus", "8", "1024", "--out", tmp_path]
    command = [sys.executable, SCRIPT, "--page", page, *options]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    assert len(rows) == 6 * 2 + 13 + 1 + 2 + 2 + 2 + 1
    assert set(rows) <= set((ROOT / "docs/scaling-out.md").read_text().splitlines())
    made, committed = (
        json.loads((folder / "weak.json").read_text())
        for folder in (tmp_path, ROOT / "docs/scaling")
    )
    assert made["weak"] == [row for row in committed["weak"] if row["size"] == "124m"]
    assert (tmp_path / "weak.png").stat().st_size > 5_000
    refused = subprocess.run(
        [sys.executable, SCRIPT, "--page", SCRIPT, "--sizes", "124m", "--gpus", "8"],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert refused.returncode == 2
    assert "has no <!-- simulate_scaling: published -->" in refused.stderr


def test_blocks_over_ranks_take_less_memory_and_more_links(script):
    own = setting(script)
    found = [way for way in script.over_ranks(own, "124m", "default", 64) if way]
    assert {way.ranks for way in found} == {2, 4, 8, 16, 32, 64}
    assert {way.stage for way in found} == {1, 2}
    alone = script.in_stages(own, "124m", "default", 64)[0]
    assert all(way.step.reduced_bytes < alone.step.reduced_bytes for way in found)
    assert all(way.micro_batch >= alone.micro_batch for way in found)
    assert script.fastest([*found, alone, None]) == alone
    assert not any(script.over_ranks(own, "124m", "dense", 64))
    slow = script.way(setting(script, network=5e9), "124m", "default", 64, 1, 8)
    fast = script.way(own, "124m", "default", 64, 1, 8)
    assert slow.step.reduce_seconds == pytest.approx(10 * fast.step.reduce_seconds)


def test_a_multiplier_is_worth_less_where_links_take_longer(script):
    rows = list(script.answers_table(setting(script), ["124m"], [8, 1024], [2.0]))[1:]
    few, many = (list(map(float, row[6].split(" to "))) for row in rows)
    assert few[0] == pytest.approx(2, abs=0.02)
    assert many[0] < few[0]


def test_published_steps_of_thousands_of_tokens_are_met(script):
    """The first row of a series is no prediction; a model of links alone is too fast, not slow."""
    found = list(script.comparisons())
    titan = [c for c in found if c.source.startswith("torchtitan")]
    assert [c.gpus for c in titan] == [128, 128]
    for c in found:
        if c.gpus <= 128 and "experts" not in c.what:
            assert min(map(abs, c.errors)) < 0.045
        assert c.hidden <= c.exposed
    assert all(c.errors[0] > -0.3 for c in found)
