"""What export and import both know of other tools' token files: those of Megatron-LM, of llm.c (and
modded-nanogpt) and of nanoGPT.

    format    two documents a, b     files                              documents     ids
    ours      E a E b                shards, a document in one          an index      uint16, uint32
    llmc      E a E b                shards, cut at any token           found by E    uint16, uint32
    megatron  a E b E                .bin and .idx, a pair a split      an index      uint16, int32
    nanogpt   a E b E                .bin, one a split                  found by E    uint16

E is the vocabulary's end of text. llm.c's header is the head of our own shards (shards.py).

Sources of the formats: Megatron-LM, megatron/core/datasets/indexed_dataset.py; llm.c,
dev/data/data_common.py and llmc/dataloader.h; nanoGPT, data/openwebtext/prepare.py.
"""

import struct
from collections.abc import Mapping
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from sparse_gpt.errors import DataError

Ids = npt.NDArray[np.integer[Any]]
T = TypeVar("T")

# Megatron's index: this head, the lengths of its sequences (int32), the bytes at which they start
# (int64), and the numbers of the sequences between which documents lie (int64).
MEGATRON = struct.Struct("<9sQBQQ")  # magic, version 1, dtype, sequences, document bounds
MEGATRON_MAGIC = b"MMIDIDX\0\0"


def of_format(format: str, table: Mapping[str, T]) -> T:
    """The format's entry in a table; raises DataError if there is none."""
    if format not in table:
        raise DataError(f"format {format!r}; the formats are {', '.join(table)}")
    return table[format]
