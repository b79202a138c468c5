"""Documents to shards: resumable, and the same bytes whatever the number of workers.

    sources.py, cutting.py   units.py              documents.py, workers.py  units.py
    files → slices        →  units, what is to do → chunks tokenized       → shards → manifest

Where units are many each worker does whole ones; else workers tokenize chunks, and the parent
writes what comes back in the order of the input. A document is held out if its content hash lies
under held_out · 2^64: the same text always falls on the same side, whatever else is in the corpus,
so exact duplicates cannot cross. Small corpora that have nothing on one side: small.py.

Input or options that turn out to be bad take with them whatever this run has written; a crash, an
interrupt, a full disk or too many rejected documents leave the finished units for the next run.
"""

import errno
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from sparse_gpt.data.corpus.documents import is_separated
from sparse_gpt.data.corpus.rejects import MAX_REJECTED, Tally, write_rejects
from sparse_gpt.data.corpus.slices import cut_all
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.data.preparation.appending import continued, not_yet, old_rejects
from sparse_gpt.data.preparation.dedup import Seen
from sparse_gpt.data.preparation.parts import Part, claim, forget, publishing, writing
from sparse_gpt.data.preparation.small import with_both_sides
from sparse_gpt.data.preparation.tokenizing import do_unit, pieces, tokenize
from sparse_gpt.data.preparation.units import (
    Options,
    Unit,
    UnitWriter,
    count_records,
    finished,
    hashes_of,
    plan,
    records,
    refuse_other_units,
    units_of,
)
from sparse_gpt.data.shards.format import INDEX
from sparse_gpt.data.shards.manifest import SPLITS, Manifest, Splits, read_manifest, write_manifest
from sparse_gpt.data.tokenizer import Tokenizer, load_tokenizer
from sparse_gpt.data.workers import in_order
from sparse_gpt.errors import DataError, Resumable
from sparse_gpt.files import real
from sparse_gpt.progress import Progress


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    workers: int = 1,
    held_out: float = 0.01,
    shard_tokens: int = 100_000_000,
    separator: str | None = None,
    keep_separator: bool = True,
    text_field: str = "text",
    min_chars: int = 0,
    where: Mapping[str, str] | None = None,
    dedup: bool = False,
    vocab: str | Path | None = None,
    pattern: str = "r50k",
    engine: str = "auto",
    max_rejected: float = MAX_REJECTED,
    part: str | None = None,
    append: bool = False,
    progress: bool = False,
) -> Manifest | None:
    """Tokenize files, folders, globs or hub data sets into the shard folder `out`; run again to
    resume.

    workers       processes that tokenize; with more than one, a calling script needs the usual
                  `if __name__ == "__main__":`, for they are spawned
    held_out      fraction of the documents for validation, chosen by hash, but at least one; 0 for
                  none. Of a single document that share of its end is cut off
    shard_tokens  tokens a shard at most, unless one document is longer
    separator     where text files are split into documents, its line ends being CRLF too; None:
                  one document a file
    keep_separator  as the head of the document it opens; else it is no part of the text
    text_field    the key of the text in JSON, or its column in CSV, parquet and hub data sets;
                  "a.b" is b in the object or struct a, unless there is a key of this name
    min_chars     documents of fewer characters are left out
    where         rows are left out unless each of these keys has this value (as JSON writes it, if
                  it is no string)
    dedup         leave out documents whose text, but for white space, came before; needs 8 to 24
                  bytes of memory a document, and all parts in one
    vocab         rank file in tiktoken's format; None: GPT-2's
    pattern       how text is split before merging: "r50k" as for GPT-2, "cl100k" or "o200k"
    engine        "tiktoken", "gigatoken", or "auto" for the faster that is installed; all give the
                  same ids, which is checked for one document in 512
    max_rejected  fraction of the documents that may be broken: they are set aside in
                  `rejected.jsonl`; with 0, the first stops the run
    part          "i/n": do the i-th of n parts of the units; the parts may run at the same time, on
                  several machines that share `out`
    append        add what of the sources is not in it to the finished corpus in `out`, made with
                  the same options; its shards stay as they are, the manifest is a new one
    progress      say on stderr what is left out of the sources and whether the separator is in
                  none, and draw progress if that is a terminal

    Returns the manifest, or None if other parts have units to do: the last to end writes it.

    Raises DataError for bad input or options, if too many documents are broken, if `out` cannot be
    written, is full or holds anything that this input with these options does not produce, and if
    a split that was asked for is empty.
    """
    conditions = tuple((where or {}).items())
    options = Options(
        held_out, shard_tokens, separator, text_field, min_chars, conditions, dedup,
        keep_separator=keep_separator,
    )  # fmt: skip
    share = Part.parse(part or "1/1")
    if dedup and share.count > 1:
        raise DataError(f"dedup needs all documents, not part {share} of them; run it as one part")
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    load = partial(load_tokenizer, vocab, pattern, engine)
    tokenizer = load()
    out = Path(out)
    for source in map(Path, sources):
        if source.is_dir() and real(source) in (real(out), *real(out).parents):
            raise DataError(f"{out}: lies in the source {source}; write the shards elsewhere")
    tell = partial(print, file=sys.stderr) if progress else None
    files = find_files(sources, bool(conditions), tell)
    with claim(out, share), _disk_full(out):
        old = read_manifest(out) if append else None
        if old is not None:
            options = continued(options, tokenizer, old, out)
        cuts = cut_all(files, separator, out, (share.number, share.count), workers, progress)
        if old is not None:
            found, cuts = len(cuts), not_yet(cuts, old)
            if tell and len(cuts) < found:
                tell(f"in {out} already: {found - len(cuts):,} of {found:,} files")
            if not cuts:
                forget(out)
                return old
        slices = [part for of_file in cuts for part in of_file.slices]
        if not slices:
            raise DataError(f"the corpus is empty: {len(files)} file(s), 0 bytes; name some text")
        if old is None:
            options = with_both_sides(options, slices)
        if (
            tell
            and separator
            and not any(is_separated(file, separator) for file in files if file.kind == "text")
        ):
            tell(f"separator {separator!r}: is in no text file; each is one document")
        before = units_of(old.splits) if old else set()
        units = plan(slices, options, tokenizer, 1 + max((n for n, _ in before), default=-1))
        refuse_other_units(out, units, before)
        mine = share.of(units)
        with writing(out, mine):
            work = _Work(out, options, load, workers, Tally(max_rejected), progress)
            work.do(mine, work.finished(mine), len(units))
            if sum(1 for _ in records(out, units)) < len(units):
                return None
            with publishing(out, units):
                rows = [row for _, row in cuts]
                _publish(out, units, options, tokenizer, rows, max_rejected, old)
                forget(out)
    return read_manifest(out)


