"""Corpora become batches; this room knows nothing of models, engines or runs.

    prepare       documents (text, JSON Lines, parquet, the hub) to token shards, resumable
    open_shards   a folder of shards, memory-mapped: .train, .held_out, .manifest
    open_blend    several of them in fixed shares
    train_vocab   documents to a byte-pair vocabulary for `prepare`
    verify        every hash of a folder of shards
    import_shards, export_shards   from and to the files of Megatron, llm.c, nanoGPT
    Batches       a split or a blend as endless batches, the same at any world size and resume
    evaluation    one pass over a split
    prefetched    batches read by a thread ahead of their use
    DataError     bad input, in one line for its user

The files, from text to tensor: sources, cutting, streams, hub, documents, rejects, tokenizer,
units, workers, claim, prepare; shards, manifest, remote, reader, blend; exporting, importing, and
formats, what both know; order, batches, prefetch; and for all of them files, by which they publish,
and progress. Only hub data sets import `datasets`, and only batches and prefetch torch.
"""

from typing import TYPE_CHECKING, Any

from data.blend import Blend, Source, open_blend
from data.claim import part_of_environment
from data.errors import DataError
from data.exporting import export_shards
from data.importing import import_shards
from data.manifest import Manifest
from data.prepare import prepare
from data.reader import Dataset, Split, open_shards, verify
from data.tokenizer import Tokenizer, load_tokenizer
from data.train_vocab import train_vocab

if TYPE_CHECKING:
    from data.batches import Batch, Batches, evaluation
    from data.prefetch import prefetched

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
    "train_vocab",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name in ("Batch", "Batches", "evaluation"):  # they cost the import of torch
        import data.batches

        return getattr(data.batches, name)
    if name == "prefetched":
        import data.prefetch

        return data.prefetch.prefetched
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
