"""What changes the shards, besides the input and the tokenizer."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_gpt.data.corpus.blocks import Reading
from sparse_gpt.errors import DataError

# Options that came later, as they are where nothing is said of them.
USUAL = {"cut_last": False, "keep_separator": True, "moved": None, "messages": False}


@dataclass(frozen=True)
class Options:
    """See `prepare`. `cut_last`: the
    corpus is one document, whose last part is held out. `keep_separator`: in the document it opens.
    `moved`: the hash, in hex, of a document that is on the other side than its hash says.
    `messages`: the text field holds chat turns."""

    held_out: float
    shard_tokens: int
    separator: str | None
    text_field: str
    min_chars: int = 0
    where: tuple[tuple[str, str], ...] = ()
    dedup: bool = False
    cut_last: bool = False
    keep_separator: bool = True
    moved: str | None = None
    messages: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise DataError(f"held_out is {self.held_out}; it is a fraction: 0 ≤ held_out < 1")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens is {self.shard_tokens}; it must be at least 1")
        if self.separator == "":
            raise DataError("separator is empty; leave it out for one document a file")

    @property
    def rows(self) -> str:
        """For what every file must have rows; "" where it need not."""
        if self.where:
            return "where chooses among rows"
        return "chat turns are in rows" if self.messages else ""

    @property
    def reading(self) -> Reading:
        """The part that says how documents are taken from files."""
        share = self.held_out if self.cut_last else 0.0
        return Reading(
            self.separator, self.text_field, self.min_chars, self.where, share,
            self.keep_separator, self.messages,
        )  # fmt: skip

    def holds_out(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
        """Which documents, by their hashes, are for validation, unless there is but one."""
        found: npt.NDArray[np.bool_] = hashes < np.uint64(held_out_below(self.held_out))
        if self.moved is not None:
            found ^= hashes == np.uint64(int(self.moved, 16))
        return found

    def fields(self) -> dict[str, Any]:
        """What is said of them in manifests and keys; what came later only where it is set, so that
        shards of before keep their names."""
        fields = asdict(self).items()
        return {key: value for key, value in fields if key not in USUAL or value != USUAL[key]}


def text_column(text_field: str | None, messages: str | None) -> tuple[str, bool]:
    """The field of the text, and whether it holds chat turns. Raises DataError for both."""
    if text_field is not None and messages is not None:
        raise DataError(f"text_field {text_field!r} and messages {messages!r}: give one of them")
    return messages or text_field or "text", messages is not None


def held_out_below(fraction: float) -> int:
    """Documents whose content hash is below this are for validation."""
    return int(fraction * 2**64)
