"""Byte-pair encoding from a rank file, GPT-2's by default; nothing here touches the network."""

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
# r50k_pat_str of tiktoken, copied so that an upgrade cannot change our tokens silently.
PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


class Tokenizer:
    """Text to ids and back. Make one with `load_tokenizer`.

    name        of the vocabulary: "gpt2", or its file's name without suffix
    vocab_size  the ranks and end of text: 50,257 for GPT-2
    eot         the last id, 50,256 for GPT-2; only writers place it, no text encodes to it
    vocab_hash  sha256 (hex) of the vocabulary file
    """

    engine = "tiktoken"

    def __init__(self, name: str, ranks: dict[bytes, int], vocab_hash: str) -> None:
        import tiktoken

        self.name = name
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
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
        array = ids if isinstance(ids, np.ndarray) else np.array([int(i) for i in ids], np.int64)
        if len(array) and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise DataError(
                f"ids must lie in 0 … {self.vocab_size - 1}: {array.min()} … {array.max()}"
            )
        return self._encoding.decode(array.tolist())

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
def load_tokenizer(path: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a rank file in tiktoken's format (a base64 token and its rank a line), by
    default GPT-2's.

    Text is split before merging as GPT-2 does it. Raises DataError if the file is missing, is no
    such file, lacks a byte, or, for GPT-2's, is altered.
    """
    file = VOCABULARY if path is None else Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot read the vocabulary: {error.strerror}") from None
    found = hashlib.sha256(content).hexdigest()
    if path is None and found != VOCAB_HASH:
        raise DataError(
            f"{file}: not GPT-2's vocabulary (sha256 {found[:12]}…, expected {VOCAB_HASH[:12]}…); "
            "restore the file from the repository"
        )
    ranks: dict[bytes, int] = {}
    lines = content.splitlines()
    for number, line in enumerate(lines, 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise DataError(
                f"{file}:{number}: is not a base64 token and its rank, as in tiktoken's files"
            ) from None
    if sorted(ranks.values()) != list(range(len(lines))):
        raise DataError(f"{file}: its ranks are not 0, 1, 2, …, each once")
    if missing := sorted({bytes([b]) for b in range(256)} - ranks.keys()):
        raise DataError(
            f"{file}: {len(missing)} bytes have no rank, the first 0x{missing[0].hex()}"
        )
    return Tokenizer("gpt2" if path is None else file.stem, ranks, found)
