"""Corpora become batches; this room knows nothing of models, engines or runs.

    prepare       documents (text, JSON Lines, parquet, the hub) to token shards, resumable
    open_shards   a folder of shards, memory-mapped: .train, .held_out, .manifest
    train_vocab   documents to a byte-pair vocabulary for `prepare`
    verify        every hash of a folder of shards
    Batches       a split as endless batches, the same at any world size and after any resume
    evaluation    one pass over a split
    DataError     bad input, in one line for its user

The files, from text to tensor: documents, streams, rejects, tokenizer, units, workers, claim,
prepare; shards, manifest, reader; order, batches; and files, by which all are published. Only hub
data sets import `datasets`, and only batches imports torch.
"""

from typing import TYPE_CHECKING, Any

from data.claim import part_of_environment
from data.errors import DataError
from data.manifest import Manifest
from data.prepare import prepare
from data.reader import Dataset, Split, open_shards, verify
from data.tokenizer import Tokenizer, load_tokenizer
from data.train_vocab import train_vocab

if TYPE_CHECKING:
    from data.batches import Batch, Batches, evaluation

__all__ = [
    "Batch",
    "Batches",
    "DataError",
    "Dataset",
    "Manifest",
    "Split",
    "Tokenizer",
    "evaluation",
    "load_tokenizer",
    "open_shards",
    "part_of_environment",
    "prepare",
    "train_vocab",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("Batch", "Batches", "evaluation"):  # they cost the import of torch
        import data.batches

        return getattr(data.batches, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
