"""Documents to a vocabulary: byte-level BPE, learned by `tokenizers`, in tiktoken's format."""

import base64
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sparse_gpt.data.content_hash import content_hash
from sparse_gpt.data.corpus.documents import read
from sparse_gpt.data.corpus.rejects import MAX_REJECTED, Reject, Tally
from sparse_gpt.data.corpus.slices import Slice, cut
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.data.preparation.options import Options, text_column
from sparse_gpt.data.preparation.small import with_both_sides
from sparse_gpt.data.vocabulary import PATTERNS, check_pattern
from sparse_gpt.errors import DataError
from sparse_gpt.files import new_file

if TYPE_CHECKING:
    import tokenizers

_PART = 1 << 16  # characters given to `tokenizers` at once; it takes some 90 bytes for each
_SPACE = re.compile(r"(?<=\S) (?=\S)")  # with it every pattern begins a piece, whatever is before


def train_vocab(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    size: int = 4096,
    pattern: str = "r50k",
    held_out: float = 0.01,
    separator: str | None = None,
    keep_separator: bool = True,
    text_field: str | None = None,
    messages: str | None = None,
    min_chars: int = 0,
    where: Mapping[str, str] | None = None,
    progress: bool = False,
) -> None:
    """Learn a vocabulary of `size` ids, end of text included, and write its rank file to `out`.

    pattern   how text is split before merging: "r50k", "cl100k" or "o200k"; give `prepare` the same
    progress  let `tokenizers` draw its progress on stderr

    The documents that `prepare` would hold out with the same `held_out`, or reject, are not looked
    at; the other options are `prepare`'s too. Raises DataError for bad input or options, if the
    text is too little for that many ids, or if `tokenizers` is not installed.
    """
    conditions = tuple((where or {}).items())
    field, is_chat = text_column(text_field, messages)
    options = Options(
        held_out, 1, separator, field, min_chars, conditions, keep_separator=keep_separator,
        messages=is_chat,
    )  # fmt: skip
    if size <= 257:
        raise DataError(f"size is {size}; 256 bytes and end of text are 257 ids already")
    check_pattern(pattern)
    out = Path(out)
    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder; make it first")
    files = find_files(sources, options.rows)
    with new_file(out) as aside:
        slices = [part for file in files for part in cut(file, separator).slices]
        options = with_both_sides(options, slices)
        bpe = learn(_texts(slices, options), size, pattern, progress)
        alphabet = byte_alphabet()
        learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
        if len(learned) != size - 1:
            raise DataError(f"the text yields {len(learned) + 1} ids, not {size}; lower the size")
        lines = (
            b"%s %d\n" % (base64.b64encode(bytes(alphabet[char] for char in token)), rank)
            for token, rank in learned
        )
        aside.write_bytes(b"".join(lines))


def learn(
    texts: Iterable[str], size: int, pattern: str, progress: bool = False
) -> "tokenizers.Tokenizer":
    """The tokenizer of `size` - 1 ids, or of as many as the texts yield; an id is a rank.

    Raises DataError if `tokenizers` is not installed."""
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError("training a vocabulary needs: pip install 'sparse-gpt[vocab]'") from None
    # Its expressions are Oniguruma's, which takes {1,3}+ for any number of threes. Possessive or
    # not is all one where nothing follows.
    splitting = Regex(PATTERNS[pattern].replace("{1,3}+", "{1,3}"))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(splitting, behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1, initial_alphabet=list(byte_alphabet()), show_progress=progress
    )
    bpe.train_from_iterator((part for text in texts for part in _parts(text)), trainer)
    return bpe


def _texts(slices: list[Slice], options: Options) -> Iterator[str]:
    """The training documents' texts."""
    tally = Tally(MAX_REJECTED)
    for document in read(slices, options.reading):
        if isinstance(document, Reject):
            tally.add(0, [document])
            continue
        tally.add(1, [])
        hash = np.array([content_hash(document.text)], np.uint64)
        if options.cut_last or not options.holds_out(hash).all():
            yield document.text
            if options.cut_last:
                return
    tally.add(0, [], whole=True)


def _parts(text: str) -> Iterator[str]:
    """The text, cut where every pattern cuts it."""
    start = 0
    while start < len(text):
        space = _SPACE.search(text, start + _PART)
        end = space.start() if space else len(text)
        yield text[start:end]
        start = end


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's byte-level alphabet: itself where it is
    printable, else the next from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
