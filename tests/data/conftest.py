"""Real shard folders for the tests of this room."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data.manifest import FORMAT, MANIFEST, write_sealed
from data.manifest import shards_to_json as to_json
from data.prepare import prepare
from data.shards import ShardWriter, Vocabulary

SAMPLES = Path(__file__).parents[2] / "data" / "samples"


def write_folder(
    folder: Path,
    train: list[list[np.ndarray]],
    held_out: list[list[np.ndarray]] = [],  # noqa: B006 - never changed
    dtype: str = "uint16",
    vocab_hash: str = "ab" * 32,
) -> Path:
    """A shard folder out of ready documents: a list of documents for each shard."""
    folder.mkdir(parents=True)
    splits = {}
    for split, shards in (("train", train), ("held_out", held_out)):
        splits[split] = []
        for number, documents in enumerate(shards):
            name = f"{split}-{number:05d}-00-{'0' * 16}"
            writer = ShardWriter(folder, name, Vocabulary(vocab_hash, dtype, 50256))
            for document_hash, document in enumerate(documents):
                writer.add(document, document_hash)
            splits[split].append(writer.finish())
    fields = {
        "format": FORMAT,
        "tokenizer": {"vocab_hash": vocab_hash},
        "dtype": dtype,
        "eot": {"id": 50256},
        "options": {},
        "sources": [],
        "splits": to_json(splits),
    }
    write_sealed(folder / MANIFEST, fields)
    return folder


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Path]:
    return write_folder


@pytest.fixture(scope="session")
def novels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two sample novels, a chapter a document, in many small shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("novels") / "shards"
    prepare([SAMPLES], folder, held_out=0.05, separator="\nChapter ", shard_tokens=20_000)
    return folder
