"""Files to slices, which any process can read in any order; one pass over the input hashes them.

Text and JSON Lines are cut at byte offsets where a document starts, the rest as streams.py and
hub.py say. What the pass finds is noted in the output folder at once, in a file a part,
`.tmp-cuts-…`: a run that goes on, and the other parts, take it from there for files that have kept
their size and times, so parts that run at the same time share the pass. The notes go when the work
is done.
"""

import json
import mmap
import os
import re
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import xxhash

from sparse_gpt.data.corpus.hub import hub_shards
from sparse_gpt.data.corpus.readers import row_groups
from sparse_gpt.data.corpus.sources import SourceFile
from sparse_gpt.errors import DataError
from sparse_gpt.files import TEMPORARY
from sparse_gpt.progress import Progress

NOTES = f"{TEMPORARY}cuts-"
SLICE_BYTES = 4 << 20  # what one worker tokenizes at a time: less than half a second


@dataclass(frozen=True, slots=True)  # a terabyte has 250,000
class Slice:
    """Bytes [start, end) of a file; `line` is the number of its first line or row, `hash` its
    xxh3-128, `number` the row group of parquet, or the shard of a hub data set."""

    file: SourceFile
    start: int
    end: int
    line: int
    hash: str
    number: int = 0

    @property
    def streamed(self) -> bool:
        """Whether it may hold far more text than a worker should return at a time."""
        return self.file.codec is not None or self.file.kind not in ("text", "jsonl")


class Cut(NamedTuple):
    """A file's slices, and its row in the manifest."""

    slices: list[Slice]
    row: dict[str, Any]


def cut_all(
    files: Sequence[SourceFile],
    separator: str | None,
    out: Path,
    part: tuple[int, int],
    threads: int,
    progress: bool,
) -> list[Cut]:
    """Each file's cut, from the notes in the folder `out` or made and noted there; part (i, n)
    begins with the i-th n-th of the files. Raises DataError for a file that cannot be read."""
    number, count = part
    notes = _Notes(out, f"{NOTES}{number}-of-{count}", separator)
    first = len(files) * (number - 1) // count
    total = sum(_stat(file).st_size for file in files if file.kind != "hub")

    def found(file: SourceFile) -> Cut:  # reading and hashing let go of Python's lock
        if file.kind == "hub":
            return cut(file, separator)
        key = notes.key(file)
        if (known := notes.find(key, file)) is None:
            known = cut(file, separator, advance=bar.advance)
            notes.add(key, known)
        else:
            bar.advance(known.row["bytes"])
        return known

    bar = Progress("reading", total, progress)
    with closing(notes), bar, ThreadPoolExecutor(threads) as pool:
        cuts = list(pool.map(found, [*files[first:], *files[:first]]))
    return [*cuts[len(files) - first :], *cuts[: len(files) - first]]


