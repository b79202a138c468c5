"""Documents to a vocabulary: byte-level BPE, learned by `tokenizers`, in tiktoken's format."""

import base64
from collections.abc import Iterator, Sequence
from pathlib import Path

from data.cutting import cut
from data.documents import read
from data.errors import DataError
from data.files import publish, temporary
from data.rejects import MAX_REJECTED, Reject, Tally
from data.shards import content_hash
from data.sources import find_files
from data.tokenizer import PATTERNS
from data.units import Options, held_out_below


def train_vocab(
    sources: Sequence[str | Path],
    out: str | Path,
    *,
    size: int = 4096,
    held_out: float = 0.01,
    separator: str | None = None,
    text_field: str = "text",
    progress: bool = False,
) -> None:
    """Learn a vocabulary of `size` ids, end of text included, and write its rank file to `out`.

    The documents that `prepare` would hold out with the same `held_out`, or reject, are not looked
    at; the other options are `prepare`'s too. Raises DataError for bad input or options, if the
    text is too little for that many ids, or if `tokenizers` is not installed.
    """
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError:
        raise DataError("training a vocabulary needs: pip install 'sparse-gpt[vocab]'") from None

    options = Options(held_out, 1, separator, text_field)
    if size <= 257:
        raise DataError(f"size is {size}; 256 bytes and end of text are 257 ids already")
    out = Path(out)
    if not out.parent.is_dir():
        raise DataError(f"{out.parent}: no such folder; make it first")

    def texts() -> Iterator[str]:
        tally = Tally(MAX_REJECTED)
        for file in find_files(sources):
            for document in read(cut(file, separator)[0], options.reading):
                if isinstance(document, Reject):
                    tally.add(0, [document])
                    continue
                tally.add(1, [])
                if content_hash(document.text) >= held_out_below(held_out):
                    yield document.text
        tally.add(0, [], whole=True)

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["r50k"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = byte_alphabet()
    bpe.train_from_iterator(
        texts(),
        trainers.BpeTrainer(
            vocab_size=size - 1, initial_alphabet=list(alphabet), show_progress=progress
        ),
    )
    learned = sorted(bpe.get_vocab().items(), key=lambda item: item[1])
    if len(learned) != size - 1:
        raise DataError(f"the text yields {len(learned) + 1} ids, not {size}; lower the size")
    lines = (
        b"%s %d\n" % (base64.b64encode(bytes(alphabet[char] for char in token)), rank)
        for token, rank in learned
    )
    temporary(out).write_bytes(b"".join(lines))
    publish(out)


def byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in GPT-2's byte-level alphabet: itself where it is
    printable, else the next from U+0100 on."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return {chr(byte if byte in printable else next(others)): byte for byte in range(256)}
