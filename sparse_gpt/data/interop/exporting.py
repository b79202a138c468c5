"""Shards to the files of Megatron-LM, llm.c (modded-nanogpt too) and nanoGPT, as formats.py shows.

A split can be read as a circle, so `a E b E` is ours from its second token on: an export copies
large pieces, whatever documents lie in them. It fills a hidden folder that gets its name when it is
whole.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sparse_gpt.data.interop.formats import MEGATRON, MEGATRON_MAGIC, Ids, of_format
from sparse_gpt.data.shards.format import HEADER_BYTES, INDEX, LLM_C, MAX_TOKENS, ShardEntry
from sparse_gpt.data.shards.reader import Dataset, Split, open_shards
from sparse_gpt.errors import DataError
from sparse_gpt.files import new_folder, real
from sparse_gpt.progress import Progress

Done = Callable[[int], None]  # counts bytes of tokens as written

_PIECE = 4 << 20  # tokens or documents copied at once


def export_shards(
    folder: str | Path,
    format: str,
    out: str | Path,
    *,
    shard_tokens: int = 100_000_000,
    progress: bool = False,
) -> list[Path]:
    """Write a folder of shards as another tool's files into the new folder `out`; their paths.

    format        "megatron": train.bin and .idx, valid.bin and .idx
                  "llmc": OUT_train_000001.bin, …, OUT_val_000000.bin, …, where OUT is out's name
                  "nanogpt": train.bin, val.bin
                  A split without tokens has no file.
    shard_tokens  for "llmc": tokens a file at most; the files of a split are equally long, to a
                  token, because llm.c refuses a file that is shorter than a batch
    progress      draw progress on stderr, if that is a terminal

    Raises DataError if the folder cannot be opened or is empty, if `out` is not new, if an id is
    too large for the format, or if a document holds end of text and the format has no index.
    """
    write, dataset = of_format(format, _WRITERS), open_shards(folder)
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise DataError(f"shard_tokens is {shard_tokens}; it must lie in 1 … {MAX_TOKENS}")
    splits = [split for split in (dataset.train, dataset.held_out) if split.n_tokens]
    if not splits:
        raise DataError(f"{folder}: its splits are empty; there is nothing to export")
    n_bytes = sum(split.n_tokens * split.dtype.itemsize for split in splits)
    with new_folder(out) as aside, Progress("exporting", n_bytes, progress) as bar:
        for split in splits:
            write(dataset, split, aside, real(out).name, shard_tokens, bar.advance)
    return sorted(Path(out).iterdir())


def _write_megatron(
    dataset: Dataset, split: Split, out: Path, name: str, shard_tokens: int, done: Done
) -> None:
    path = out / ("train.bin" if split is dataset.train else "valid.bin")
    dtype, code = (np.dtype("<u2"), 8) if split.dtype.itemsize == 2 else (np.dtype("<i4"), 4)
    with open(path, "wb") as file:
        for piece in _pieces(split, 1, split.n_tokens, dtype, done):
            file.write(piece.data)
    with open(path.with_suffix(".idx"), "wb") as file:
        _write_index(file, dataset, split, code, dtype.itemsize)


def _write_index(file: BinaryIO, dataset: Dataset, split: Split, code: int, itemsize: int) -> None:
    """Megatron's index; each document is a sequence."""
    shards, n = dataset.manifest.splits[split.name], split.n_documents

    def starts(shard: ShardEntry) -> Ids:
        return np.fromfile(split.folder / f"{shard.name}.idx", INDEX)["start"].astype("<i8")

    file.write(MEGATRON.pack(MEGATRON_MAGIC, 1, code, n, n + 1))
    for shard in shards:
        file.write(np.diff(starts(shard), append=shard.tokens).astype("<i4").data)
    first = 0
    for shard in shards:
        file.write(((first + starts(shard)) * itemsize).data)
        first += shard.tokens
    for bound in range(0, n + 1, _PIECE):
        file.write(np.arange(bound, min(bound + _PIECE, n + 1), dtype="<i8").data)


def _write_llmc(
    dataset: Dataset, split: Split, out: Path, name: str, shard_tokens: int, done: Done
) -> None:
    kind, lowest = ("train", 1) if split is dataset.train else ("val", 0)
    files = -(-split.n_tokens // shard_tokens)
    bounds = [split.n_tokens * i // files for i in range(files + 1)]
    ends = 0
    for number, (start, end) in enumerate(pairwise(bounds), lowest):
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = *LLM_C[split.dtype.itemsize], end - start
        with open(out / f"{name}_{kind}_{number:06d}.bin", "wb") as file:
            file.write(header.data)
            for piece in _pieces(split, start, end - start, split.dtype, done):
                ends += np.count_nonzero(piece == dataset.manifest.eot["id"])
                file.write(piece.data)
    _refuse_other_documents(split, ends)


def _write_nanogpt(
    dataset: Dataset, split: Split, out: Path, name: str, shard_tokens: int, done: Done
) -> None:
    ends = 0
    with open(out / ("train.bin" if split is dataset.train else "val.bin"), "wb") as file:
        for piece in _pieces(split, 1, split.n_tokens, np.dtype("<u2"), done):
            ends += np.count_nonzero(piece == dataset.manifest.eot["id"])
            file.write(piece.data)
    _refuse_other_documents(split, ends)


def _pieces(
    split: Split, start: int, count: int, dtype: np.dtype[Any], done: Done
) -> Iterator[Ids]:
    """`count` tokens from `start` on, around the end of the split, in pieces."""
    for first in range(start, start + count, _PIECE):
        piece = np.empty((1, min(_PIECE, start + count - first)), split.dtype)
        split.read(np.array([first]), piece)
        if dtype != split.dtype and (largest := int(piece.max())) > np.iinfo(dtype).max:
            place = (first + int(piece.argmax())) % split.n_tokens
            raise DataError(
                f"{split.folder} ({split.name}): token {place} is {largest}; this format holds "
                f"{dtype.name} and no id above {np.iinfo(dtype).max}"
            )
        yield piece[0].astype(dtype, copy=False)
        done(piece.nbytes)


def _refuse_other_documents(split: Split, ends: int) -> None:
    if ends != split.n_documents:
        raise DataError(
            f"{split.folder} ({split.name}): {split.n_documents} documents hold {ends} ends of "
            "text, by which this format finds documents; megatron keeps ours in an index"
        )


_WRITERS = {"megatron": _write_megatron, "llmc": _write_llmc, "nanogpt": _write_nanogpt}
