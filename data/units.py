"""Units of work: fixed slices of the input, each of which becomes its own shards or is not done.

Unit UUUUU writes `SPLIT-UUUUU-PP-KEY.bin` and `.idx` (parts PP: more than one where it holds more
than `shard_tokens`), and last its record, `unit-UUUUU-KEY.json`: a sealed JSON file with "splits"
as in the manifest. KEY is a hash of the unit's bytes, the tokenizer and the options, so a unit
whose record is there and whose files match it need not be done again, by whatever process. The
records of all units together are the manifest's shards; nothing is merged or rewritten.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from data.documents import SLICE_BYTES, Reading, Slice
from data.errors import DataError
from data.manifest import (
    FORMAT,
    SPLITS,
    read_sealed,
    shards_from_json,
    shards_to_json,
    write_sealed,
)
from data.reader import damages
from data.shards import ShardEntry, ShardWriter, Vocabulary, dtype_for
from data.tokenizer import Tokenizer

BYTES_PER_TOKEN = 4  # of English text, about; decides how much input makes a shard
_NAME = re.compile(
    r"(?:\.tmp-)?(?:(?:train|held_out)-(\d{5,})-\d{2,}|unit-(\d{5,}))-([0-9a-f]{16})\.(?:bin|idx|json)"
)

Shards = dict[str, list[ShardEntry]]


@dataclass(frozen=True)
class Options:
    """What changes the shards, besides the input and the tokenizer; see `prepare`."""

    held_out: float
    shard_tokens: int
    separator: str | None
    text_field: str

    def __post_init__(self) -> None:
        if not 0 <= self.held_out < 1:
            raise DataError(f"held_out is {self.held_out}; it is a fraction: 0 ≤ held_out < 1")
        if self.shard_tokens < 1:
            raise DataError(f"shard_tokens is {self.shard_tokens}; it must be at least 1")
        if self.separator == "":
            raise DataError("separator is empty; leave it out for one document a file")

    @property
    def reading(self) -> Reading:
        """The part that says how documents are taken from files."""
        return Reading(self.separator, self.text_field)


@dataclass(frozen=True)
class Unit:
    """Consecutive chunks of the input; a chunk is a few slices, what a worker does at a time."""

    number: int
    key: str
    chunks: list[list[Slice]]

    def name(self, kind: str) -> str:
        """What this unit's files of a kind ("unit", "train", …) are called, before any part."""
        return f"{kind}-{self.number:05d}"

    def record(self, out: Path) -> Path:
        """Where the record of the finished unit stands."""
        return out / f"{self.name('unit')}-{self.key}.json"


def plan(slices: list[Slice], options: Options, tokenizer: Tokenizer) -> list[Unit]:
    """All units of the input, in its order; a pure function of its bytes and the options."""
    units: list[Unit] = []
    for group in _grouped(slices, options.shard_tokens * BYTES_PER_TOKEN):
        content = [(part.kind, part.hash) for part in group]
        identity = json.dumps([FORMAT, tokenizer.identity(), asdict(options), content])
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        units.append(Unit(len(units), key, list(_grouped(group, SLICE_BYTES))))
    return units


def chunk_bytes(chunk: list[Slice]) -> int:
    """Bytes of input in a chunk."""
    return sum(part.end - part.start for part in chunk)


def _grouped(slices: Iterable[Slice], size: int) -> Iterator[list[Slice]]:
    """Runs of slices, each as short as reaches `size` bytes."""
    group: list[Slice] = []
    filled = 0
    for part in slices:
        group.append(part)
        filled += part.end - part.start
        if filled >= size:
            yield group
            group, filled = [], 0
    if group:
        yield group


def refuse_strangers(out: Path, units: list[Unit], allowed: set[str]) -> None:
    """Raise DataError unless everything in `out` is allowed or a file that these units write."""
    ours = {(unit.number, unit.key) for unit in units}
    for path in sorted(out.iterdir()):
        if path.name in allowed:
            continue
        match = _NAME.fullmatch(path.name)
        if match is None:
            raise DataError(f"{out}: not empty: it holds {path.name!r}; choose another folder")
        if (int(match[1] or match[2]), match[3]) not in ours:
            raise DataError(
                f"{out}: holds shards made from other input or options ({path.name}); choose "
                "another folder, or delete this one to start afresh"
            )


def finished(out: Path, unit: Unit) -> Shards | None:
    """The unit's shards if its record is there and every file matches it."""
    try:
        shards = shards_from_json(read_sealed(unit.record(out))["splits"])
    except (FileNotFoundError, DataError):
        return None
    damaged = any(damages(out, shard) for split in SPLITS for shard in shards[split])
    return None if damaged else shards


class UnitWriter:
    """Distributes one unit's documents over its shards; a context manager that lets go of what is
    unfinished when it ends."""

    def __init__(self, out: Path, unit: Unit, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self._out, self._unit, self._shard_tokens = out, unit, shard_tokens
        self._vocabulary = Vocabulary(
            tokenizer.vocab_hash, dtype_for(tokenizer.vocab_size), tokenizer.eot
        )
        self._open: dict[str, ShardWriter] = {}
        self._shards: Shards = {split: [] for split in SPLITS}

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._open.values():
            writer.close()

    def add(self, split: str, ids: npt.NDArray[np.uint32], document_hash: int) -> None:
        """Append a document (ids with end of text first) to the split's shard, or to a new one if
        it does not fit there."""
        writer = self._open.get(split)
        if writer is not None and writer.tokens + len(ids) > self._shard_tokens:
            self._finish(split)
            writer = None
        if writer is None:
            part = f"{len(self._shards[split]):02d}-{self._unit.key}"
            name = f"{self._unit.name(split)}-{part}"
            writer = self._open[split] = ShardWriter(self._out, name, self._vocabulary)
        writer.add(ids, document_hash)

    def finish(self) -> Shards:
        """Publish what is open, then the record."""
        for split in list(self._open):
            self._finish(split)
        write_sealed(self._unit.record(self._out), {"splits": shards_to_json(self._shards)})
        return self._shards

    def _finish(self, split: str) -> None:
        self._shards[split].append(self._open[split].finish())
        del self._open[split]
