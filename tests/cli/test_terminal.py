"""The commands that print tables, in any terminal and in none: nothing is lost, nothing breaks."""

import json
import re

import pytest
import yaml
from ranks import ROOT
from terminal import told

RUNS = [f"sparse-d1024-lr0.002-s0-1e{power}" for power in (18, 19)]
# What each must say, whatever is around it.
SAID = {
    ("plan", "124m", "--gpus", "8"): ["124,475,904", "ZeRO-3", "micro-batch", "gathered,", "45.2"],
    ("flops", "tiny-sparse"): ["12,877,824", "projection", "42,444,672", "32.1%"],
    ("sweep", "plan", "one-gpu"): ["1.6e16", "sparse d640", "chains"],
    ("compare", *RUNS): ["7,248,640", "7.0000", "1.500", *RUNS],
    ("compare", ".", "--sort", "loss"): ["7.0000", *RUNS],
    ("shards", "info", "SHARDS"): ["held_out", "documents"],
    ("shards", "show", "SHARDS", "--grep", "Wentworth"): ["Wentworth"],
    ("config", "show", "tiny-sparse"): ["micro_batch"],
    ("doctor",): ["tensorboard", "grouped", "memory"],
    ("plan", "--help"): ["--peak-tflops", "--gpus-per-node", "measure", "sparse-gpt"],
    ("prepare", "--help"): ["--text-field", "--max-rejected", "KEY=VALUE", "Example:"],
}


@pytest.fixture
def folder(shards, tmp_path, monkeypatch, no_gpu):
    """Two runs' records with long names, and shards."""
    for number, name in enumerate(RUNS):
        (tmp_path / name).mkdir()
        tree = yaml.safe_load((ROOT / "configs/tiny-dense.yaml").read_text())
        (tmp_path / name / "config.yaml").write_text(yaml.safe_dump(tree))
        rows = [{"step": 0, "gflops": 0, "val/loss": 10.8}]
        speed = 100.0 + 50 * number
        rows += [{"step": 1, "gflops": 5.0, "val/loss": 7.0, "perf/tokens_per_second": speed}]
        record = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(record)
    (tmp_path / "SHARDS").symlink_to(shards)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("words", SAID, ids=" ".join)
@pytest.mark.parametrize(
    ("columns", "encoding", "terminal"),
    [(60, "utf-8", True), (40, "ascii", True), (40, "latin-1", False)],
)
def test_nothing_is_lost(folder, monkeypatch, words, columns, encoding, terminal):
    monkeypatch.setenv("NO_COLOR", "1")
    said, code = told(words, columns, encoding, terminal)
    assert code == 0, said
    assert not re.search("\x1b\\[[349]\\d", said)  # a colour
    lines = re.sub("\x1b\\[[\\d;]*m", "", said).replace("\r", "").split("\n")
    if encoding == "utf-8" and words[0] in ("flops", "doctor", "compare"):
        assert max(map(len, lines)) <= columns
    # A word may be cut by the end of the line; a table's lines stand between.
    plain = " ".join(line.strip(" │|") for line in lines)
    assert "…" not in plain
    assert "\\u2026" not in plain
    for text in SAID[words]:
        assert text in plain or text in plain.replace(" ", ""), said
