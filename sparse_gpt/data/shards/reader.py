"""Opening, reading and verifying a folder of shards.

Opening reads the manifest and the shards' headers and checks sizes: O(shards), no hashing, and
memory that does not grow with the tokens. Shards are mapped when first read.
"""

import mmap
import os
import resource
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_gpt.data.shards.format import (
    BLOCK_BYTES,
    DTYPES,
    HEADER_BYTES,
    INDEX,
    ShardEntry,
    file_entry,
)
from sparse_gpt.data.shards.format import header as shard_header
from sparse_gpt.data.shards.manifest import SPLITS, Manifest, read_manifest
from sparse_gpt.data.shards.remote import local_folder
from sparse_gpt.data.vocabulary import Vocabulary
from sparse_gpt.errors import DataError
from sparse_gpt.progress import Progress

_held: deque[tuple[dict[int, Any], int]] = deque()  # whose map of which shard, oldest first


class Split:
    """The tokens of one split, read as one circular stream.

    name        "train" or "held_out"
    dtype       numpy dtype of the tokens, uint16 or uint32
    n_tokens    tokens, end-of-text ids included          n_documents  documents
    hash        sha256 (hex) over the hashes of its token files, in order
    """

    def __init__(self, folder: Path, name: str, manifest: Manifest) -> None:
        shards = manifest.splits[name]
        self.folder, self.name = folder, name
        self.dtype = DTYPES[manifest.dtype]
        self.n_tokens = manifest.tokens(name)
        self.n_documents = manifest.documents(name)
        self.hash = sha256("".join(shard.bin.sha256 for shard in shards).encode()).hexdigest()
        self._paths = [folder / shard.name for shard in shards]
        self._counts = np.array([shard.tokens for shard in shards], np.int64)
        self._ends = np.cumsum(self._counts)
        self._documents = np.cumsum([shard.documents for shard in shards])
        self._maps: dict[int, npt.NDArray[np.unsignedinteger]] = {}
        self._opens: dict[int, npt.NDArray[np.uint64]] = {}

    def read(
        self,
        starts: npt.NDArray[np.int64],
        out: npt.NDArray[np.unsignedinteger] | Sequence[npt.NDArray[np.unsignedinteger]],
    ) -> None:
        """Fill out[i] (out: (k, n), or k rows of n, of `dtype`) with the n tokens from token
        starts[i] on.

        Starts are taken modulo n_tokens; after the last token comes the first.
        """
        starts = starts % self.n_tokens
        shards = np.searchsorted(self._ends, starts, side="right")
        counts = self._counts[shards]
        firsts = starts - (self._ends[shards] - counts)
        length = len(out[0])
        inside = firsts + length <= counts
        maps = self._maps
        places = zip(out, shards.tolist(), firsts.tolist(), inside.tolist(), strict=True)
        for row, shard, first, is_inside in places:
            if not is_inside:
                self._read_across(shard, first, row)
            elif (tokens := maps.get(shard)) is not None:
                row[:] = tokens[first : first + length]
            else:
                row[:] = self._map(shard)[first : first + length]

    def documents(self, starts: npt.NDArray[np.int64], length: int) -> npt.NDArray[np.int32]:
        """The document of each of the `length` tokens from token starts[i] on, `(k, length)`:
        numbered from 0 in each row. Read from the index, whatever the ids are."""
        out = np.zeros((len(starts), length), np.int32)
        starts = starts % self.n_tokens
        shards = np.searchsorted(self._ends, starts, side="right")
        firsts = starts - (self._ends[shards] - self._counts[shards])
        for row, shard, first in zip(out, shards.tolist(), firsts.tolist(), strict=True):
            filled = 0
            while True:
                opens = self._index(shard)
                end = first + length - filled
                inside = opens[bisect_right(opens, first) : bisect_left(opens, end)]
                row[inside.astype(np.int64) - first + filled] = 1
                filled += int(self._counts[shard]) - first
                if filled >= length:
                    break
                row[filled] = 1  # the next shard begins with a document
                shard, first = (shard + 1) % len(self._paths), 0
        return out.cumsum(1, dtype=np.int32)

    def document(self, number: int) -> npt.NDArray[np.unsignedinteger]:
        """The tokens of a document, counted from 0, without the end of text before it."""
        shard = int(np.searchsorted(self._documents, number, side="right"))
        opens = self._index(shard)
        at = number - int(self._documents[shard]) + len(opens)
        end = opens[at + 1] if at + 1 < len(opens) else self._counts[shard]
        return self._map(shard)[int(opens[at]) + 1 : int(end)]

    def lengths(self) -> npt.NDArray[np.uint32]:
        """The tokens of each document, `(n_documents,)`, without the end of text before it."""
        found = [
            np.diff(self._index(shard), append=np.uint64(count)) - np.uint64(1)
            for shard, count in enumerate(self._counts)
        ]
        return np.concatenate([np.empty(0, np.uint32), *found], dtype=np.uint32, casting="unsafe")

    def hashes(self) -> Iterator[npt.NDArray[np.uint64]]:
        """The content hash of each document, a shard at a time, as they are mapped."""
        for path in self._paths:
            yield _mapped(path.with_suffix(".idx"), INDEX, -1, 0)["hash"]

    def pieces(self, size: int) -> Iterator[npt.NDArray[np.unsignedinteger]]:
        """All tokens in their order, at most `size` at a time, as they are mapped."""
        for shard, count in enumerate(self._counts.tolist()):
            for start in range(0, count, size):
                yield self._map(shard)[start : start + size]

    def _read_across(self, shard: int, first: int, row: npt.NDArray[np.unsignedinteger]) -> None:
        filled = 0
        while filled < len(row):
            piece = self._map(shard)[first : first + len(row) - filled]
            row[filled : filled + len(piece)] = piece
            filled += len(piece)
            shard, first = (shard + 1) % len(self._paths), 0

    def _map(self, shard: int) -> npt.NDArray[np.unsignedinteger]:
        """The tokens of a shard."""
        if (tokens := self._maps.get(shard)) is None:
            path, count = self._paths[shard].with_suffix(".bin"), int(self._counts[shard])
            tokens = _mapped(path, self.dtype, count, HEADER_BYTES)
            _hold(self._maps, shard, tokens)
        return tokens

    def _index(self, shard: int) -> npt.NDArray[np.uint64]:
        """The tokens of a shard, counted from its first, at which its documents begin."""
        if (opens := self._opens.get(shard)) is None:
            opens = _mapped(self._paths[shard].with_suffix(".idx"), INDEX, -1, 0)["start"]
            _hold(self._opens, shard, opens)
        return opens


