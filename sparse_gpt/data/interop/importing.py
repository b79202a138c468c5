"""The files of Megatron-LM, llm.c (modded-nanogpt too) and nanoGPT, as in formats.py, to shards.

An import cuts the tokens into documents and opens each with end of text; workers decode batches of
them for their content hashes; the parent writes shards in the order of the input, as `prepare`
does. Memory grows with the longest document and the workers, not with the tokens. The shards fill a
hidden folder that gets its name when it is whole.
"""

import glob
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from sparse_gpt.data.content_hash import content_hashes
from sparse_gpt.data.interop.formats import MEGATRON, MEGATRON_MAGIC, Ids, of_format
from sparse_gpt.data.shards.format import DTYPES, HEADER_BYTES, LLM_C, ShardEntry
from sparse_gpt.data.shards.manifest import SPLITS, Manifest, read_manifest, write_manifest
from sparse_gpt.data.shards.writer import Shards
from sparse_gpt.data.tokenizer import Tokenizer, load_tokenizer
from sparse_gpt.data.workers import in_order
from sparse_gpt.errors import DataError
from sparse_gpt.files import new_folder
from sparse_gpt.progress import Progress

Document = npt.NDArray[np.uint32]  # ids, end of text first

_BATCH = 1 << 20  # tokens that a worker decodes at a time, at least
_PIECE = 4 << 20  # tokens, documents or bytes looked at at once
_LONGEST = 1 << 26  # tokens of an imported document; its decoding takes some 30 bytes for each
_MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}  # 6, 7 are floats


def import_shards(
    sources: Sequence[str | Path],
    format: str,
    out: str | Path,
    *,
    held_out: Sequence[str | Path] = (),
    vocab: str | Path | None = None,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    progress: bool = False,
) -> Manifest:
    """Make another tool's files the new shard folder `out`.

    sources       token files to train on, in the order of their tokens: paths or globs, for
                  "megatron" also prefixes (the path without .bin)
    format        "megatron", "llmc" or "nanogpt"
    held_out      the same for validation
    vocab         the rank file that the ids belong to; None: GPT-2's
    shard_tokens  tokens a shard at most, unless one document is longer
    workers       processes that decode and hash; the shards are the same for any number. With more
                  than one, a calling script needs the usual `if __name__ == "__main__":`
    progress      draw progress on stderr, if that is a terminal

    Raises DataError if a file is missing, empty, damaged or given twice, if an id lies beyond the
    vocabulary, a document has more than 67M tokens, or `out` is not new.
    """
    tokens_of, documents = of_format(format, _READERS)
    load = partial(load_tokenizer, vocab)
    tokenizer = load()
    for name, value in (("shard_tokens", shard_tokens), ("workers", workers)):
        if value < 1:
            raise DataError(f"{name} is {value}; it must be at least 1")
    paths = [_find(of_split, format) for of_split in (sources, held_out)]
    if not paths[0]:
        raise DataError("no source given: name token files to train on")
    for path, times in Counter(path.resolve() for path in chain(*paths)).items():
        if times > 1:
            raise DataError(f"{path}: given twice, to train on or to hold out; name it once")
    identity = {**tokenizer.identity(), "engines": [format]}
    options = {"import": format, "held_out_files": len(paths[1]), "shard_tokens": shard_tokens}
    vocabulary = tokenizer.vocabulary
    dtype = DTYPES[vocabulary.dtype]
    batches = (
        batch
        for split, of_split in zip(SPLITS, paths, strict=True)
        for batch in _batches(split, documents(of_split, tokenizer), dtype)
    )
    with new_folder(out) as aside:
        n_bytes = dtype.itemsize * sum(len(tokens_of(path)) for path in chain(*paths))
        files = [file for path in chain(*paths) for file in _files(path, format)]
        with Progress("hashing", sum(file.stat().st_size for file in files), progress) as bar:
            rows = [_row(file, bar.advance) for file in files]
        key = hashlib.sha256(json.dumps([identity, options, rows]).encode()).hexdigest()[:16]
        shards: dict[str, list[ShardEntry]] = {split: [] for split in SPLITS}
        with (
            Progress("importing", n_bytes, progress) as bar,
            closing(in_order(partial(_hashes, load=load), batches, workers)) as results,
        ):
            for split, of_split in groupby(results, key=lambda result: result[0].split):
                name = f"{split}-00000-{{:02d}}-{key}"
                with closing(Shards(aside, name, vocabulary, shard_tokens)) as writer:
                    for batch, hashes in of_split:
                        writer.extend(batch.tokens, batch.lengths, hashes)
                        bar.advance(batch.tokens.nbytes)
                    shards[split] = writer.finish()
        tokenizer.publish(aside)
        write_manifest(aside, identity, vocabulary, options, rows, shards)
    return read_manifest(out)


