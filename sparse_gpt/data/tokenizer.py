"""Byte-pair encoding from a rank file, GPT-2's by default; nothing here touches the network.

`tiktoken` is the reference. `gigatoken` (extra `fast`) gives the same ids many times faster. What
it was seen to differ in goes to tiktoken all the same: characters beyond U+FFFF, and texts so long
that tiktoken may refuse them, which must not depend on the engine.
"""

import binascii
import hashlib
import threading
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_gpt.data.vocabulary import (
    PATTERNS,
    VOCAB_FILE,
    VOCAB_HASH,
    VOCABULARY,
    Vocabulary,
    check_pattern,
    dtype_for,
)
from sparse_gpt.errors import DataError
from sparse_gpt.files import publish_bytes

END_OF_TEXT = "<|endoftext|>"  # as it is written
ENGINES = ("auto", "tiktoken", "gigatoken")
_RENEW_AFTER = 125_000_000  # characters; gigatoken keeps every different word it has met
_JOINED = 1 << 16  # tokens
_LONG_RUN = 900_000  # characters; tiktoken's regular expression runs out of stack at a million


class Tokenizer:
    """Text to ids and back. Make one with `load_tokenizer`.

    name        of the vocabulary: "gpt2", or its file's name without suffix
    vocab_size  the ranks and end of text: 50,257 for GPT-2
    eot         the last id, 50,256 for GPT-2; only writers place it, no text encodes to it
    vocab_hash  sha256 (hex) of the vocabulary file
    pattern     the name in PATTERNS of how text is split before merging
    engine      name and version of what encodes, e.g. "tiktoken 0.14.0"
    """

    def __init__(
        self, file: Path, name: str, ranks: dict[bytes, int], vocab_hash: str, pattern: str,
        engine: str,
    ) -> None:  # fmt: skip
        import tiktoken

        self.name = name
        self.eot = len(ranks)
        self.vocab_size = len(ranks) + 1
        self.vocab_hash = vocab_hash
        self.pattern = pattern
        self.engine = f"tiktoken {tiktoken.__version__}"
        self._encoding = tiktoken.Encoding(
            self.name,
            explicit_n_vocab=self.vocab_size,
            pat_str=PATTERNS[pattern],
            mergeable_ranks=ranks,
            special_tokens={END_OF_TEXT: self.eot},  # it wants one; encode() allows none
        )
        tokens = [*sorted(ranks, key=ranks.__getitem__), END_OF_TEXT.encode()]
        self._tokens = np.array(tokens, object)  # of each id its bytes
        self._file = file
        self._one_at_a_time = threading.Lock()  # gigatoken refuses a second thread
        self._fast: Any = self._make_fast() if engine == "gigatoken" else None
        if self._fast is not None:
            self.engine = f"gigatoken {version('gigatoken')}"

    @property
    def is_reference(self) -> bool:
        """Whether the engine is tiktoken itself."""
        return self._fast is None

    def _make_fast(self) -> Any:
        import gigatoken

        self._renew_after = _RENEW_AFTER
        try:  # without special tokens, which it would find in text
            return gigatoken.Tokenizer.from_tiktoken(self._file, self.pattern, special_tokens={})
        except ValueError as error:
            raise DataError(
                f"{self._file}: gigatoken cannot use it: {error}; use the engine tiktoken"
            ) from None

    def encode(self, text: str) -> npt.NDArray[np.uint32]:
        """Ids of `text`, 1-D uint32, read-only; a literal "<|endoftext|>" is encoded as text.

        Raises DataError for text that tiktoken cannot take: lone surrogates, or a run of about a
        million spaces, on which its regular expression runs out of stack.
        """
        [ids] = self.encode_batch([text])
        if isinstance(ids, DataError):
            raise ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32] | DataError]:
        """Of each text what `encode` returns or raises; lets go of Python's lock."""
        fast = [
            number
            for number, text in enumerate(texts)
            if self._fast is not None and not _only_for_tiktoken(text)
        ]
        found = dict(zip(fast, self._encode_fast([texts[n] for n in fast]), strict=True))
        return [
            found[number] if number in found else self._reference_or_error(text)
            for number, text in enumerate(texts)
        ]

    def _encode_fast(self, texts: list[str]) -> list[npt.NDArray[np.uint32]]:
        if not texts:
            return []
        import awkward

        with self._one_at_a_time:
            self._renew_after -= sum(map(len, texts))
            if self._renew_after < 0:
                self._fast = self._make_fast()
            batch = self._fast.encode_batch(texts, parallel=False)
        ends = np.cumsum(awkward.num(batch)).tolist()
        ids = np.asarray(awkward.flatten(batch))
        return [ids[start:end] for start, end in pairwise([0, *ends])]

    def _reference_or_error(self, text: str) -> npt.NDArray[np.uint32] | DataError:
        try:
            return self.reference(text)
        except DataError as error:
            return error

    def reference(self, text: str) -> npt.NDArray[np.uint32]:
        """`encode` by tiktoken, whatever the engine."""
        try:
            return self._encoding.encode_to_numpy(
                text, allowed_special=set(), disallowed_special=()
            )
        except ValueError as error:  # UnicodeEncodeError is one
            raise DataError(f"text that tiktoken cannot encode: {error}") from None

    def decode(self, ids: Iterable[int]) -> str:
        """Text of `ids`; end of text becomes "<|endoftext|>", broken UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What `ids` stand for, whole characters or not; end of text is "<|endoftext|>".

        Raises DataError for an id that is not in the vocabulary.
        """
        array = ids if isinstance(ids, np.ndarray) else np.array([int(i) for i in ids], np.int64)
        if len(array) and not 0 <= array.min() <= array.max() < self.vocab_size:
            raise DataError(
                f"ids must lie in 0 … {self.vocab_size - 1}: {array.min()} … {array.max()}"
            )
        # As tiktoken does, in two thirds of the time: it wants a list of Python's numbers. A join
        # takes 80 bytes for each thing joined.
        starts = range(0, len(array), _JOINED)
        return b"".join(b"".join(self._tokens[array[i : i + _JOINED]].tolist()) for i in starts)

    @property
    def ranks(self) -> dict[bytes, int]:
        """Of each token's bytes its id; end of text is none of them."""
        return {token: rank for rank, token in enumerate(self._tokens[: self.eot].tolist())}

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Bytes of each id's text, `(vocab_size,)`; end of text has none."""
        return np.array([*map(len, self._tokens[: self.eot]), 0], np.int64)

    @property
    def vocabulary(self) -> Vocabulary:
        """What the headers of shards say of it."""
        return Vocabulary(self.vocab_hash, dtype_for(self.vocab_size), self.eot)

    def publish(self, folder: Path) -> None:
        """Put the rank file into `folder` as VOCAB_FILE, unless it is GPT-2's, which is everywhere.

        Raises DataError if it is no longer what was loaded.
        """
        if self.vocab_hash == VOCAB_HASH:
            return
        content = _read(self._file)
        if hashlib.sha256(content).hexdigest() != self.vocab_hash:
            raise DataError(f"{self._file}: has changed since this began; run it again")
        publish_bytes(folder / VOCAB_FILE, content)

    def identity(self) -> dict[str, str | int]:
        """What the tokens depend on; part of the manifest and of every work unit's name. The engine
        is not: all give the same ids."""
        return {
            "name": self.name,
            "vocab_size": self.vocab_size,
            "vocab_hash": self.vocab_hash,
            "pattern": self.pattern,
            "pattern_hash": hashlib.sha256(PATTERNS[self.pattern].encode()).hexdigest(),
        }


