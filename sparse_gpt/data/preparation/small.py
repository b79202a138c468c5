"""Small corpora, of which a share taken by hash may be nothing or all."""

from collections.abc import Iterable, Iterator
from dataclasses import replace

from sparse_gpt.data.content_hash import content_hash
from sparse_gpt.data.corpus.blocks import Reading
from sparse_gpt.data.corpus.documents import Document, read
from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import Slice
from sparse_gpt.data.preparation.options import Options, held_out_below

_SMALL = 10_000  # documents; of more, a share that holds out none is an error


def with_both_sides(options: Options, slices: Iterable[Slice]) -> Options:
    """These options so that a small corpus has something to train on and to hold out: of a single
    document the last part is held out; where all are on one side, the one whose hash is nearest to
    the other side moves there. Reads up to the first document of the second side; data sets of a
    hub are left alone. Raises DataError if a file cannot be read."""
    below = held_out_below(options.held_out)
    lowest, highest, texts = 2**64, -1, 0
    for number, document in enumerate(_documents(slices, options.reading) if below else ()):
        if number == _SMALL or document is None:
            return options
        if isinstance(document, Reject):
            continue
        hash = content_hash(document.text)
        lowest, highest, texts = min(lowest, hash), max(highest, hash), texts + 1
        if lowest < below <= highest:
            return options
    if texts == 1:
        return replace(options, cut_last=True)
    if lowest >= highest:  # no text, or the same again and again
        return options
    return replace(options, moved=f"{lowest if lowest >= below else highest:016x}")


def _documents(slices: Iterable[Slice], reading: Reading) -> Iterator[Document | Reject | None]:
    """None where they begin to come from a hub."""
    for part in slices:
        if part.file.kind == "hub":
            yield None
        yield from read([part], reading)