@dataclass(frozen=True)
class _Batch:
    """Documents of one split: their ids, 1-D of the shards' dtype, back to back, and the length of
    each (int64)."""

    split: str
    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]


def _batches(split: str, documents: Iterator[Document], dtype: np.dtype[Any]) -> Iterator[_Batch]:
    def batch() -> _Batch:
        tokens = np.concatenate(held, dtype=dtype, casting="unsafe")  # checked: the ids fit
        return _Batch(split, tokens, np.array([len(document) for document in held], np.int64))

    held: list[Document] = []
    filled = 0
    for document in documents:
        held.append(document)
        filled += len(document)
        if filled >= _BATCH:
            yield batch()
            held, filled = [], 0
    if held:
        yield batch()


def _hashes(batch: _Batch, load: Callable[[], Tokenizer]) -> npt.NDArray[np.uint64]:
    """Of each document its content hash; what a worker does."""
    tokenizer = load()
    documents = np.split(batch.tokens, np.cumsum(batch.lengths)[:-1])
    texts = (tokenizer.decode(document[1:]) for document in documents)
    return np.array(content_hashes(texts), np.uint64)


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


def _megatron_tokens(path: Path) -> Ids:
    return _mapped(path, _read_index(path)[0])


def _read_index(path: Path) -> tuple[np.dtype[Any], Ids, Ids]:
    """Of a Megatron token file, from the index beside it: the dtype of the tokens, the byte at
    which each sequence starts, and the sequence at which each document starts, then their number.
    """
    index, size = path.with_suffix(".idx"), path.stat().st_size
    content = _mapped(index, np.dtype("u1"))
    head = content[: MEGATRON.size].tobytes().ljust(MEGATRON.size, b"\0")
    magic, version, code, n, n_bounds = MEGATRON.unpack(head)
    if (magic, version) != (MEGATRON_MAGIC, 1) or code not in _MEGATRON_DTYPES:
        raise DataError(f"{index}: not an index of Megatron's for token ids, in version 1")
    expected = MEGATRON.size + 12 * n + 8 * n_bounds
    if len(content) != expected:
        raise DataError(f"{index}: {len(content):,} bytes, but its header says {expected:,}")
    if not n or not n_bounds:
        raise DataError(f"{index}: holds no documents; leave it out")
    dtype = np.dtype(_MEGATRON_DTYPES[code])
    lengths = np.ndarray(n, "<i4", content.data, MEGATRON.size)
    pointers = np.ndarray(n, "<i8", content.data, MEGATRON.size + 4 * n)
    bounds = np.ndarray(n_bounds, "<i8", content.data, MEGATRON.size + 12 * n)
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
    return _cut(paths, _nanogpt_tokens, tokenizer, after=True)


def _nanogpt_tokens(path: Path) -> Ids:
    return _mapped(path, DTYPES["uint16"])


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


def _row(path: Path, done: Callable[[int], None]) -> dict[str, Any]:
    """A source as the manifest lists it."""
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
            size += len(piece)
            done(len(piece))
    return {"name": path.name, "bytes": size, "xxh3_128": digest.hexdigest()}


_READERS = {
    "megatron": (_megatron_tokens, _megatron_documents),
    "llmc": (_llmc_tokens, _llmc_documents),
    "nanogpt": (_nanogpt_tokens, _nanogpt_documents),
}
