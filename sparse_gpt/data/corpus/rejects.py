"""Documents that cannot be used: set aside and counted, until they are too many."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from sparse_gpt.errors import DataError, Resumable
from sparse_gpt.files import publish, temporary

REJECTED = "rejected.jsonl"
MAX_REJECTED = 0.01
_ENOUGH = 10_000  # documents, before a fraction of those so far says something of the rest


@dataclass(frozen=True)
class Reject:
    """One document that was set aside: the file's name as in the manifest's sources, the line (of
    parquet: the row, counted from 1) at which it starts, and what is wrong with it."""

    file: str
    line: int
    reason: str


class Tally:
    """Counts documents and rejects, and stops the run when more than `limit`, a fraction of the
    documents, are rejected. A limit of 0 stops it at the first."""

    def __init__(self, limit: float) -> None:
        if not 0 <= limit <= 1:
            raise DataError(f"max_rejected is {limit}; it is a fraction: 0 ≤ max_rejected ≤ 1")
        self.limit = limit
        self._documents = self._rejected = 0
        self._first: Reject | None = None

    def add(self, documents: int, rejects: list[Reject], *, whole: bool = False) -> None:
        """Count `documents` good ones and the rejects; `whole`: of all there are, or of a large
        part. Raises Resumable, naming the first."""
        self._documents += documents + len(rejects)
        self._rejected += len(rejects)
        if self._first is None and rejects:
            self._first = rejects[0]
        sure = whole or self.limit == 0 or self._documents >= _ENOUGH
        if self._first is None or not sure or self._rejected <= self.limit * self._documents:
            return
        where = f"{self._first.file}:{self._first.line}: {self._first.reason}"
        if self.limit == 0:
            raise Resumable(where)
        raise Resumable(
            f"{where}; {self._rejected:,} of {self._documents:,} documents are as broken, more "
            f"than {self.limit:.2%}: mend them, or allow a larger fraction with max_rejected"
        )


def write_rejects(folder: Path, rejects: Iterable[Reject]) -> int:
    """Publish `rejected.jsonl`, {file, line, reason} a line, unless there are none; how many."""
    path, count = folder / REJECTED, 0
    with open(temporary(path), "w", encoding="utf-8") as file:
        for count, reject in enumerate(rejects, 1):  # noqa: B007 - the last is wanted
            file.write(json.dumps(asdict(reject)) + "\n")
    if count:
        publish(path)
    else:
        temporary(path).unlink()
    return count
