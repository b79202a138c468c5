"""Units of work: fixed slices of the input, each of which becomes its own shards or is not done.

Unit UUUUU writes `SPLIT-UUUUU-PP-KEY.bin` and `.idx` (parts PP: more than one where it holds more
than `shard_tokens`), and last its record, `unit-UUUUU-KEY.json`: a sealed JSON file with "splits"
as in the manifest, "rejected", a list of {file, line, reason}, and a Record's other fields. KEY is
a hash of the unit's bytes, the tokenizer and the options (with dedup of all units before it too),
so a unit whose record is there and whose files match it need not be done again, by any process.
The records of all units together are the manifest's shards; nothing is merged or rewritten.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import TypeAdapter

from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import SLICE_BYTES, Slice
from sparse_gpt.data.preparation.options import Options
from sparse_gpt.data.shards.format import INDEX
from sparse_gpt.data.shards.manifest import FORMAT, SPLITS, Splits, shards_to_json
from sparse_gpt.data.shards.reader import damages
from sparse_gpt.data.shards.writer import Shards
from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.errors import DataError
from sparse_gpt.files import read_sealed, write_sealed
from sparse_gpt.schema import Natural, checked

BYTES_PER_TOKEN = 4  # of English text, about; decides how much input makes a shard
_NAME = re.compile(
    r"(?:\.tmp-)?(?:(?:train|held_out)-(\d{5,})-\d{2,}|unit-(\d{5,}))-([0-9a-f]{16})\.(?:bin|idx|json)"
)


@dataclass(frozen=True)
class Tokenized:
    """Documents of a part of the input, in its order.

    tokens   1-D, of the shards' dtype: the documents back to back, each opened by end of text
    lengths  int64, tokens of each document       hashes   uint64, its `content_hash`
    rejects  what is not among them               characters  of all texts
    markers  documents that hold end of text as it is written
    """

    tokens: npt.NDArray[np.unsignedinteger]
    lengths: npt.NDArray[np.int64]
    hashes: npt.NDArray[np.uint64]
    rejects: list[Reject]
    characters: int
    markers: int

    def only(self, rows: npt.NDArray[np.bool_]) -> "Tokenized":
        """The documents of these rows (a mask); rejects are all kept."""
        if rows.all():
            return self
        tokens = self.tokens[np.repeat(rows, self.lengths)]
        return replace(self, tokens=tokens, lengths=self.lengths[rows], hashes=self.hashes[rows])


@dataclass
class Record:
    """What a finished unit made: its shards, what it set aside, how many duplicates it left out, by
    which engine and version, and how many documents hold end of text as it is written."""

    splits: Splits
    rejected: list[Reject]
    duplicates: Natural
    engine: str
    markers: Natural = 0

    def documents(self) -> int:
        """Documents in the shards."""
        return sum(shard.documents for split in SPLITS for shard in self.splits[split])


_FORM = TypeAdapter(Record)


@dataclass(frozen=True)
class Unit:
    """Consecutive chunks of the input, of files that are held out or of others; a chunk is a few
    slices, what a worker does at a time."""

    number: int
    key: str
    chunks: list[list[Slice]]

    @property
    def bytes(self) -> int:
        """Bytes of its input."""
        return sum(map(input_bytes, self.chunks))

    @property
    def held_out(self) -> bool:
        """Whether its files are."""
        return self.chunks[0][0].file.held_out

    def name(self, kind: str) -> str:
        """What this unit's files of a kind ("unit", "train", …) are called, before any part."""
        return f"{kind}-{self.number:05d}"

    def record(self, out: Path) -> Path:
        """Where the record of the finished unit stands."""
        return out / f"{self.name('unit')}-{self.key}.json"


def plan(slices: list[Slice], options: Options, tokenizer: Tokenizer, first: int = 0) -> list[Unit]:
    """All units of the input, in its order, files that are held out behind the others; numbered
    from `first`; a pure function of its bytes and the options."""
    units: list[Unit] = []
    key, size = "", options.shard_tokens * BYTES_PER_TOKEN
    for group in chain.from_iterable(
        _grouped((part for part in slices if part.file.held_out is side), size)
        for side in (False, True)
    ):
        of_side = ("held_out",) if group[0].file.held_out else ()
        content = [(part.file.kind, part.file.codec, part.hash, *of_side) for part in group]
        before = key if options.dedup else ""
        identity = json.dumps([FORMAT, tokenizer.identity(), options.fields(), content, before])
        key = hashlib.sha256(identity.encode()).hexdigest()[:16]
        units.append(Unit(first + len(units), key, list(_grouped(group, SLICE_BYTES))))
    return units


def input_bytes(slices: Iterable[Slice]) -> int:
    """Bytes of input in slices."""
    return sum(part.end - part.start for part in slices)


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


