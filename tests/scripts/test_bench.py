"""The benchmarks run, and say what they say they measure."""

import json
import math
import subprocess
import sys

import pytest
from ranks import ENVIRONMENT, ROOT

from sparse_gpt.data import prepare, train_vocab

SMALL = ("model={d_model: 32, n_layer: 1, n_head: 2, max_seq_len: 32, vocab_size: 100}",)


def bench(script, *arguments):
    command = [sys.executable, ROOT / "scripts" / script, *map(str, arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_ffn_alone(tmp_path):
    eager = ("dense eager", "sparse eager")
    options = ("--only", *eager, "--d-model", "32", "--preset", "paper", "--rounds", "2")
    bench("bench/ffn.py", *options, "--tokens", "48", "--json", tmp_path / "ffn.json")
    report = json.loads((tmp_path / "ffn.json").read_text())
    assert {"command", "hardware", "versions", "git_commit", "ceilings", "preset"} <= set(report)
    [shape] = report["shapes"]
    assert (shape["d_model"], shape["tokens"], shape["dtype"]) == (32, 48, "fp32")
    dense, sparse = (shape["results"][name] for name in eager)
    x, weights = 48 * 32 * 4, (8 * 32**2 + 5 * 32) * 4
    assert dense["forward"]["matmul"] == 48 * 16 * 32**2
    assert dense["forward"]["bytes"] == 2 * x + weights
    assert dense["backward"]["bytes"] == 3 * x + 2 * weights
    assert dense["both"]["matmul"] == 3 * dense["forward"]["matmul"]
    assert dense["both"]["speed_over_dense_eager"]["range"] == [1, 1]
    for result in (dense, sparse):
        for row in (result["forward"], result["backward"], result["both"]):
            assert row["tflops"] == pytest.approx(row["flops"] / row["ms"] / 1e9)
            assert row["roof_share"] == pytest.approx(row["roof_ms"] / row["ms"])
            low, high = row["speed_over_dense_eager"]["range"]
            assert 0 < low <= row["speed_over_dense_eager"]["median"] <= high


def test_an_ffn_that_fails_does_not_stop_the_others(tmp_path):
    options = (
        "--only",
        "sparse eager",
        "dense eager",
        "--d-model",
        "16",
        "24",
        "--preset",
        "paper",
    )
    out = tmp_path / "ffn.json"
    bench("bench/ffn.py", *options, "--tokens", "8", "--rounds", "1", "--json", out)
    good, bad = (shape["results"] for shape in json.loads(out.read_text())["shapes"])
    assert "forward" in good["sparse eager"]
    assert "group_size 16 does not divide d_model 24" in bad["sparse eager"]["error"]
    assert "forward" in bad["dense eager"]


@pytest.mark.parametrize("what", [[], ["--decode", "--batch", "1", "2", "--new", "3"]])
def test_whole_models(tmp_path, what):
    config, out = ROOT / "configs/tiny-dense.yaml", tmp_path / "out.json"
    options = ("batch={global_tokens: 64, micro_batch: 2}", *SMALL, "--against", "paper", *what)
    shown = bench("bench/train.py", config, *options, "--rounds", "2", "--json", out)
    report = json.loads(out.read_text())
    names = ["tiny-dense", "tiny-dense paper"]
    assert [r["contestant"] for r in report["results"]] == names * (2 if what else 1)
    assert [report["configs"][name]["model"]["ffn"]["kind"] for name in names] == [
        "dense",
        "sparse",
    ]
    for result in report["results"]:
        assert f"{result['tokens_per_second']:,.0f}" in shown
        assert result["mfu"] is None  # a CPU has no peak that we know


@pytest.mark.parametrize("transfer", ["false", "true"])
def test_plain_torch_trains_as_deepspeed_does(transfer):
    script = f"""
import os, sys, torch
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "scripts/bench")!r}]
from train import Engine, TorchEngine, GPT, join_world, load_config
world = join_world()
config = load_config({str(ROOT / "configs/tiny-dense.yaml")!r}, [
    "batch={{global_tokens: 128, micro_batch: 2}}", {SMALL[0]!r},
    "optimizer.width_transfer={transfer}"])
torch.manual_seed(0)
batches = [torch.randint(100, (2, 4, 32)) for _ in range(4)]
for engine in (Engine, TorchEngine):
    torch.manual_seed(0)
    engine = engine(config, GPT(config.model), world, 10)
    rows = [engine.step(*batch, step) for step, batch in enumerate(batches)]
    print("row", *(float(value) for row in rows for value in row), flush=True)
os._exit(0)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    rows = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("row")]
    assert len(rows) == 2, done.stderr
    assert list(map(float, rows[0])) == pytest.approx(list(map(float, rows[1])), rel=1e-4)


@pytest.mark.long
def test_drop_in(tmp_path):
    novel = [ROOT / "data/novels/persuasion.txt"]
    chapters = {"separator": "\nChapter ", "held_out": 0.2}
    train_vocab(novel, tmp_path / "bpe", size=1024, **chapters, progress=False)
    prepare(novel, tmp_path / "shards", vocab=tmp_path / "bpe", **chapters)
    sizes = ("--d-model", "32", "--n-layer", "2", "--steps", "20", "--fit", "2", "--tune", "1")
    bench("bench/drop_in.py", tmp_path / "shards", *sizes, "--json", tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["ffn"] for row in rows] == [*["dense"] * 2, *["default"] * 5, *["light"] * 5]
    losses = {(row["ffn"], row["state"]): row["loss"] for row in rows}
    assert losses["dense", "as it was"] < math.log(1024)  # as good as a guess
    assert losses["default", "from noise"] != losses["light", "from noise"]
    errors = [row["errors"] for row in rows if row["state"].startswith("fitted, 2 ")]
    assert [len(layers) for layers in errors] == [2, 2]


def test_prepare(tmp_path):
    for extra in ("gigatoken", "tokenizers"):
        pytest.importorskip(extra)
    novel = (ROOT / "data/novels/persuasion.txt").read_text()
    lines = [json.dumps({"text": text}) for text in novel.split("\n\n")[:200] if text.strip()]
    (tmp_path / "novel.jsonl").write_text("\n".join(lines) + "\n")
    bench("bench/prepare.py", tmp_path / "novel.jsonl", "--rounds", "2", "--json", tmp_path / "out")
    report = json.loads((tmp_path / "out").read_text())
    assert {row["way"]: row["same_ids"] for row in report["rows"]} == dict.fromkeys(
        [
            "plain tiktoken",
            "prepare, tiktoken",
            "prepare, gigatoken",
            "prepare, tiktoken, 2 workers",
            "prepare, gigatoken, 2 workers",
            "tokenizers",
            "datasets.map",
            "gigatoken, its file API",
        ],
        True,
    )
    assert report["rows"][0]["speed_over_plain_tiktoken"] == [1, 1]


@pytest.mark.long
def test_blocks_over_ranks(tmp_path):
    """On two ranks: what is counted is what must be sent."""
    out = tmp_path / "blocks.json"
    sizes = ("batch={global_tokens: 256, micro_batch: 2}", *SMALL, "--stages", "1", "--ranks", "1")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / "scripts/bench/blocks.py", ROOT / "configs/tiny-sparse.yaml", *sizes, "2"]
    done = subprocess.run(
        [*map(str, command), "--rounds", "1", "--json", str(out)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    plain, shared = json.loads(out.read_text())["results"]
    assert (plain["exchange_bytes"], plain["ratio"]) == (0, 1)
    assert shared["exchange_bytes"] > 0
    dictionary = 2 * 64 * 32 * 16 * 4  # bytes, of one layer
    # ZeRO-1 all-reduces gradients and gathers weights: of the dictionary nothing, as nobody else
    # has this rank's blocks.
    saved = plain["collective_bytes"] - shared["collective_bytes"]
    assert saved == pytest.approx(3 * dictionary / 2, rel=0.02)
