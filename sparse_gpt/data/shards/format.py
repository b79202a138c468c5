"""One shard on disk: a token file and a document index, written once and never changed.

`NAME.bin`, little-endian: a header of 1,024 bytes, then the tokens, documents back to back, each
opened by the end-of-text id; a document lies in one shard.

    bytes    type    holds
    0-3      int32   20240520 (llm.c's magic for uint16 tokens), 20240801 (for uint32)
    4-7      int32   1 (llm.c's version for uint16), 7 (for uint32)
    8-11     int32   tokens; it always fits, a larger shard is refused
    12-15    uint32  version of this layout: 1
    16-23    bytes   "sprsgpt" and a zero
    24-31    uint64  tokens
    32-39    uint64  documents
    40-43    uint32  bytes a token: 2 (uint16) or 4 (uint32)
    44-47    uint32  id of end of text
    48-51    uint32  where it stands: 1 = before each document
    52-55            zero
    56-87    bytes   sha256 of the vocabulary file
    88-1023          zero

llm.c and modded-nanogpt read the first 12 bytes and the tokens.

`NAME.idx`, little-endian: 16 bytes a document: uint64 start (the token, counted from the shard's
first, at which its end-of-text id stands), uint64 content hash (`content_hash`).

A file is written under a temporary name, flushed to disk and renamed; a name without ".tmp-" is
therefore always a whole file.
"""

import hashlib
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import xxhash
from pydantic import Field

from sparse_gpt.data.vocabulary import Vocabulary
from sparse_gpt.schema import Natural, Sha256

LAYOUT = 1
HEADER_BYTES = 1024
BLOCK_BYTES = 4 << 20
MAX_TOKENS = 2**31 - 1  # what llm.c's count can hold
INDEX = np.dtype([("start", "<u8"), ("hash", "<u8")])
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_HEADER = struct.Struct("<iiiI8sQQIII4x32s")
LLM_C = {2: (20240520, 1), 4: (20240801, 7)}  # magic and version by bytes a token
_TAG = b"sprsgpt\0"


@dataclass(frozen=True)
class FileEntry:
    """What the manifest knows of a file: its size, the sha256 of all of it, and the xxh3-64 of each
    block of 4 MiB (16 hex digits a block, in one string)."""

    bytes: Natural
    sha256: Sha256
    blocks: Annotated[str, Field(pattern=r"^(?:[0-9a-f]{16})*$")]


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows of a shard: `name`.bin and `name`.idx."""

    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=200)]
    tokens: Natural
    documents: Natural
    bin: FileEntry
    idx: FileEntry


def header(tokens: int, documents: int, vocabulary: Vocabulary) -> bytes:
    """The 1,024 bytes before the tokens."""
    itemsize = DTYPES[vocabulary.dtype].itemsize
    vocab_hash = bytes.fromhex(vocabulary.hash)
    packed = _HEADER.pack(
        *LLM_C[itemsize], tokens, LAYOUT, _TAG, tokens, documents, itemsize, vocabulary.eot, 1,
        vocab_hash,
    )  # fmt: skip
    return packed.ljust(HEADER_BYTES, b"\0")


def file_entry(path: Path) -> FileEntry:
    """Size and hashes of a file, read from disk."""
    whole, blocks, size = hashlib.sha256(), [], 0
    with open(path, "rb") as file:
        while block := file.read(BLOCK_BYTES):
            whole.update(block)
            blocks.append(xxhash.xxh3_64_hexdigest(block))
            size += len(block)
    return FileEntry(size, whole.hexdigest(), "".join(blocks))
