"""The study runner, on a study of seconds: real launches, stopped and gone on with."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ranks import ENVIRONMENT, ROOT

from sparse_gpt.data import prepare


@pytest.fixture
def study(tmp_path: Path) -> dict:
    shards = tmp_path / "shards"
    novel = ROOT / "data/novels/persuasion.txt"
    prepare([novel], shards, separator="\nChapter ", held_out=0.2)
    size = {"d_model": 32, "n_layer": 1, "n_head": 2, "max_seq_len": 32}
    return {
        "run": {
            "model": {"preset": "tiny", **size},
            "data": {"path": str(shards)},
            "batch": {"global_tokens": 64, "micro_batch": 2},
            "duration": {"steps": 2},
            "optimizer": {"lr": 1e-3},
            "eval": {"max_tokens": 256},
        },
        "variants": {
            "dense": {"set": {"model.ffn": "dense"}},
            "sparse one": {"set": {"model.ffn": "light"}, "seeds": [0, 1]},
            "other": {"from": "sparse one", "set": {"model.ffn.refine": None}, "lr": {1e-2: [0]}},
        },
    }


def ablate(study: dict, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    file = folder / "study.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    command = [
        sys.executable,
        ROOT / "scripts/studies/ablate_ffn.py",
        file,
        "--out",
        folder / "out",
    ]
    return subprocess.run(
        [*command, *arguments], env=ENVIRONMENT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.long
def test_trains_what_is_missing_and_reports_all(study, tmp_path):
    done = ablate(study, tmp_path, "--only", "dense")
    assert done.returncode == 0, done.stderr
    record = tmp_path / "out/runs/dense-lr0.001-s0/metrics.jsonl"
    before = record.stat().st_mtime_ns
    done = ablate(study, tmp_path, "--jobs", "2")
    assert done.returncode == 0, done.stderr
    assert record.stat().st_mtime_ns == before  # finished runs are not touched
    rows = [json.loads(line) for line in (tmp_path / "out/results.jsonl").open()]
    assert [(row["variant"], row["lr"], row["seed"]) for row in rows] == [
        ("dense", 1e-3, 0),
        ("sparse one", 1e-3, 0),
        ("sparse one", 1e-3, 1),
        ("other", 1e-2, 0),
    ]
    assert len({row["validation_loss"] for row in rows}) == 4
    assert rows[3]["parameters"] < rows[1]["parameters"]
    assert rows[1]["provenance"]["hardware"]["world_size"] == 1
    table = (tmp_path / "out/table.md").read_text()
    assert table.count("\n") == 2 + 3
    mean = (rows[1]["validation_loss"] + rows[2]["validation_loss"]) / 2
    assert f"{mean:.3f} (" in table
    assert (tmp_path / "out/plots/variants.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"form": "dense"}, "variants.wrong: unknown key 'form'"),
        ({"from": "dance"}, "no variant 'dance'; there are dense"),
        ({"set": {"model.fnn": "dense"}}, "model.fnn: unknown key; did you mean 'ffn'"),
    ],
)
def test_a_wrong_study_ends_in_one_line(study, tmp_path, variant, message):
    study["variants"]["wrong"] = variant
    done = ablate(study, tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out/runs").exists()
