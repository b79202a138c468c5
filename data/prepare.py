"""Documents to shards: resumable, and the same bytes whatever the number of workers.

    documents.py        units.py                 workers.py            units.py
    files → slices  →  units, what is not done →  chunks tokenized  →  shards, records → manifest

Workers tokenize chunks of the input; the parent writes what comes back in the order of the input.
A document is held out if its content hash lies under held_out · 2^64: the same text always falls
on the same side, whatever else is in the corpus, so exact duplicates cannot cross.

Input that turns out to be bad takes with it whatever this run has written; a crash or an interrupt
leaves the finished units for the next run.
"""

import fcntl
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.documents import Slice, cut, find_files, read
from data.errors import DataError
from data.files import TEMPORARY
from data.manifest import (
    FORMAT,
    MANIFEST,
    SPLITS,
    Manifest,
    read_manifest,
    shards_to_json,
    write_sealed,
)
from data.progress import Progress
from data.shards import INDEX, content_hash, dtype_for
from data.tokenizer import load_tokenizer
from data.units import (
    Options,
    Shards,
    Unit,
    UnitWriter,
    chunk_bytes,
    finished,
    plan,
    refuse_strangers,
)
from data.workers import in_order

Document = tuple[str, npt.NDArray[np.uint32], int]  # split, ids, content hash


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    workers: int = 1,
    held_out: float = 0.01,
    shard_tokens: int = 100_000_000,
    separator: str | None = None,
    text_field: str = "text",
    vocab: str | Path | None = None,
    progress: bool = False,
) -> Manifest:
    """Tokenize files, folders or globs into the shard folder `out`; run again to resume.

    workers       processes that tokenize; with more than one, a calling script needs the usual
                  `if __name__ == "__main__":`, for they are spawned
    held_out      fraction of the documents for validation, chosen by hash; 0 for none
    shard_tokens  tokens a shard at most, unless one document is longer
    separator     where text files are split into documents; None: one document a file
    text_field    the key of the text in JSON Lines
    vocab         rank file in tiktoken's format; None: GPT-2's
    progress      draw progress on stderr, if that is a terminal

    Raises DataError for bad input or options, if `out` cannot be written or holds anything that
    this input with these options does not produce, and if a split that was asked for is empty.
    """
    options = Options(held_out, shard_tokens, separator, text_field)
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    tokenizer = load_tokenizer(vocab)
    out = Path(out)
    for source in map(Path, sources):
        if source.is_dir() and source.resolve() in (out.resolve(), *out.resolve().parents):
            raise DataError(f"{out}: lies in the source {source}; write the shards elsewhere")
    slices, rows = [], []
    for file in find_files(sources):
        of_file, row = cut(file, separator)
        slices += of_file
        rows.append(row)
    if not slices:
        raise DataError(f"the corpus is empty: {len(rows)} file(s), 0 bytes; name some text")
    units = plan(slices, options, tokenizer)
    with _claim(out, units):
        done = {unit.number: finished(out, unit) for unit in units}
        todo = [unit for unit in units if done[unit.number] is None]
        done.update(_tokenize_units(todo, out, options, vocab, workers, progress))
        in_order_of_input = [shards for unit in units if (shards := done[unit.number]) is not None]
        splits = {s: [shard for shards in in_order_of_input for shard in shards[s]] for s in SPLITS}
        _refuse_empty(splits, out, options)
        manifest = {
            "format": FORMAT,
            "tokenizer": tokenizer.identity(),
            "dtype": dtype_for(tokenizer.vocab_size),
            "eot": {"id": tokenizer.eot, "position": "before each document"},
            "options": asdict(options),
            "sources": rows,
            "splits": shards_to_json(splits),
        }
        write_sealed(out / MANIFEST, manifest)
    return read_manifest(out)