class _Notes:
    """Cuts by what tells one file from another and from itself after a change, from the notes of
    all parts; `add` appends to this part's own."""

    def __init__(self, out: Path, name: str, separator: str | None) -> None:
        self._out, self._path, self._separator = out, out / name, separator
        self._known: dict[str, dict[str, Any]] = {}
        self._read: dict[Path, int] = {}  # bytes of each file of notes
        self._one_at_a_time = threading.Lock()
        self._look()
        self._mine = open(self._path, "ab")  # noqa: SIM115 - closed by `close`
        self._mine.write(b"\n")  # a killed run may have left half a line

    def close(self) -> None:
        """No more are added."""
        self._mine.close()

    def key(self, file: SourceFile) -> str:
        """What a note is filed under. Times, not content, say that a file has not changed since; a
        slice's own hash is compared again when it is tokenized."""
        found = _stat(file)
        times = [found.st_size, found.st_mtime_ns, found.st_ctime_ns]
        what = [os.path.abspath(file.path), file.name, file.kind, self._separator, SLICE_BYTES]
        return json.dumps([*what, *times])

    def find(self, key: str, file: SourceFile) -> Cut | None:
        """The cut of `file` if a part has noted it."""
        with self._one_at_a_time:
            if time.monotonic() > self._looked + 1:
                self._look()
            note = self._known.pop(key, None)
        if note is None:
            return None
        return Cut([Slice(file, *fields) for fields in note["slices"]], note["row"])

    def add(self, key: str, made: Cut) -> None:
        """Note a cut."""
        slices = [[s.start, s.end, s.line, s.hash, s.number] for s in made.slices]
        line = json.dumps({"key": key, "slices": slices, "row": made.row})
        with self._one_at_a_time:
            self._mine.write(line.encode() + b"\n")
            self._mine.flush()

    def _look(self) -> None:
        for path in self._out.glob(f"{NOTES}*"):
            if path == self._path and path in self._read:  # since then, only what is known
                continue
            with suppress(FileNotFoundError), open(path, "rb") as file:
                file.seek(self._read.setdefault(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):  # still being written
                        break
                    self._read[path] += len(line)
                    with suppress(ValueError):
                        note = json.loads(line)
                        self._known[note["key"]] = note
        self._looked = time.monotonic()


def cut(
    file: SourceFile,
    separator: str | None,
    slice_bytes: int = SLICE_BYTES,
    advance: Callable[[int], None] = lambda n_bytes: None,
) -> Cut:
    """Slices, of text and JSON Lines of at least `slice_bytes` (the last: fewer), and the file's
    row in the manifest. `advance` is told of bytes that are read."""
    if file.kind == "hub":
        slices = [
            Slice(file, 0, shard.bytes, 1, shard.hash, number)
            for number, shard in enumerate(hub_shards(file.name))
        ]
        identity = xxhash.xxh3_128_hexdigest("".join(part.hash for part in slices).encode())
        return Cut(slices, {"name": file.name, "shards": len(slices), "identity": identity})
    slices = []
    whole = xxhash.xxh3_128()
    try:
        size = _stat(file).st_size
        with open(file.path, "rb") as handle:
            view = mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            for start, end, line, number in _cuts(file, view, separator, slice_bytes):
                of_slice = xxhash.xxh3_128()
                for at in range(start, end, SLICE_BYTES):
                    block = handle.read(min(SLICE_BYTES, end - at))
                    whole.update(block)
                    of_slice.update(block)
                    advance(len(block))
                slices.append(Slice(file, start, end, line, of_slice.hexdigest(), number))
                if isinstance(view, mmap.mmap):  # what was read counts as our memory until then
                    view.madvise(mmap.MADV_DONTNEED, 0, end)
    except OSError as error:
        raise DataError(f"{file.path}: cannot read: {error.strerror}") from None
    return Cut(slices, {"name": file.name, "bytes": size, "xxh3_128": whole.hexdigest()})


def _stat(file: SourceFile) -> os.stat_result:
    try:
        return file.path.stat()
    except OSError as error:
        raise DataError(f"{file.path}: cannot read: {error.strerror}") from None


def _cuts(
    file: SourceFile, view: mmap.mmap | bytes, separator: str | None, slice_bytes: int
) -> Iterator[tuple[int, int, int, int]]:
    """(start, end, line, number) of each slice; they cover the file."""
    size = len(view)
    if file.kind == "parquet":
        groups = row_groups(file.path)
        ends = [*(start for start, _ in groups[1:]), size]
        start, row = 0, 1
        for number, ((_, rows), end) in enumerate(zip(groups, ends, strict=False)):
            yield start, end, row, number
            start, row = end, row + rows
    elif file.codec is not None or file.kind not in ("text", "jsonl"):
        if size:
            yield 0, size, 1, 0
    else:
        start, line = 0, 1
        while start < size:
            end = _boundary(view, file.kind, separator, start + slice_bytes, size)
            yield start, end, line, 0
            if end < size:
                line += view[start:end].count(b"\n")
            start = end


@lru_cache(maxsize=8)
def separator_pattern(separator: str, crlf: bool = True) -> re.Pattern[bytes]:
    """What matches a separator in a text's bytes: its line ends are Windows' too. Without `crlf`,
    for a text that has none of those, it is ten times as fast."""
    pattern = re.escape(separator.encode())
    return re.compile(pattern.replace(b"\\\n", rb"(?:\r\n|\n)") if crlf else pattern)


def _boundary(view: mmap.mmap | bytes, kind: str, separator: str | None, at: int, size: int) -> int:
    """The first place at or after `at` where a document starts whatever came before; or `size`."""
    if at >= size or (kind == "text" and separator is None):
        return size
    if kind == "jsonl":
        return view.find(b"\n", at - 1) + 1 or size
    pattern, longest = separator_pattern(str(separator)), 2 * len(str(separator).encode())
    found = pattern.search(view, at)
    # An occurrence that overlaps an earlier one counts or not depending on where counting began.
    while found and any(
        earlier.end() > found.start()
        for start in range(max(0, found.start() - longest), found.start())
        if (earlier := pattern.match(view, start))
    ):
        found = pattern.search(view, found.start() + 1)
    return found.start() if found else size
