"""GPT-2's byte-pair encoding from the vendored ranks; nothing here ever touches the network."""

import base64
import hashlib
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.errors import DataError

VOCABULARY = Path(__file__).parent / "vocab" / "gpt2.tiktoken"
VOCAB_HASH = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"
N_RANKS = 50256  # ids 0 … 50255; the next one is end of text
# r50k_pat_str of tiktoken, copied so that an upgrade cannot change our tokens silently.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Text to GPT-2 ids and back. Make one with `load_tokenizer`.

    vocab_size  50,257: the ranks and end of text
    eot         50,256; only writers place it, no text encodes to it
    vocab_hash  sha256 (hex) of the vocabulary file
    """

    name = "gpt2"
    engine = "tiktoken"
    eot = N_RANKS
    vocab_size = N_RANKS + 1

    def __init__(self, ranks: dict[bytes, int], vocab_hash: str) -> None:
        import tiktoken

        self.vocab_hash = vocab_hash
        self.engine_version = tiktoken.__version__
        self._encoding = tiktoken.Encoding(
            self.name,
            explicit_n_vocab=self.vocab_size,
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": self.eot},  # for decoding; encode() allows none
        )

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of `text`, 1-D uint32, read-only; a literal "<|endoftext|>" is encoded as text.

        Raises DataError for text the engine cannot take: lone surrogates, or a run of about a
        million spaces, on which its regular expression runs out of stack.
        """
        try:
            return self._encoding.encode_to_numpy(
                text, allowed_special=set(), disallowed_special=()
            )
        except ValueError as error:  # UnicodeEncodeError is one
            raise DataError(f"text that {self.engine} cannot encode: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end of text becomes "<|endoftext|>", broken UTF-8 becomes U+FFFD."""
        ids = [int(i) for i in ids]
        if ids and not 0 <= min(ids) <= max(ids) < self.vocab_size:
            raise DataError(f"ids must lie in 0 … {self.vocab_size - 1}: {min(ids)} … {max(ids)}")
        return self._encoding.decode(ids)

    def identity(self) -> dict[str, str | int]:
        """What the tokens depend on; part of the manifest and of every work unit's name."""
        return {
            "name": self.name,
            "engine": self.engine,
            "version": self.engine_version,
            "vocab_size": self.vocab_size,
            "vocab_hash": self.vocab_hash,
        }


@lru_cache(maxsize=1)
def load_tokenizer(path: Path = VOCABULARY) -> Tokenizer:
    """The GPT-2 tokenizer; raises DataError if the vocabulary file is missing or altered."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot read the vocabulary: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if found != VOCAB_HASH:
        raise DataError(
            f"{path}: not GPT-2's vocabulary (sha256 {found[:12]}…, expected {VOCAB_HASH[:12]}…); "
            "restore the file from the repository"
        )
    pairs = (line.split() for line in content.splitlines())
    return Tokenizer({base64.b64decode(token): int(rank) for token, rank in pairs}, found)
