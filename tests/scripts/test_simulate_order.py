"""The simulation holds, and finds what is broken."""

import importlib.util
import json
import subprocess
import sys

import numpy as np
import pytest
from ranks import ENVIRONMENT, ROOT

from sparse_gpt.data.batches import order

SCRIPT = ROOT / "scripts/studies/simulate_order.py"


def test_the_order_holds_at_paper_sizes(tmp_path):
    command = [sys.executable, SCRIPT, "--seed", "1", "--json", tmp_path / "order.json"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "order.json").read_text())
    assert (report["ranks"], round(report["tokens"] / 1e12)) == (16_384, 10)
    assert len(report["findings"]) == 9
    assert all(finding["broken"] == 0 for finding in report["findings"])


@pytest.fixture
def script(monkeypatch):
    """The script as a module, with fewer probes."""
    spec = importlib.util.spec_from_file_location("simulate_order", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "simulate_order", module)
    spec.loader.exec_module(module)
    for name, value in (("PROBES", 2000), ("TRIES", 20), ("STRETCH", 20_000)):
        monkeypatch.setattr(module, name, value)
    monkeypatch.setattr(module, "BATCHES", [(1, 1000), (8, 1000), (500, 5000)])
    return module


def broken(script):
    return {finding.promise for finding in script.simulate(0) if finding.broken}


def test_an_order_that_is_not_one_to_one_is_found(script, monkeypatch):
    assert not broken(script)
    permute = order.permute
    two = np.uint64(2)
    monkeypatch.setattr(order, "permute", lambda *args: permute(*args) // two * two)
    found = broken(script)
    assert "each window has one sample an epoch" in found
    assert "an epoch covers all windows" in found
    assert "each sample of a source has one of the run" in found
    assert "nothing is read twice" in found
    assert "shares of a cycle" in found


def test_other_shares_are_found(script, monkeypatch):
    monkeypatch.setattr(order, "blend", lambda samples, *_: (samples * 0, samples))
    assert {"shares of a cycle", "shares of any prefix"} <= broken(script)


def test_ranks_that_share_otherwise_are_found(script, monkeypatch):
    def in_a_row(start, steps, global_batch, rank, world_size):
        rows = global_batch // world_size
        firsts = start + np.arange(steps) * global_batch + rank * rows
        return firsts[:, None] + np.arange(rows)

    monkeypatch.setattr(order, "rank_samples", in_a_row)
    found = broken(script)
    assert found == {"the same at any world size and batch", "the same after any resume"}


def test_windows_that_overlap_are_found(script, monkeypatch):
    starts = order.window_starts
    monkeypatch.setattr(order, "window_starts", lambda *args: starts(*args) // 10_000 * 10_000)
    assert "windows of an epoch do not overlap" in broken(script)


def test_a_broken_promise_is_exit_code_1(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["simulate_order.py"])
    monkeypatch.setitem(script.CHECKS, "nothing is read twice", lambda *_: ("this", 1))
    with pytest.raises(SystemExit) as ended:
        script.main()
    assert ended.value.code == 1
    assert "nothing is read twice" in capsys.readouterr().out