def _only_for_tiktoken(text: str) -> bool:
    if not text.isascii():
        try:
            if len(text.encode("utf-16-le")) != 2 * len(text):
                return True  # a character beyond U+FFFF takes two units
        except UnicodeEncodeError:  # half a surrogate pair
            return True
    if len(text) < _LONG_RUN:
        return False
    words = [len(word) for word in text.split()]
    return max(words, default=0) >= _LONG_RUN or len(text) - sum(words) >= _LONG_RUN


@lru_cache(maxsize=4)
def load_tokenizer(
    path: str | Path | None = None, pattern: str = "r50k", engine: str = "tiktoken"
) -> Tokenizer:
    """The tokenizer of a rank file in tiktoken's format (a base64 token and its rank a line), by
    default GPT-2's.

    pattern  how text is split before merging: "r50k" as for GPT-2, "cl100k" or "o200k"
    engine   "tiktoken", "gigatoken", or "auto" for the fastest that is installed

    Raises DataError if the file is missing, is no such file, lacks a byte, or, for GPT-2's, is
    altered, and for a pattern or an engine that is not there.
    """
    check_pattern(pattern)
    if engine not in ENGINES:
        raise DataError(f"engine is {engine!r}; there are {', '.join(ENGINES)}")
    installed = find_spec("gigatoken") is not None
    if engine == "gigatoken" and not installed:
        raise DataError("the engine gigatoken needs: pip install 'sparse-gpt[fast]'")
    if engine == "auto":
        engine = "gigatoken" if installed else "tiktoken"
    file = VOCABULARY if path is None else Path(path)
    content = _read(file)
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
            text, rank = line.split()
            token = binascii.a2b_base64(text)
            if binascii.b2a_base64(token, newline=False) != text:
                raise ValueError("it skips what is not base64")
            if str(int(rank)).encode() != rank:
                raise ValueError("Python alone takes +1 and 1_0")
            ranks[token] = int(rank)
        except ValueError:
            raise DataError(
                f"{file}:{number}: is not a base64 token and its rank, as in tiktoken's files"
            ) from None
    if list(ranks.values()) != list(range(len(lines))):  # gigatoken takes no other order
        raise DataError(f"{file}: its ranks are not 0, 1, 2, …, in this order, a token each")
    if missing := sorted({bytes([b]) for b in range(256)} - ranks.keys()):
        raise DataError(
            f"{file}: {len(missing)} bytes have no rank, the first 0x{missing[0].hex()}"
        )
    return Tokenizer(file, "gpt2" if path is None else file.stem, ranks, found, pattern, engine)


def tokenizer_beside(folder: str | Path, identity: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of what lies in `folder`, shards or a run: GPT-2's, or the VOCAB_FILE's there.

    identity: vocab_hash and pattern, as in a manifest, where an old one has but the hash. Raises
    DataError where the file is missing or another.
    """
    pattern = identity.get("pattern", "r50k")
    if identity["vocab_hash"] == VOCAB_HASH:
        return load_tokenizer(None, pattern)
    path = Path(folder) / VOCAB_FILE
    tokenizer = load_tokenizer(path, pattern)
    if tokenizer.vocab_hash != identity["vocab_hash"]:
        raise DataError(
            f"{path}: is another vocabulary (sha256 {tokenizer.vocab_hash[:12]}…) than the tokens "
            f"were made with ({identity['vocab_hash'][:12]}…); put that one there"
        )
    return tokenizer


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot read the vocabulary: {error.strerror}") from None
