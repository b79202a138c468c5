"""Corpora become batches; this room knows nothing of models, engines or runs.

    prepare       documents (text, JSON, CSV, parquet, the hub) to token shards, resumable
    open_shards   a folder of shards, memory-mapped: .train, .held_out, .manifest
    open_blend    several of them in fixed shares
    train_vocab   documents to a byte-pair vocabulary for `prepare`
    verify        every hash of a folder of shards
    import_shards, export_shards   from and to the files of Megatron, llm.c, nanoGPT
    Batches       a split or a blend as endless batches, the same at any world size and resume
    evaluation    one pass over a split
    prefetched    batches read by a thread ahead of their use
    DataError     bad input, in one line for its user

The rooms, from text to tensor: corpus, tokenizer, preparation, shards, batches; beside them interop
and train_vocab. Only hub data sets import `datasets`, and only batches and prefetch torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparse_gpt.data.batches.blend import Blend, Source, open_blend
from sparse_gpt.data.interop.exporting import export_shards
from sparse_gpt.data.interop.importing import import_shards
from sparse_gpt.data.preparation.parts import part_of_environment
from sparse_gpt.data.preparation.prepare import prepare
from sparse_gpt.data.shards.manifest import Manifest
from sparse_gpt.data.shards.reader import Dataset, Split, open_shards, verify
from sparse_gpt.data.tokenizer import Tokenizer, load_tokenizer, tokenizer_beside
from sparse_gpt.data.train_vocab import train_vocab
from sparse_gpt.errors import DataError

if TYPE_CHECKING:
    from sparse_gpt.data.batches.batches import Batch, Batches, evaluation
    from sparse_gpt.data.batches.prefetch import prefetched

__all__ = [
    "Batch",
    "Batches",
    "Blend",
    "DataError",
    "Dataset",
    "Manifest",
    "Source",
    "Split",
    "Tokenizer",
    "evaluation",
    "export_shards",
    "import_shards",
    "load_tokenizer",
    "open_blend",
    "open_shards",
    "part_of_environment",
    "prefetched",
    "prepare",
    "tokenizer_beside",
    "train_vocab",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("Batch", "Batches", "evaluation"):  # they cost the import of torch
        return getattr(import_module("sparse_gpt.data.batches.batches"), name)
    if name == "prefetched":
        return import_module("sparse_gpt.data.batches.prefetch").prefetched
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
