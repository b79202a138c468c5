"""Shards to and from the files of Megatron-LM, llm.c (and modded-nanogpt) and nanoGPT.

    format    two documents a, b     files                              documents     ids
    ours      E a E b                shards, a document in one          an index      uint16, uint32
    llmc      E a E b                shards, cut at any token           found by E    uint16, uint32
    megatron  a E b E                .bin and .idx, a pair a split      an index      uint16, int32
    nanogpt   a E b E                .bin, one a split                  found by E    uint16

E is the vocabulary's end of text. A split can be read as a circle, so `a E b E` is ours from its
second token on: an export copies large pieces, whatever documents lie in them. An import cuts the
tokens into documents, opens each with E, decodes it for its content hash, and writes shards as
`prepare` does. Memory grows with the longest document, not with the tokens.

Either fills a hidden folder that gets its name when it is whole.

Sources of the formats: Megatron-LM, megatron/core/datasets/indexed_dataset.py; llm.c,
dev/data/data_common.py and llmc/dataloader.h; nanoGPT, data/openwebtext/prepare.py.
"""

import fcntl
import glob
import hashlib
import json
import os
import shutil
import struct
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
import numpy.typing as npt
import xxhash

from data.errors import DataError
from data.files import lock, publish, sync, temporary
from data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    read_manifest,
    shards_to_json,
    write_sealed,
)
from data.reader import Dataset, Split, open_shards
from data.shards import (
    DTYPES,
    HEADER_BYTES,
    INDEX,
    LLM_C,
    MAX_TOKENS,
    ShardEntry,
    ShardWriter,
    Vocabulary,
    content_hash,
    dtype_for,
)
from data.tokenizer import Tokenizer, load_tokenizer

Ids = npt.NDArray[np.integer[Any]]
Document = npt.NDArray[np.uint32]  # ids, end of text first
T = TypeVar("T")

_PIECE = 4 << 20  # tokens, documents or bytes handled at once
_LONGEST = 1 << 26  # tokens of an imported document; its decoding takes some 40 bytes for each
_INDEX = struct.Struct("<9sQBQQ")  # Megatron's: magic, version, dtype, sequences, document bounds
_INDEX_MAGIC = b"MMIDIDX\0\0"
_INDEX_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6 and 7 are floats


def export_shards(
    folder: str | Path, format: str, out: str | Path, *, shard_tokens: int = 100_000_000
) -> list[Path]:
    """Write a folder of shards as another tool's files into the new folder `out`; their paths.

    format        "megatron": train.bin and .idx, valid.bin and .idx
                  "llmc": OUT_train_000001.bin, …, OUT_val_000000.bin, …, where OUT is out's name
                  "nanogpt": train.bin, val.bin
                  A split without tokens has no file.
    shard_tokens  for "llmc": tokens a file at most; the files of a split are equally long, to a
                  token, because llm.c refuses a file that is shorter than a batch

    Raises DataError if the folder cannot be opened or is empty, if `out` is not new, if an id is
    too large for the format, or if a document holds end of text and the format has no index.
    """
    write, dataset = _of(format, _WRITERS), open_shards(folder)
    if not 1 <= shard_tokens <= MAX_TOKENS:
        raise DataError(f"shard_tokens is {shard_tokens}; it must lie in 1 … {MAX_TOKENS}")
    splits = [split for split in (dataset.train, dataset.held_out) if split.n_tokens]
    if not splits:
        raise DataError(f"{folder}: its splits are empty; there is nothing to export")
    with _whole(out) as aside:
        for split in splits:
            write(dataset, split, aside, Path(out).resolve().name, shard_tokens)
    return sorted(Path(out).iterdir())