def _tokenize_units(
    units: list[Unit],
    out: Path,
    options: Options,
    vocab: str | Path | None,
    workers: int,
    progress: bool,
) -> Iterator[tuple[int, Shards]]:
    chunks = [chunk for unit in units for chunk in unit.chunks]
    total = sum(chunk_bytes(chunk) for chunk in chunks)
    tokenizer = load_tokenizer(vocab)
    tokenize = partial(_tokenize, options=options, vocab=vocab)
    with Progress(total, progress) as bar, closing(in_order(tokenize, chunks, workers)) as results:
        for unit in units:
            with UnitWriter(out, unit, tokenizer, options.shard_tokens) as writer:
                for chunk in unit.chunks:
                    documents = next(results)
                    for split, ids, document_hash in documents:
                        writer.add(split, ids, document_hash)
                    bar.advance(chunk_bytes(chunk), sum(len(ids) for _, ids, _ in documents))
                yield unit.number, writer.finish()


def _tokenize(chunk: list[Slice], options: Options, vocab: str | Path | None) -> list[Document]:
    """The chunk's documents, as a worker sends them back."""
    tokenizer = load_tokenizer(vocab)
    documents = []
    for origin, text in read(chunk, options.reading):
        document_hash = content_hash(text)
        try:
            ids = np.concatenate(([np.uint32(tokenizer.eot)], tokenizer.encode(text)))
        except DataError as error:
            raise DataError(f"{origin}: {error}") from None
        documents.append((split_of(document_hash, options.held_out), ids, document_hash))
    return documents


def split_of(document_hash: int, held_out: float) -> str:
    """ "train" or "held_out", by content alone."""
    return SPLITS[document_hash < int(held_out * 2**64)]


@contextmanager
def _claim(out: Path, units: list[Unit]) -> Iterator[None]:
    """Hold `out` for this run alone. On DataError, what this run put there goes, with the folders
    made for it; temporary files go in any case."""
    missing = [folder for folder in (out, *out.parents) if not folder.exists()]
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        _remove_folders(missing)
        raise DataError(f"{out}: cannot write there: {error.strerror}") from None
    lock = os.open(out, os.O_RDONLY)  # the kernel lets go of it even on SIGKILL
    try:
        _lock(lock, out)
        refuse_strangers(out, units, allowed={MANIFEST, TEMPORARY + MANIFEST})
        before = set(out.iterdir())
        try:
            yield
        except DataError:
            for path in set(out.iterdir()) - before:
                path.unlink()
            _remove_folders(missing)
            raise
        finally:
            for path in out.glob(f"{TEMPORARY}*"):
                path.unlink()
    finally:
        os.close(lock)


def _lock(folder: int, out: Path) -> None:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise DataError(f"{out}: another prepare is writing there; wait for it to end") from None
    except OSError:
        pass  # some network file systems cannot lock a folder


def _remove_folders(folders: list[Path]) -> None:
    for folder in folders:  # the innermost first
        if folder.is_dir():
            folder.rmdir()


def _refuse_empty(splits: Shards, out: Path, options: Options) -> None:
    """Raise DataError if a split that was asked for got no document."""
    train, held_out = (sum(shard.documents for shard in splits[split]) for split in SPLITS)
    if train and (held_out or not options.held_out):
        return
    if train + held_out == 0:
        raise DataError("the corpus holds no text: its documents are empty or white space")
    if train + held_out == 1:
        raise DataError(
            "the corpus is one document, which cannot be both trained on and held out; split it "
            "with a separator, or set held_out to 0"
        )
    if train == 0:
        raise DataError(
            f"all {held_out} documents are held out; lower held_out below {options.held_out}"
        )
    indexes = [np.fromfile(out / f"{shard.name}.idx", INDEX) for shard in splits["train"]]
    lowest = int(min(index["hash"].min() for index in indexes)) / 2**64
    raise DataError(
        f"none of the {train} documents is held out at held_out {options.held_out}; "
        f"{math.ceil(lowest * 1e4) / 1e4} is the smallest that holds one out, 0 asks for none"
    )
