"""Documents to shards on the disk, each under its name only when it is whole."""

from pathlib import Path

import numpy as np
import numpy.typing as npt

from sparse_gpt.data.shards.format import (
    DTYPES,
    HEADER_BYTES,
    INDEX,
    MAX_TOKENS,
    ShardEntry,
    file_entry,
    header,
)
from sparse_gpt.data.vocabulary import Vocabulary
from sparse_gpt.errors import DataError
from sparse_gpt.files import publish, temporary


class ShardWriter:
    """Writes one shard; nothing has its name before `finish`."""

    def __init__(self, folder: Path, name: str, vocabulary: Vocabulary) -> None:
        self.tokens = 0
        self._name = name
        self._bin, self._idx = folder / f"{name}.bin", folder / f"{name}.idx"
        self._vocabulary = vocabulary
        self._dtype = DTYPES[vocabulary.dtype]
        self._documents = 0
        self._file = open(temporary(self._bin), "wb")  # noqa: SIM115 - closed by finish or close
        self._index = open(temporary(self._idx), "wb")  # noqa: SIM115 - the same
        self._file.write(bytes(HEADER_BYTES))

    def add(self, tokens: npt.NDArray[np.unsignedinteger], document_hash: int) -> None:
        """`extend` by one document."""
        self.extend(tokens, np.array([len(tokens)]), np.array([document_hash], np.uint64))

    def extend(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        lengths: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.uint64],
    ) -> None:
        """Append documents (1-D ids back to back, each opened by end of text, and a length and a
        content hash for each); raises DataError for an id that the shard's dtype cannot hold and
        for more tokens than a shard can count."""
        if tokens.max() > np.iinfo(self._dtype).max:
            raise DataError(f"{self._bin}: id {tokens.max()} does not fit {self._dtype.name}")
        if self.tokens + len(tokens) > MAX_TOKENS:
            raise DataError(f"{self._bin}: more than {MAX_TOKENS} tokens; split the document")
        index = np.empty(len(lengths), INDEX)
        index["start"] = self.tokens + np.cumsum(lengths) - lengths
        index["hash"] = hashes
        self._index.write(index.tobytes())
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self._documents += len(lengths)
        self.tokens += len(tokens)

    def finish(self) -> ShardEntry:
        """Publish both files, the index first."""
        self._file.seek(0)
        self._file.write(header(self.tokens, self._documents, self._vocabulary))
        self.close()
        entries = [file_entry(temporary(path)) for path in (self._bin, self._idx)]
        publish(self._idx)
        publish(self._bin)
        return ShardEntry(self._name, self.tokens, self._documents, *entries)

    def close(self) -> None:
        """Let go of an unfinished shard; its temporary files stay for the caller to remove."""
        self._file.close()
        self._index.close()


class Shards:
    """Writes documents into shards of at most `shard_tokens` tokens, one after the other; `name`
    has a place for their numbers."""

    def __init__(self, folder: Path, name: str, vocabulary: Vocabulary, shard_tokens: int) -> None:
        self._folder, self._name, self._vocabulary = folder, name, vocabulary
        self._shard_tokens = shard_tokens
        self._entries: list[ShardEntry] = []
        self._open: ShardWriter | None = None

    def extend(
        self,
        tokens: npt.NDArray[np.unsignedinteger],
        lengths: npt.NDArray[np.int64],
        hashes: npt.NDArray[np.uint64],
    ) -> None:
        """As `ShardWriter.extend`, in a new shard where they do not fit."""
        ends = np.cumsum(lengths)
        first = done = 0
        while first < len(ends):
            if self._open is None:
                name = self._name.format(len(self._entries))
                self._open = ShardWriter(self._folder, name, self._vocabulary)
            room = self._shard_tokens - self._open.tokens
            last = int(np.searchsorted(ends, done + room, side="right"))
            if last == first and self._open.tokens:
                self._finish_one(self._open)
                continue
            last = max(last, first + 1)  # a document that is longer than a shard has its own
            end = int(ends[last - 1])
            self._open.extend(tokens[done:end], lengths[first:last], hashes[first:last])
            first, done = last, end

    def finish(self) -> list[ShardEntry]:
        """Publish what is open; all shards."""
        if self._open is not None:
            self._finish_one(self._open)
        return self._entries

    def _finish_one(self, writer: ShardWriter) -> None:
        self._entries.append(writer.finish())
        self._open = None

    def close(self) -> None:
        """Let go of what is unfinished."""
        if self._open is not None:
            self._open.close()