def import_shards(
    sources: Sequence[str | Path],
    format: str,
    out: str | Path,
    *,
    held_out: Sequence[str | Path] = (),
    vocab: str | Path | None = None,
    shard_tokens: int = 100_000_000,
) -> Manifest:
    """Make another tool's files the new shard folder `out`.

    sources       token files to train on, in the order of their tokens: paths or globs, for
                  "megatron" also prefixes (the path without .bin)
    format        "megatron", "llmc" or "nanogpt"
    held_out      the same for validation
    vocab         the rank file that the ids belong to; None: GPT-2's
    shard_tokens  tokens a shard at most, unless one document is longer

    Raises DataError if a file is missing, empty, damaged or given twice, if an id lies beyond the
    vocabulary, a document has more than 67M tokens, or `out` is not new.
    """
    documents, tokenizer = _of(format, _READERS), load_tokenizer(vocab)
    if shard_tokens < 1:
        raise DataError(f"shard_tokens is {shard_tokens}; it must be at least 1")
    paths = [_find(of_split, format) for of_split in (sources, held_out)]
    if not paths[0]:
        raise DataError("no source given: name token files to train on")
    for path, times in Counter(path.resolve() for path in chain(*paths)).items():
        if times > 1:
            raise DataError(f"{path}: given twice, to train on or to hold out; name it once")
    identity = {**tokenizer.identity(), "engine": format, "version": "unknown"}
    options = {"import": format, "held_out_files": len(paths[1]), "shard_tokens": shard_tokens}
    with _whole(out) as aside:
        rows = [_row(file) for path in chain(*paths) for file in _files(path, format)]
        key = hashlib.sha256(json.dumps([identity, options, rows]).encode()).hexdigest()[:16]
        shards = {
            split: _write_shards(
                aside,
                f"{split}-00000",
                key,
                documents(of_split, tokenizer),
                tokenizer,
                shard_tokens,
            )
            for split, of_split in zip(SPLITS, paths, strict=True)
        }
        manifest = {
            "format": FORMAT,
            "tokenizer": identity,
            "dtype": dtype_for(tokenizer.vocab_size),
            "eot": {"id": tokenizer.eot, "position": "before each document"},
            "options": options,
            "sources": rows,
            "splits": shards_to_json(shards),
        }
        write_sealed(aside / MANIFEST, manifest)
    return read_manifest(out)


def _write_shards(
    folder: Path,
    name: str,
    key: str,
    documents: Iterator[npt.NDArray[np.unsignedinteger]],
    tokenizer: Tokenizer,
    shard_tokens: int,
) -> list[ShardEntry]:
    vocabulary = Vocabulary(tokenizer.vocab_hash, dtype_for(tokenizer.vocab_size), tokenizer.eot)
    entries: list[ShardEntry] = []
    writer: ShardWriter | None = None
    try:
        for ids in documents:
            if writer is not None and writer.tokens + len(ids) > shard_tokens:
                entries.append(writer.finish())
                writer = None
            writer = writer or ShardWriter(folder, f"{name}-{len(entries):02d}-{key}", vocabulary)
            writer.add(ids, content_hash(tokenizer.decode(ids[1:])))
        return [*entries, writer.finish()] if writer is not None else entries
    finally:
        if writer is not None:
            writer.close()


def _of(format: str, table: Mapping[str, T]) -> T:
    if format not in table:
        raise DataError(f"format {format!r}; the formats are {', '.join(table)}")
    return table[format]


@contextmanager
def _whole(out: str | Path) -> Iterator[Path]:
    """A folder to fill: it becomes `out` at the end, and goes where that is not reached."""
    out = Path(out).resolve()
    aside = temporary(out)
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise DataError(f"{out}: is there already; choose another folder")
        aside.mkdir(parents=True, exist_ok=True)
        with _alone(aside):
            for left_by_a_killed_run in aside.iterdir():
                left_by_a_killed_run.unlink()
            try:
                yield aside
                for path in aside.iterdir():
                    sync(path)
                publish(out)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                for folder in missing:  # the innermost first
                    folder.rmdir()
                raise
    except OSError as error:
        raise DataError(f"{error.filename or out}: {error.strerror}") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Refuse a second process."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        lock(handle, fcntl.LOCK_EX, folder, "run")
        yield
    finally:
        os.close(handle)


# Ours to theirs: one split into the folder `out`.


def _write_megatron(
    dataset: Dataset, split: Split, out: Path, name: str, shard_tokens: int
) -> None:
    path = out / ("train.bin" if split is dataset.train else "valid.bin")
    dtype, code = (np.dtype("<u2"), 8) if split.dtype.itemsize == 2 else (np.dtype("<i4"), 4)
    with open(path, "wb") as file:
        for piece in _pieces(split, 1, split.n_tokens, dtype):
            file.write(piece.data)
    with open(path.with_suffix(".idx"), "wb") as file:
        _write_index(file, dataset, split, code, dtype.itemsize)


def _write_index(file: BinaryIO, dataset: Dataset, split: Split, code: int, itemsize: int) -> None:
    """Megatron's index: after the header the lengths (int32) and byte offsets (int64) of its
    sequences, then the sequences between which documents lie (int64); a sequence is a document."""
    shards, n = dataset.manifest.splits[split.name], split.n_documents

    def starts(shard: ShardEntry) -> Ids:
        return np.fromfile(split.folder / f"{shard.name}.idx", INDEX)["start"].astype("<i8")

    file.write(_INDEX.pack(_INDEX_MAGIC, 1, code, n, n + 1))
    for shard in shards:
        file.write(np.diff(starts(shard), append=shard.tokens).astype("<i4").data)
    first = 0
    for shard in shards:
        file.write(((first + starts(shard)) * itemsize).data)
        first += shard.tokens
    for bound in range(0, n + 1, _PIECE):
        file.write(np.arange(bound, min(bound + _PIECE, n + 1), dtype="<i8").data)


