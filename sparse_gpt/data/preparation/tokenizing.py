"""A unit's documents to token ids: what a worker does."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from sparse_gpt.data.content_hash import content_hashes
from sparse_gpt.data.corpus.blocks import Block, Reading, blocks
from sparse_gpt.data.corpus.documents import Document, documents, read
from sparse_gpt.data.corpus.rejects import Reject, Tally
from sparse_gpt.data.corpus.slices import SLICE_BYTES, Slice
from sparse_gpt.data.preparation.options import Options
from sparse_gpt.data.preparation.units import Tokenized, Unit, UnitWriter, input_bytes
from sparse_gpt.data.shards.format import DTYPES
from sparse_gpt.data.tokenizer import END_OF_TEXT, Tokenizer
from sparse_gpt.data.workers import stopped
from sparse_gpt.errors import DataError, Resumable

_AUDIT_EVERY = 512  # documents, of which one is encoded by tiktoken too: some 5% of the time


class Made(NamedTuple):
    """What a worker tells of a unit that it did."""

    documents: int
    rejects: list[Reject]
    characters: int
    tokens: int


def do_unit(
    out: Path, options: Options, load: Callable[[], Tokenizer], unit: Unit, strict: bool
) -> Made:
    """A whole unit, by a worker; `strict`: up to its first reject."""
    documents, characters, tokens = 0, 0, 0
    tally = Tally(0.0 if strict else 1.0)
    with UnitWriter(out, unit, load(), options) as writer:
        for piece in pieces(unit, options.reading):
            if stopped():
                raise Resumable("another unit failed")
            found = tokenize(piece, options, load)
            tally.add(len(found.lengths), found.rejects)
            writer.add(found)
            documents += len(found.lengths)
            characters += found.characters
            tokens += len(found.tokens)
        record = writer.finish()
    return Made(documents, record.rejected, characters, tokens)


@dataclass(frozen=True)
class Piece:
    """What a worker does at a time: it reads the slices itself, or gets blocks of streamed ones.
    `bytes` of the input are done with it; `unit` is the unit's number."""

    unit: int
    bytes: int
    slices: list[Slice]
    blocks: list[Block]


def pieces(unit: Unit, reading: Reading) -> Iterator[Piece]:
    for chunk in unit.chunks:
        if not any(part.streamed for part in chunk):
            yield Piece(unit.number, input_bytes(chunk), chunk, [])
            continue
        found: list[Block] = []
        for block in (block for part in chunk for block in blocks(part, reading)):
            found.append(block)
            if sum(len(block.content) for block in found) >= SLICE_BYTES:
                yield Piece(unit.number, sum(block.bytes for block in found), [], found)
                found = []
        yield Piece(unit.number, sum(block.bytes for block in found), [], found)


def tokenize(piece: Piece, options: Options, load: Callable[[], Tokenizer]) -> Tokenized:
    """What a worker makes of a piece."""
    tokenizer = load()
    taken = list(read(piece.slices, options.reading))
    for block in piece.blocks:
        taken += documents(block, options.reading)
    texts = [document.text for document in taken if isinstance(document, Document)]
    encoded = iter(tokenizer.encode_batch(texts))
    good: list[Document] = []
    ids: list[npt.NDArray[np.uint32]] = []
    rejects: list[Reject] = []
    for document in taken:
        if isinstance(document, Reject):
            rejects.append(document)
        elif isinstance(found := next(encoded), DataError):
            rejects.append(Reject(document.file, document.line, str(found)))
        else:
            good.append(document)
            ids.append(found)
    hashes = np.array(content_hashes(document.text for document in good), np.uint64)
    if not tokenizer.is_reference:
        for number in np.flatnonzero(hashes % _AUDIT_EVERY == 0):
            _audit(good[number], ids[number], tokenizer)
    lengths = np.array([1 + len(of_one) for of_one in ids], np.int64)
    tokens = np.empty(lengths.sum(), DTYPES[tokenizer.vocabulary.dtype])
    end = 0
    for of_one in ids:
        start, end = end + 1, end + 1 + len(of_one)
        tokens[start - 1] = tokenizer.eot
        tokens[start:end] = of_one
    characters = sum(len(text) for _, _, text in good)
    markers = sum(END_OF_TEXT in text for _, _, text in good)
    return Tokenized(tokens, lengths, hashes, rejects, characters, markers)


def _audit(document: Document, ids: npt.NDArray[np.uint32], tokenizer: Tokenizer) -> None:
    if not np.array_equal(ids, tokenizer.reference(document.text)):
        raise DataError(
            f"{document.file}:{document.line}: {tokenizer.engine} gives other ids than tiktoken; "
            "use the engine tiktoken, and report the document"
        )
