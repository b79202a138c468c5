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
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from data.errors import DataError
from data.files import publish, temporary

LAYOUT = 1
HEADER_BYTES = 1024
BLOCK_BYTES = 4 << 20
MAX_TOKENS = 2**31 - 1  # what llm.c's count can hold
INDEX = np.dtype([("start", "<u8"), ("hash", "<u8")])
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SPACES = [chr(point) for point in range(0x3001) if chr(point).isspace()]  # no others in Unicode
_WIDE_SPACES = [space for space in _SPACES if not space.isascii()]
_TO_SPACE = bytes(ord(" ") if chr(b).isspace() and b < 128 else b for b in range(256))
_AT_ONCE = 1 << 16  # characters that are hashed together: arrays of these fit in a cache
_HEADER = struct.Struct("<iiiI8sQQIII4x32s")
LLM_C = {2: (20240520, 1), 4: (20240801, 7)}  # magic and version by bytes a token
_TAG = b"sprsgpt\0"


def dtype_for(vocab_size: int) -> str:
    """The narrowest token dtype that holds every id: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


def content_hash(text: str) -> int:
    """xxh3-64 of the text with every run of white space made one space and the ends stripped."""
    return content_hashes([text])[0]


def content_hashes(texts: Iterable[str]) -> list[int]:
    """The `content_hash` of each text; many at a time are three times as fast as `str.split`."""
    found: list[int] = []
    group: list[bytes] = []
    filled = 0
    for text in texts:
        group.append(_ascii_spaced(text) + b" ")  # so that none is empty
        filled += len(text)
        if filled >= _AT_ONCE:
            found += _hashes(group)
            group, filled = [], 0
    return found + _hashes(group) if group else found


def _ascii_spaced(text: str) -> bytes:
    if not text.isascii():
        for space in _WIDE_SPACES:
            if space in text:
                text = text.replace(space, " ")
    return text.encode()


def _hashes(texts: list[bytes]) -> list[int]:
    content = np.frombuffer(b"".join(texts).translate(_TO_SPACE), np.uint8)
    starts = np.cumsum([0, *map(len, texts[:-1])])
    is_space = content == ord(" ")
    keep = np.ones(len(content), np.bool_)
    keep[1:] = ~(is_space[1:] & is_space[:-1])
    keep[starts] = True
    kept = content[keep].tobytes()
    ends = np.cumsum(np.add.reduceat(keep, starts, dtype=np.int64)).tolist()
    return [xxhash.xxh3_64_intdigest(kept[a:b].strip()) for a, b in pairwise([0, *ends])]


@dataclass(frozen=True)
class FileEntry:
    """What the manifest knows of a file: its size, the sha256 of all of it, and the xxh3-64 of each
    block of 4 MiB (16 hex digits a block, in one string)."""

    bytes: int
    sha256: str
    blocks: str


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest knows of a shard: `name`.bin and `name`.idx."""

    name: str
    tokens: int
    documents: int
    bin: FileEntry
    idx: FileEntry


@dataclass(frozen=True)
class Vocabulary:
    """What a shard says of its ids."""

    hash: str  # sha256 (hex) of the vocabulary file
    dtype: str
    eot: int


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


class ShardWriter:
    """Writes one shard; nothing has its name before `finish`."""

    def __init__(self, folder: Path, name: str, vocabulary: Vocabulary) -> None:
        self.tokens = 0
        self._name = name
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._vocabulary = vocabulary
        self._dtype = DTYPES[vocabulary.dtype]
        self._documents = 0
        self._file = open(temporary(self._bin), "wb")  # noqa: SIM115 - closed by finish or close
        self._index = open(temporary(self._idx), "wb")  # noqa: SIM115 - the same
        self._file.write(bytes(HEADER_BYTES))

    def add(self, tokens: npt.NDArray[np.unsignedinteger], document_hash: int) -> None:
        """`extend` by one document."""
        self.extend(tokens, np.array([len(tokens)]), np.array([document_hash], np.uint64))

    def extend(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        lengths: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.uint64],
    ) -> None:
        """Append documents (1-D ids back to back, each opened by end of text, and a length and a
        content hash for each); raises DataError for an id that the shard's dtype cannot hold and
        for more tokens than a shard can count."""
        if tokens.max() > np.iinfo(self._dtype).max:
            raise DataError(f"{self._bin}: id {tokens.max()} does not fit {self._dtype.name}")
        if self.tokens + len(tokens) > MAX_TOKENS:
            raise DataError(f"{self._bin}: more than {MAX_TOKENS} tokens; split the document")
        index = np.empty(len(lengths), INDEX)
        index["start"] = self.tokens + np.cumsum(lengths) - lengths
        index["hash"] = hashes
        self._index.write(index.tobytes())
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._documents += len(lengths)
        self.tokens += len(tokens)

    def finish(self) -> ShardEntry:
        """Publish both files, the index first."""
        self._file.seek(0)
        self._file.write(header(self.tokens, self._documents, self._vocabulary))
        self.close()
        entries = [file_entry(temporary(path)) for path in (self._bin, self._idx)]
        publish(self._idx)
        publish(self._bin)
        return ShardEntry(self._name, self.tokens, self._documents, *entries)

    def close(self) -> None:
        """Let go of an unfinished shard; its temporary files stay for the caller to remove."""
        self._file.close()
        self._index.close()


class Shards:
    """Writes documents into shards of at most `shard_tokens` tokens, one after the other; `name`
    has a place for their numbers."""

    def __init__(self, folder: Path, name: str, vocabulary: Vocabulary, shard_tokens: int) -> None:
        self._folder, self._name, self._vocabulary = folder, name, vocabulary
        self._shard_tokens = shard_tokens
        self._entries: list[ShardEntry] = []
        self._open: ShardWriter | None = None

    def extend(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        lengths: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.uint64],
    ) -> None:
        """As `ShardWriter.extend`, in a new shard where they do not fit."""
        ends = np.cumsum(lengths)
        first = done = 0
        while first < len(ends):
            if self._open is None:
                name = self._name.format(len(self._entries))
                self._open = ShardWriter(self._folder, name, self._vocabulary)
            room = self._shard_tokens - self._open.tokens
            last = int(np.searchsorted(ends, done + room, side="right"))
            if last == first and self._open.tokens:
                self._finish_one(self._open)
                continue
            last = max(last, first + 1)  # a document that is longer than a shard has its own
            end = int(ends[last - 1])
            self._open.extend(tokens[done:end], lengths[first:last], hashes[first:last])
            first, done = last, end

    def finish(self) -> list[ShardEntry]:
        """Publish what is open; all shards."""
        if self._open is not None:
            self._finish_one(self._open)
        return self._entries

    def _finish_one(self, writer: ShardWriter) -> None:
        self._entries.append(writer.finish())
        self._open = None

    def close(self) -> None:
        """Let go of what is unfinished."""
        if self._open is not None:
            self._open.close()