def _write_llmc(dataset: Dataset, split: Split, out: Path, name: str, shard_tokens: int) -> None:
    kind, lowest = ("train", 1) if split is dataset.train else ("val", 0)
    files = -(-split.n_tokens // shard_tokens)
    bounds = [split.n_tokens * i // files for i in range(files + 1)]
    ends = 0
    for number, (start, end) in enumerate(pairwise(bounds), lowest):
        header = np.zeros(HEADER_BYTES // 4, "<i4")
        header[:3] = *LLM_C[split.dtype.itemsize], end - start
        with open(out / f"{name}_{kind}_{number:06d}.bin", "wb") as file:
            file.write(header.data)
            for piece in _pieces(split, start, end - start, split.dtype):
                ends += np.count_nonzero(piece == dataset.manifest.eot["id"])
                file.write(piece.data)
    _refuse_other_documents(split, ends)


def _write_nanogpt(dataset: Dataset, split: Split, out: Path, name: str, shard_tokens: int) -> None:
    ends = 0
    with open(out / ("train.bin" if split is dataset.train else "val.bin"), "wb") as file:
        for piece in _pieces(split, 1, split.n_tokens, np.dtype("<u2")):
            ends += np.count_nonzero(piece == dataset.manifest.eot["id"])
            file.write(piece.data)
    _refuse_other_documents(split, ends)


def _pieces(split: Split, start: int, count: int, dtype: np.dtype[Any]) -> Iterator[Ids]:
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


def _refuse_other_documents(split: Split, ends: int) -> None:
    if ends != split.n_documents:
        raise DataError(
            f"{split.folder} ({split.name}): {split.n_documents} documents hold {ends} ends of "
            "text, by which this format finds documents; megatron keeps ours in an index"
        )


# Theirs to ours: the documents (1-D ids, end of text first) in the token files of one split.


def _megatron_documents(paths: list[Path], tokenizer: Tokenizer) -> Iterator[Document]:
    end = np.array([tokenizer.eot], np.uint32)
    for path in paths:
        dtype, pointers, bounds = _read_index(path)
        tokens = _mapped(path, dtype)
        for first in range(0, len(bounds) - 1, _PIECE):
            sequences = bounds[first : first + _PIECE + 1]
            inside = np.minimum(sequences, len(pointers) - 1)
            places = np.where(inside < sequences, tokens.nbytes, pointers[inside])
            for start, stop in pairwise((places // dtype.itemsize).tolist()):
                _refuse_endless(stop - start, path, tokenizer)
                document = tokens[start:stop]
                _check_ids(document, path, start, tokenizer)
                if len(document) and document[-1] == tokenizer.eot:
                    document = document[:-1]
                yield _join((end, document))


def _read_index(path: Path) -> tuple[np.dtype[Any], Ids, Ids]:
    """Of a Megatron token file, from the index beside it: the dtype of the tokens, the byte at
    which each sequence starts, and the sequence at which each document starts, then their number.
    """
    index, size = path.with_suffix(".idx"), path.stat().st_size
    content = _mapped(index, np.dtype("u1"))
    head = content[: _INDEX.size].tobytes().ljust(_INDEX.size, b"\0")
    magic, version, code, n, n_bounds = _INDEX.unpack(head)
    if (magic, version) != (_INDEX_MAGIC, 1) or code not in _INDEX_DTYPES:
        raise DataError(f"{index}: not an index of Megatron's for token ids, in version 1")
    expected = _INDEX.size + 12 * n + 8 * n_bounds
    if len(content) != expected:
        raise DataError(f"{index}: {len(content):,} bytes, but its header says {expected:,}")
    if not n or not n_bounds:
        raise DataError(f"{index}: holds no documents; leave it out")
    dtype = np.dtype(_INDEX_DTYPES[code])
    lengths = np.ndarray(n, "<i4", content.data, _INDEX.size)
    pointers = np.ndarray(n, "<i8", content.data, _INDEX.size + 4 * n)
    bounds = np.ndarray(n_bounds, "<i8", content.data, _INDEX.size + 12 * n)
    sound = bool(pointers[0] == bounds[0] == 0 and bounds[-1] == n)
    for first in range(0, n, _PIECE):
        sizes = lengths[first : first + _PIECE].astype(np.int64) * dtype.itemsize
        ends = np.append(pointers[first + 1 : first + 1 + _PIECE], size)[: len(sizes)]
        sound &= bool(((ends - pointers[first : first + _PIECE] == sizes) & (sizes >= 0)).all())
    for first in range(0, n_bounds, _PIECE):
        sound &= bool((np.diff(bounds[first : first + _PIECE + 1]) >= 0).all())
    if not sound:
        raise DataError(f"{index}: its sequences do not cover the {size:,} bytes of {path.name}")
    return dtype, pointers, bounds


def _llmc_documents(paths: list[Path], tokenizer: Tokenizer) -> Iterator[Document]:
    return _cut(paths, _llmc_tokens, tokenizer, after=False)


def _llmc_tokens(path: Path) -> Ids:
    magic, version, count = np.append(np.fromfile(path, "<i4", 3), (0, 0, 0))[:3].tolist()
    itemsize = next((n for n, known in LLM_C.items() if known == (magic, version)), None)
    if itemsize is None:
        raise DataError(f"{path}: not a token file of llm.c: another magic number or version")
    expected, size = HEADER_BYTES + itemsize * count, path.stat().st_size
    if size != expected:
        raise DataError(f"{path}: {size:,} bytes, but its header says {expected:,}")
    return _mapped(path, DTYPES[f"uint{8 * itemsize}"], HEADER_BYTES)


def _nanogpt_documents(paths: list[Path], tokenizer: Tokenizer) -> Iterator[Document]:
    return _cut(paths, lambda path: _mapped(path, DTYPES["uint16"]), tokenizer, after=True)


def _cut(
    paths: list[Path], tokens_of: Callable[[Path], Ids], tokenizer: Tokenizer, after: bool
) -> Iterator[Document]:
    """The documents of a stream that goes on from file to file, found by the ends of text, which
    stand before or `after` each; what stands outside the first or the last one is a document too.
    """
    end = np.array([tokenizer.eot], np.uint32)
    begun: list[Ids] = []  # pieces of a document whose other end is ahead
    for path in paths:
        tokens = tokens_of(path)
        if path is paths[0] and (after or tokens[0] != tokenizer.eot):
            begun.append(end)
        if path is paths[-1] and after and tokens[-1] == tokenizer.eot:
            tokens = tokens[:-1]
        for first in range(0, len(tokens), _PIECE):
            piece = tokens[first : first + _PIECE]
            _check_ids(piece, path, first, tokenizer)
            start = 0
            for stop in np.flatnonzero(piece == tokenizer.eot).tolist():
                if begun or start < stop:
                    yield _join((*begun, piece[start:stop]))
                begun, start = [], stop
            begun.append(piece[start:])
            _refuse_endless(sum(map(len, begun)), path, tokenizer)
    if begun:
        yield _join(begun)


def _refuse_endless(length: int, path: Path, tokenizer: Tokenizer) -> None:
    if length > _LONGEST:
        raise DataError(
            f"{path}: a document of more than {_LONGEST} tokens, where vocabulary "
            f"{tokenizer.name!r} ends text with {tokenizer.eot}; give the one of these tokens"
        )


def _join(pieces: Sequence[Ids]) -> Document:
    return np.concatenate(pieces, dtype=np.uint32, casting="unsafe")  # checked: none is negative


def _mapped(path: Path, dtype: np.dtype[Any], offset: int = 0) -> Ids:
    """What is in a file after `offset` bytes, 1-D, read when it is looked at."""
    size = path.stat().st_size - offset
    if size <= 0:
        raise DataError(f"{path}: is empty; leave it out")
    if size % dtype.itemsize:
        raise DataError(f"{path}: {size:,} bytes are no whole number of {dtype.name}: truncated?")
    return np.memmap(path, dtype, "r", offset).view(np.ndarray)


def _check_ids(ids: Ids, path: Path, first: int, tokenizer: Tokenizer) -> None:
    if len(ids) and not 0 <= ids.min() <= ids.max() < tokenizer.vocab_size:
        at = int(np.argmax((ids < 0) | (ids >= tokenizer.vocab_size)))
        raise DataError(
            f"{path}: token {first + at} is {ids[at]}, but vocabulary {tokenizer.name!r} has ids "
            f"0 … {tokenizer.vocab_size - 1}; give the one of these tokens"
        )


def _find(sources: Sequence[str | Path], format: str) -> list[Path]:
    """The token files of the sources, those of a glob in sorted order."""
    found: list[Path] = []
    for source in map(str, sources):
        if format == "megatron":
            source = f"{source.removesuffix('.bin').removesuffix('.idx')}.bin"
        paths = [Path(source)] if Path(source).is_file() else sorted(map(Path, glob.glob(source)))
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise DataError(f"{source}: no such file; name the files themselves, or a pattern")
        found += paths
    return found


def _files(path: Path, format: str) -> list[Path]:
    return [path, path.with_suffix(".idx")] if format == "megatron" else [path]


def _row(path: Path) -> dict[str, Any]:
    """A source as the manifest lists it."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
    return {"name": path.name, "bytes": size, "xxh3_128": digest.hexdigest()}


_WRITERS = {"megatron": _write_megatron, "llmc": _write_llmc, "nanogpt": _write_nanogpt}
_READERS = {
    "megatron": _megatron_documents,
    "llmc": _llmc_documents,
    "nanogpt": _nanogpt_documents,
}
