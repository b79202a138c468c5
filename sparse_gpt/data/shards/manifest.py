"""`manifest.json`: which shards are a data set, and where they came from. Written last, so a folder
without one is not a data set. Beside it lies the rank file, `vocab.tiktoken`, unless it is
GPT-2's.

A sealed JSON file is an object whose first key, "hash", is the sha256 of the file's own bytes
with the 64 digits of that hash replaced by zeros. The manifest's other keys:

    format      "sparse-gpt shards 1"
    tokenizer   name, vocab_size, vocab_hash (sha256 of the vocabulary file), pattern (how text is
                split before merging), pattern_hash (its sha256), engines (name and version of each
                that made a shard; of imported ones, the format)
    dtype       "uint16" or "uint32"
    eot         id, position ("before each document")
    options     what `prepare` was asked for that changes the shards
    sources     a list of {name, bytes, xxh3_128}; of hub data sets {name, shards, identity}
    rejected    documents that were set aside; `rejected.jsonl` beside it names them
    duplicates  documents that dedup left out
    markers     documents that hold "<|endoftext|>" as text; left out where there is none
    splits      "train" and "held_out": a list of shards, in the order of their tokens, each
                {name, tokens, documents, bin: {bytes, sha256, blocks}, idx: {the same}}
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, TypeAdapter
from typing_extensions import NotRequired, TypedDict

from sparse_gpt.data.shards.format import ShardEntry
from sparse_gpt.data.vocabulary import Vocabulary
from sparse_gpt.errors import DataError
from sparse_gpt.files import read_sealed, write_sealed
from sparse_gpt.schema import Natural, Sha256, checked

MANIFEST = "manifest.json"
FORMAT = "sparse-gpt shards 1"
SPLITS = ("train", "held_out")


def _both(splits: dict[str, list[ShardEntry]]) -> dict[str, list[ShardEntry]]:
    if splits.keys() != set(SPLITS):
        raise ValueError(f"must have {' and '.join(SPLITS)}")
    return splits


Splits = Annotated[dict[str, list[ShardEntry]], AfterValidator(_both)]  # a list a split


def shards_to_json(splits: Splits) -> dict[str, Any]:
    """As JSON holds them."""
    return {split: [asdict(shard) for shard in splits[split]] for split in SPLITS}


def write_manifest(
    folder: Path,
    tokenizer: dict[str, Any],
    vocabulary: Vocabulary,
    options: dict[str, Any],
    sources: list[dict[str, Any]],
    splits: Splits,
    **counts: int,
) -> None:
    """Publish the manifest of `folder`; the counts are `rejected`, `duplicates`, `markers`."""
    fields = {
        "format": FORMAT,
        "tokenizer": tokenizer,
        "dtype": vocabulary.dtype,
        "eot": {"id": vocabulary.eot, "position": "before each document"},
        "options": options,
        "sources": sources,
        **counts,
        "splits": shards_to_json(splits),
    }
    write_sealed(folder / MANIFEST, fields)


class TokenizerIdentity(TypedDict):
    """As `Tokenizer.identity` has it, and the engines that were used."""

    name: str
    vocab_size: Natural
    vocab_hash: Sha256
    pattern: NotRequired[str]
    pattern_hash: NotRequired[str]
    engines: NotRequired[list[str]]


class EndOfText(TypedDict):
    """Its id, and where it stands."""

    id: Annotated[int, Field(strict=True, ge=0, lt=2**32)]
    position: str


def _is_source(row: dict[str, Any]) -> dict[str, Any]:
    size = row.get("bytes", 0)
    if not all(isinstance(text, str) for text in (row.get("name"), row.get("split", ""))):
        raise ValueError("name or split of a source is missing, or no text")
    if not isinstance(size, int) or not 0 <= size <= 2**62:
        raise ValueError("bytes of a source is no number of them")
    return row


@dataclass(frozen=True)
class Manifest:
    """The content of manifest.json; `hash` is its own hash and names the data set."""

    hash: str
    format: str
    tokenizer: TokenizerIdentity
    dtype: Literal["uint16", "uint32"]
    eot: EndOfText
    options: dict[str, Any]
    sources: list[Annotated[dict[str, Any], AfterValidator(_is_source)]]
    splits: Splits
    rejected: Natural = 0
    duplicates: Natural = 0
    markers: Natural = 0

    @property
    def vocabulary(self) -> Vocabulary:
        """What the shards' headers must say."""
        return Vocabulary(self.tokenizer["vocab_hash"], self.dtype, self.eot["id"])

    def tokens(self, split: str) -> int:
        """Tokens of "train" or "held_out", end-of-text ids included."""
        return sum(shard.tokens for shard in self.splits[split])

    def documents(self, split: str) -> int:
        """Documents of "train" or "held_out"."""
        return sum(shard.documents for shard in self.splits[split])


def read_manifest(folder: str | Path) -> Manifest:
    """The manifest of a shard folder; raises DataError if there is no whole one of our format."""
    folder = Path(folder)
    path = folder / MANIFEST
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder of shards; make it with prepare")
    if not path.is_file():
        if any(folder.glob("*-?????-*.bin")) or any(folder.glob(".tmp-*")):
            raise DataError(f"{folder}: unfinished (no {MANIFEST}): run the same prepare again")
        raise DataError(f"{folder}: not a folder of shards (no {MANIFEST})")
    try:
        fields = read_sealed(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    if fields.get("format") != FORMAT:
        found = repr(fields.get("format"))[:80]
        raise DataError(f"{path}: format {found}; this version reads {FORMAT!r}")
    try:
        return checked(_FORM, fields)
    except ValueError as error:
        raise DataError(f"{path}: not a manifest of ours ({error}); run prepare again") from None


_FORM = TypeAdapter(Manifest)
