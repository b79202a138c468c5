"""A small data set and run file for the tests of `launch`."""

from pathlib import Path

import pytest
import yaml
from ranks import ROOT

from sparse_gpt.data import prepare, train_vocab


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The novels, tokenized by chapter with a tenth held out, in a vocabulary of 1,024 ids."""
    folder = tmp_path_factory.mktemp("data")
    novels = sorted(map(str, (ROOT / "data/novels").glob("*.txt")))
    chapters = {"separator": "\nChapter ", "held_out": 0.1}
    train_vocab(novels, folder / "bpe", size=1024, **chapters, progress=False)
    prepare(novels, folder / "novels", vocab=folder / "bpe", **chapters)
    return folder / "novels"


@pytest.fixture(scope="session")
def gpt2_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in GPT-2's vocabulary."""
    out = tmp_path_factory.mktemp("gpt2") / "novels"
    novels = sorted(map(str, (ROOT / "data/novels").glob("*.txt")))
    prepare(novels, out, separator="\nChapter ", held_out=0.1)
    return out


@pytest.fixture
def gpt2_run_file(run_file: Path, gpt2_shards: Path) -> Path:
    """`run_file` on those."""
    tree = yaml.safe_load(run_file.read_text())
    tree["data"]["path"], tree["model"]["vocab_size"] = str(gpt2_shards), 50257
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


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
            "vocab_size": 1024,
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
