"""Documents to shards: resumable, and the same bytes whatever the number of workers.

    sources.py, slices.py    units.py              documents.py, work.py     publication.py
    files → slices        →  units, what is to do → chunks tokenized       → shards → manifest

Where units are many each worker does whole ones; else workers tokenize chunks, and the parent
writes what comes back in the order of the input. A document is held out if its content hash lies
under held_out · 2^64: the same text always falls on the same side, whatever else is in the corpus,
so exact duplicates cannot cross. Small corpora that have nothing on one side: small.py; files that
are held out as a whole: apart.py.

Input or options that turn out to be bad take with them whatever this run has written; a crash, an
interrupt, a full disk or too many rejected documents leave the finished units for the next run.
"""

import errno
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from sparse_gpt.data.corpus.blocks import is_separated
from sparse_gpt.data.corpus.rejects import MAX_REJECTED, Tally
from sparse_gpt.data.corpus.slices import cut_all
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.data.preparation.apart import files_apart, sides_apart
from sparse_gpt.data.preparation.appending import continued, not_yet
from sparse_gpt.data.preparation.options import Options, text_column
from sparse_gpt.data.preparation.parts import Part, claim, forget, publishing, writing
from sparse_gpt.data.preparation.publication import publish_all
from sparse_gpt.data.preparation.small import with_both_sides
from sparse_gpt.data.preparation.units import plan, records, refuse_other_units, units_of
from sparse_gpt.data.preparation.work import Work
from sparse_gpt.data.shards.manifest import Manifest, read_manifest
from sparse_gpt.data.tokenizer import load_tokenizer
from sparse_gpt.errors import DataError, Resumable
from sparse_gpt.files import real


def prepare(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    workers: int = 1,
    held_out: float | None = None,
    held_out_from: Sequence[str | Path] = (),
    shard_tokens: int = 100_000_000,
    separator: str | None = None,
    keep_separator: bool = True,
    text_field: str | None = None,
    messages: str | None = None,
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
    """Tokenize files, folders, globs, URLs of these or hub data sets into the shard folder `out`;
    run again to resume.

    workers       processes that tokenize; with more than one, a calling script needs the usual
                  `if __name__ == "__main__":`, for they are spawned
    held_out      fraction of the documents for validation, chosen by hash, but at least one; 0 for
                  none; 0.01 by itself. Of a single document that share of its end is cut off
    held_out_from  files, folders, globs or hub data sets of which all documents are for validation,
                  and none of the sources'; instead of held_out
    shard_tokens  tokens a shard at most, unless one document is longer
    separator     where text files are split into documents, its line ends being CRLF too; None:
                  one document a file
    keep_separator  as the head of the document it opens; else it is no part of the text
    text_field    the key of the text in JSON, or its column in CSV, parquet and hub data sets, by
                  itself "text"; "a.b" is b in the object or struct a, unless there is a key of this
                  name
    messages      the key or column of chat turns, instead of text_field; a conversation is a
                  document, its text as corpus/chat.py says
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
    field, is_chat = text_column(text_field, messages)
    if held_out_from and held_out:
        raise DataError(f"held_out {held_out} and held_out_from: give one of them")
    if held_out is None:
        held_out = 0.0 if held_out_from else 0.01
    options = Options(
        held_out, shard_tokens, separator, field, min_chars, conditions, dedup,
        keep_separator=keep_separator, messages=is_chat,
    )  # fmt: skip
    share = Part.parse(part or "1/1")
    if dedup and share.count > 1:
        raise DataError(f"dedup needs all documents, not part {share} of them; run it as one part")
    if workers < 1:
        raise DataError(f"workers is {workers}; it must be at least 1")
    load = partial(load_tokenizer, vocab, pattern, engine)
    tokenizer = load()
    out = Path(out)
    for source in map(Path, [*sources, *held_out_from]):
        if source.is_dir() and real(source) in (real(out), *real(out).parents):
            raise DataError(f"{out}: lies in the source {source}; write the shards elsewhere")
    tell = partial(print, file=sys.stderr) if progress else None
    files = find_files(sources, options.rows, tell)
    if held_out_from:
        files = files_apart(files, find_files(held_out_from, options.rows, tell))
    with claim(out, share), _disk_full(out):
        old = read_manifest(out) if append else None
        if old is not None:
            options = continued(options, tokenizer, old, out)
        cuts = cut_all(files, separator, out, (share.number, share.count), workers, progress)
        cuts = sides_apart(cuts, old)
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
            work = Work(out, options, load, workers, Tally(max_rejected), progress)
            work.do(mine, work.finished(mine), len(units))
            if sum(1 for _ in records(out, units)) < len(units):
                return None
            with publishing(out, units):
                rows = [row for _, row in cuts]
                by_file = bool(held_out_from)
                publish_all(out, units, options, tokenizer, rows, max_rejected, old, by_file)
                forget(out)
    return read_manifest(out)


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