def _mapped(path: Path, dtype: np.dtype[Any], count: int, offset: int) -> npt.NDArray[Any]:
    try:
        with open(path, "rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return np.frombuffer(mapped, dtype, count, offset)
    except (FileNotFoundError, ValueError) as error:  # gone, or shorter than it was
        raise DataError(f"{path}: changed since it was opened: {error}") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _most_maps() -> int:
    """How many shards of all splits are mapped at once: a map holds a file descriptor, of which
    this process gets as many as the system allows, and half are left to others."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        wanted = hard if hard != resource.RLIM_INFINITY else 1 << 16
        with suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(wanted, 1 << 16)), hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(8, min(4096, soft // 2))


def _hold(maps: dict[int, Any], shard: int, mapped: npt.NDArray[Any]) -> None:
    while len(_held) >= _most_maps():
        oldest, number = _held.popleft()
        oldest.pop(number, None)  # two threads may have mapped it at once
    _held.append((maps, shard))
    maps[shard] = mapped


@dataclass(frozen=True)
class Dataset:
    """An opened folder of shards."""

    train: Split
    held_out: Split
    manifest: Manifest


def open_shards(folder: str | Path) -> Dataset:
    """Open a folder that `prepare` wrote, or its URL (data/remote.py).

    Raises DataError if it is unfinished, foreign or truncated, or if a header contradicts the
    manifest.
    """
    folder = local_folder(folder)
    manifest = read_manifest(folder)
    made_with = manifest.vocabulary
    for split in SPLITS:
        for shard in manifest.splits[split]:
            _check(folder, shard, made_with)
    train, held_out = (Split(folder, split, manifest) for split in SPLITS)
    return Dataset(train, held_out, manifest)


def _check(folder: Path, shard: ShardEntry, vocabulary: Vocabulary) -> None:
    base = f"{folder}/{shard.name}"
    try:
        with open(f"{base}.bin", "rb", buffering=0) as file:
            size, head = os.fstat(file.fileno()).st_size, file.read(HEADER_BYTES)
        index_size = os.stat(f"{base}.idx").st_size
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: is missing; run the same prepare again") from None
    except OSError as error:
        raise DataError(f"{error.filename}: cannot be read: {error.strerror}") from None
    for suffix, found, listed in (
        ("bin", size, shard.bin.bytes),
        ("idx", index_size, shard.idx.bytes),
    ):
        if found != listed:
            raise DataError(
                f"{base}.{suffix}: {found:,} bytes, but the manifest says {listed:,}: truncated or "
                "replaced; run the same prepare again"
            )
    if head != shard_header(shard.tokens, shard.documents, vocabulary):
        raise DataError(f"{base}.bin: its header is not the manifest's; run the same prepare again")


def damages(folder: Path, shard: ShardEntry) -> list[str]:
    """One line for each damaged place of a shard's two files, hashing all of them."""
    found = []
    for suffix, listed in (("bin", shard.bin), ("idx", shard.idx)):
        path = folder / f"{shard.name}.{suffix}"
        try:
            entry = file_entry(path)
        except OSError as error:
            found.append(f"{path}: {error.strerror}")
            continue
        if entry.bytes != listed.bytes:
            found.append(f"{path}: {entry.bytes:,} bytes, the manifest says {listed.bytes:,}")
        if entry.sha256 == listed.sha256:
            continue
        blocks = range(0, min(len(entry.blocks), len(listed.blocks)), 16)
        bad = [i // 16 for i in blocks if entry.blocks[i : i + 16] != listed.blocks[i : i + 16]]
        found += [
            f"{path}: block {b} (bytes {b * BLOCK_BYTES:,} to "
            f"{min((b + 1) * BLOCK_BYTES, listed.bytes):,}) is damaged"
            for b in bad
        ] or [f"{path}: sha256 differs from the manifest's"]
    return found


def verify(folder: str | Path, progress: bool = False) -> list[str]:
    """Check every hash of a folder of shards: one line, naming file and block, for each damage; an
    empty list if all is whole. `progress` draws it on stderr, if that is a terminal. Raises
    DataError if the manifest itself is missing or damaged."""
    folder = local_folder(folder)
    manifest = read_manifest(folder)
    shards = [shard for split in SPLITS for shard in manifest.splits[split]]
    sizes = [shard.bin.bytes + shard.idx.bytes for shard in shards]
    found: list[str] = []
    bar = Progress("verifying", sum(sizes), progress)
    with bar, ThreadPoolExecutor() as pool:  # hashing lets go of Python's lock
        for size, of_one in zip(sizes, pool.map(partial(damages, folder), shards), strict=True):
            found += of_one
            bar.advance(size)
    return found
