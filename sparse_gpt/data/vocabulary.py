"""What ids mean: GPT-2's rank file, how text is split before merging, and what shards say of it."""

from dataclasses import dataclass
from pathlib import Path

from sparse_gpt.errors import DataError

VOCABULARY = Path(__file__).parent / "vocab" / "gpt2.tiktoken"
VOCAB_HASH = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
VOCAB_FILE = "vocab.tiktoken"  # beside what was made with another: shards, a run
# How text is split before merging, as in tiktoken_ext.openai_public; copied so that an upgrade
# cannot change our tokens silently.
PATTERNS = {
    "r50k": r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s",
    "cl100k": (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    ),
    "o200k": (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
        r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
}


def check_pattern(pattern: str) -> None:
    """Raise DataError for a pattern that is not there."""
    if pattern not in PATTERNS:
        raise DataError(f"pattern is {pattern!r}; there are {', '.join(PATTERNS)}")


def dtype_for(vocab_size: int) -> str:
    """The narrowest token dtype that holds every id: "uint16" or "uint32"."""
    return "uint16" if vocab_size <= 2**16 else "uint32"


@dataclass(frozen=True)
class Vocabulary:
    """What a shard says of its ids."""

    hash: str  # sha256 (hex) of the vocabulary file
    dtype: str
    eot: int
