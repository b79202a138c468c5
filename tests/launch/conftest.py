"""A small data set and run file, and ways to start ranks, for the tests of `launch`."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data import prepare

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # nothing here compiles, and inductor takes seconds to import
    "DS_ACCELERATOR": "cpu",
    "CUDA_VISIBLE_DEVICES": "",
}


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The novels, tokenized by chapter with a tenth held out."""
    out = tmp_path_factory.mktemp("data") / "novels"
    novels = sorted((ROOT / "data/samples").glob("*.txt"))
    prepare([str(novel) for novel in novels], out, separator="\nChapter ", held_out=0.1)
    return out


@pytest.fixture
def run_file(tmp_path: Path, shards: Path) -> Path:
    """A run of seconds: 16 steps of 16 sequences of 32 tokens, micro-batches of 4."""
    config = {
        "run_dir": str(tmp_path / "run"),
        "model": {
            "preset": "tiny",
            "ffn": "default",
            "d_model": 32,
            "n_layer": 2,
            "n_head": 2,
            "max_seq_len": 32,
        },
        "data": {"path": str(shards)},
        "batch": {"global_tokens": 512, "micro_batch": 4},
        "duration": {"steps": 16},
        "optimizer": {"lr": 3e-3},
        "schedule": {"warmup_steps": 4},
        "checkpoint": {"every": 4},
        "eval": {"every": 8, "max_tokens": 1024},
        "log": {"profile_every": 4},
    }
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def sparse_gpt(*arguments: str | Path, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would."""
    command = [sys.executable, "-m", "launch", *map(str, arguments)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=timeout, cwd=ROOT
    )


def start_ranks(
    run_file: Path, *overrides: str, world_size: int = 2
) -> list[subprocess.Popen[str]]:
    """Start train.py once a rank, as any launcher does, without the launcher's start-up time."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    return [
        subprocess.Popen(
            [sys.executable, str(ROOT / "launch/train.py"), "--config", str(run_file), *overrides],
            env={
                **ENVIRONMENT,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world_size)
    ]


def finish(ranks: list[subprocess.Popen[str]], timeout: float = 180) -> list[str]:
    """Wait for ranks that must succeed; returns what each printed."""
    outputs = [rank.communicate(timeout=timeout)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0] * len(ranks), "\n".join(outputs)
    return outputs


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