@dataclass
class _Work:
    """What units are done with."""

    out: Path
    options: Options
    load: Callable[[], Tokenizer]
    workers: int
    tally: Tally
    progress: bool
    _tell_after: float = 0.0

    def finished(self, units: list[Unit]) -> set[int]:
        """The numbers of the units that need not be done; counts their documents."""
        begun = [unit for unit in units if unit.record(self.out).exists()]
        done: set[int] = set()
        bar = Progress("checking", sum(unit.bytes for unit in begun), self.progress)
        with bar, ThreadPoolExecutor(self.workers) as pool:  # hashing lets go of Python's lock
            records = pool.map(partial(finished, self.out), begun)
            for unit, record in zip(begun, records, strict=True):
                if record is not None:
                    done.add(unit.number)
                    self.tally.add(record.documents() + record.duplicates, record.rejected)
                bar.advance(unit.bytes)
        return done

    def do(self, units: list[Unit], done: set[int], count: int) -> None:
        """Do the units that are not done yet, of `count` that all parts do: a worker a unit, or
        where they are too few for that, or each depends on all before it, all workers on one."""
        todo = [unit for unit in units if unit.number not in done]
        bar = Progress("tokenizing", sum(unit.bytes for unit in todo), self.progress)
        with bar:
            if len(todo) >= self.workers > 1 and not self.options.dedup:
                self._side_by_side(todo, count, bar)
            else:
                self._one_by_one(units, done, count, bar)

    def _tell(self, bar: Progress, count: int) -> None:
        """How many units all parts have finished; seldom, for it takes long where they are many."""
        start = time.monotonic()
        if self.progress and start >= self._tell_after:
            bar.title(f"tokenizing, {count_records(self.out)}/{count} units")
            now = time.monotonic()
            self._tell_after = now + max(1, 100 * (now - start))

    def _side_by_side(self, todo: list[Unit], count: int, bar: Progress) -> None:
        do = partial(do_unit, self.out, self.options, self.load, strict=self.tally.limit == 0)
        with closing(in_order(do, todo, self.workers)) as results:
            for unit, made in results:
                self.tally.add(made.documents, made.rejects)
                bar.advance(unit.bytes, made.characters, made.tokens)
                self._tell(bar, count)
        self.tally.add(0, [], whole=True)

    def _one_by_one(self, units: list[Unit], done: set[int], count: int, bar: Progress) -> None:
        out, options, workers = self.out, self.options, self.workers
        todo = [unit for unit in units if unit.number not in done]
        chunks = [chunk for unit in todo for chunk in unit.chunks]
        if not any(part.streamed for chunk in chunks for part in chunk):
            workers = max(1, min(workers, len(chunks)))  # a process takes a second to start
        todo_pieces = (piece for unit in todo for piece in pieces(unit, options.reading))
        seen = Seen()
        with closing(
            in_order(partial(tokenize, options=options, load=self.load), todo_pieces, workers)
        ) as results:
            by_unit = groupby(results, key=lambda result: result[0].unit)
            for unit in units:
                if unit.number in done:
                    if options.dedup:
                        seen.add(hashes_of(out, unit))
                    continue
                self._tell(bar, count)
                with UnitWriter(out, unit, self.load(), options) as writer:
                    for piece, found in next(by_unit)[1]:
                        self.tally.add(len(found.lengths), found.rejects)
                        if options.dedup:
                            is_new = seen.add(found.hashes)
                            writer.leave_out(int((~is_new).sum()))
                            found = found.only(is_new)
                        writer.add(found)
                        bar.advance(piece.bytes, found.characters, len(found.tokens))
                    if unit is todo[-1]:
                        self.tally.add(0, [], whole=True)
                    writer.finish()