def refuse_strangers(out: Path, allowed: set[str], others: re.Pattern[str] | None = None) -> None:
    """Raise DataError unless everything in `out` is allowed or has the name of some unit's file, or
    of others'. One look: other processes make files there meanwhile."""
    for path in sorted(out.iterdir()):
        known = _NAME.fullmatch(path.name) or (others and others.fullmatch(path.name))
        if path.name not in allowed and not known:
            raise DataError(f"{out}: not empty: it holds {path.name!r}; choose another folder")


def units_of(splits: Splits) -> set[tuple[int, str]]:
    """Number and key of the units that made shards; of imported ones none."""
    names = (f"{shard.name}.bin" for split in SPLITS for shard in splits[split])
    return {_unit_of(match) for name in names if (match := _NAME.fullmatch(name))}


def refuse_other_units(out: Path, units: list[Unit], old: set[tuple[int, str]]) -> None:
    """Raise DataError unless every unit's file in `out` is of these units or an old one; with old
    ones, there may be records of such that made no shards."""
    ours = {(unit.number, unit.key) for unit in units} | old
    for path in sorted(out.iterdir()):
        match = _NAME.fullmatch(path.name)
        if match and _unit_of(match) not in ours and not (old and match[2]):
            raise DataError(
                f"{out}: holds shards made from other input or options ({path.name}); choose "
                "another folder, or delete this one to start afresh"
            )


def files_of(out: Path, units: list[Unit]) -> set[Path]:
    """The files in `out` that these units write, temporary ones included."""
    ours = {(unit.number, unit.key) for unit in units}
    found = ((path, _NAME.fullmatch(path.name)) for path in out.iterdir())
    return {path for path, match in found if match and _unit_of(match) in ours}


def _unit_of(match: re.Match[str]) -> tuple[int, str]:
    return int(match[1] or match[2]), match[3]


def finished(out: Path, unit: Unit) -> Record | None:
    """The unit's record if it is there and every file matches it."""
    record = read_record(out, unit)
    if record is None:
        return None
    damaged = any(damages(out, shard) for split in SPLITS for shard in record.splits[split])
    return None if damaged else record


def read_record(out: Path, unit: Unit) -> Record | None:
    """The unit's record if it is there and whole itself."""
    try:
        fields = read_sealed(unit.record(out))
        del fields["hash"]
        return checked(_FORM, fields)
    except (FileNotFoundError, ValueError):
        return None


def records(out: Path, units: Iterable[Unit]) -> Iterator[Record]:
    """Those of the units' records that are there, one at a time: rejects may be many."""
    return (record for unit in units if (record := read_record(out, unit)))


def count_records(out: Path) -> int:
    """How many units are finished, whichever part did them."""
    return sum(1 for _ in out.glob("unit-*.json"))


def hashes_of(out: Path, unit: Unit) -> npt.NDArray[np.uint64]:
    """Those of all documents in the finished unit's shards."""
    found = records(out, [unit])
    shards = [shard for record in found for split in SPLITS for shard in record.splits[split]]
    indexes = [np.fromfile(out / f"{shard.name}.idx", INDEX)["hash"] for shard in shards]
    return np.concatenate([np.empty(0, np.uint64), *indexes])


class UnitWriter:
    """Distributes one unit's documents over its shards; a context manager that lets go of what is
    unfinished when it ends."""

    def __init__(self, out: Path, unit: Unit, tokenizer: Tokenizer, options: Options) -> None:
        self._out, self._unit = out, unit
        self._options = options
        self._shards = {
            split: Shards(
                out,
                f"{unit.name(split)}-{{:02d}}-{unit.key}",
                tokenizer.vocabulary,
                options.shard_tokens,
            )
            for split in SPLITS
        }
        self._rejected: list[Reject] = []
        self._duplicates = self._markers = 0
        self._engine = tokenizer.engine

    def __enter__(self) -> "UnitWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        for writer in self._shards.values():
            writer.close()

    def add(self, found: Tokenized) -> None:
        """Append documents to their splits' shards."""
        self._rejected.extend(found.rejects)
        self._markers += found.markers
        hashes = found.hashes
        if self._options.cut_last:
            held_out = np.arange(len(hashes)) > 0
        elif self._unit.held_out:
            held_out = np.ones(len(hashes), np.bool_)
        else:
            held_out = self._options.holds_out(hashes)
        for split, rows in zip(SPLITS, (~held_out, held_out), strict=True):
            of_split = found.only(rows)
            self._shards[split].extend(of_split.tokens, of_split.lengths, of_split.hashes)

    def leave_out(self, duplicates: int) -> None:
        """Count documents that are not added."""
        self._duplicates += duplicates

    def finish(self) -> Record:
        """Publish what is open, then the record."""
        splits = {split: writer.finish() for split, writer in self._shards.items()}
        fields = {
            "splits": shards_to_json(splits),
            "rejected": [asdict(reject) for reject in self._rejected],
            "duplicates": self._duplicates,
            "engine": self._engine,
            "markers": self._markers,
        }
        write_sealed(self._unit.record(self._out), fields)
        return Record(splits, self._rejected, self._duplicates, self._engine, self._markers)