def _publish(
    out: Path,
    units: list[Unit],
    options: Options,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    max_rejected: float,
    old: Manifest | None,
) -> None:
    splits: Splits = {split: [] for split in SPLITS}
    engines: set[str] = set()
    tally, duplicates, markers = Tally(max_rejected), 0, 0
    if old is not None:
        splits = {split: list(old.splits[split]) for split in SPLITS}
        engines |= set(old.tokenizer.get("engines", []))
        markers = old.markers
    for record in records(out, units):
        for split in SPLITS:
            splits[split] += record.splits[split]
        engines.add(record.engine)
        duplicates += record.duplicates
        markers += record.markers
        tally.add(record.documents() + record.duplicates, record.rejected)
    tally.add(0, [], whole=True)
    _refuse_empty(splits, out, options)
    tokenizer.publish(out)
    rejects_before = list(old_rejects(out, old)) if old else []
    rejected = (reject for record in records(out, units) for reject in record.rejected)
    write_manifest(
        out,
        {**tokenizer.identity(), "engines": sorted(engines)},
        tokenizer.vocabulary,
        old.options if old else options.fields(),
        [*old.sources, *rows] if old else rows,
        splits,
        rejected=write_rejects(out, chain(rejects_before, rejected)),
        duplicates=duplicates,
        **({"markers": markers} if markers else {}),
    )


@contextmanager
def _disk_full(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise Resumable(
            f"{out}: {os.strerror(error.errno)}; make room there and run the same prepare again: "
            "finished units are kept"
        ) from None


def _refuse_empty(splits: Splits, out: Path, options: Options) -> None:
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
    shards = [shard for split in SPLITS for shard in splits[split]]
    hashes = np.concatenate([np.fromfile(out / f"{s.name}.idx", INDEX)["hash"] for s in shards])
    if len(np.unique(hashes)) == 1:
        raise DataError(
            f"all {train + held_out} documents are the same text, which cannot be both trained on "
            "and held out; set held_out to 0"
        )
    if train == 0:
        raise DataError(
            f"all {held_out} documents are held out; lower held_out below {options.held_out}"
        )
    lowest = int(hashes.min()) / 2**64
    raise DataError(
        f"none of the {train} documents is held out at held_out {options.held_out}; "
        f"{math.ceil(lowest * 1e4) / 1e4} is the smallest that holds one out, 0 asks for none"
    )
