"""Units are done: a worker a unit, or all workers on one after another."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path

from sparse_gpt.data.corpus.rejects import Tally
from sparse_gpt.data.preparation.dedup import Seen
from sparse_gpt.data.preparation.options import Options
from sparse_gpt.data.preparation.tokenizing import do_unit, pieces, tokenize
from sparse_gpt.data.preparation.units import Unit, UnitWriter, count_records, finished, hashes_of
from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.data.workers import in_order
from sparse_gpt.progress import Progress


@dataclass
class Work:
    """What units are done with."""

    out: Path
    options: Options
    load: Callable[[], Tokenizer]
    workers: int
    tally: Tally
    progress: bool
    _tell_after: float = 0.0

    def finished(self, units: list[Unit]) -> set[int]:
        """The numbers of the units that need not be done; counts their documents."""
        begun = [unit for unit in units if unit.record(self.out).exists()]
        done: set[int] = set()
        bar = Progress("checking", sum(unit.bytes for unit in begun), self.progress)
        with bar, ThreadPoolExecutor(self.workers) as pool:  # hashing lets go of Python's lock
            records = pool.map(partial(finished, self.out), begun)
            for unit, record in zip(begun, records, strict=True):
                if record is not None:
                    done.add(unit.number)
                    self.tally.add(record.documents() + record.duplicates, record.rejected)
                bar.advance(unit.bytes)
        return done

    def do(self, units: list[Unit], done: set[int], count: int) -> None:
        """Do the units that are not done yet, of `count` that all parts do: a worker a unit, or
        where they are too few for that, or each depends on all before it, all workers on one."""
        todo = [unit for unit in units if unit.number not in done]
        bar = Progress("tokenizing", sum(unit.bytes for unit in todo), self.progress)
        with bar:
            if len(todo) >= self.workers > 1 and not self.options.dedup:
                self._side_by_side(todo, count, bar)
            else:
                self._one_by_one(units, done, count, bar)

    def _tell(self, bar: Progress, count: int) -> None:
        """How many units all parts have finished; seldom, for it takes long where they are many."""
        start = time.monotonic()
        if self.progress and start >= self._tell_after:
            bar.title(f"tokenizing, {count_records(self.out)}/{count} units")
            now = time.monotonic()
            self._tell_after = now + max(1, 100 * (now - start))

    def _side_by_side(self, todo: list[Unit], count: int, bar: Progress) -> None:
        do = partial(do_unit, self.out, self.options, self.load, strict=self.tally.limit == 0)
        with closing(in_order(do, todo, self.workers)) as results:
            for unit, made in results:
                self.tally.add(made.documents, made.rejects)
                bar.advance(unit.bytes, made.characters, made.tokens)
                self._tell(bar, count)
        self.tally.add(0, [], whole=True)

    def _one_by_one(self, units: list[Unit], done: set[int], count: int, bar: Progress) -> None:
        out, options, workers = self.out, self.options, self.workers
        todo = [unit for unit in units if unit.number not in done]
        chunks = [chunk for unit in todo for chunk in unit.chunks]
        if not any(part.streamed for chunk in chunks for part in chunk):
            workers = max(1, min(workers, len(chunks)))  # a process takes a second to start
        todo_pieces = (piece for unit in todo for piece in pieces(unit, options.reading))
        seen = Seen()
        with closing(
            in_order(partial(tokenize, options=options, load=self.load), todo_pieces, workers)
        ) as results:
            by_unit = groupby(results, key=lambda result: result[0].unit)
            for unit in units:
                if unit.number in done:
                    if options.dedup:
                        seen.add(hashes_of(out, unit))
                    continue
                self._tell(bar, count)
                with UnitWriter(out, unit, self.load(), options) as writer:
                    for piece, found in next(by_unit)[1]:
                        self.tally.add(len(found.lengths), found.rejects)
                        if options.dedup:
                            is_new = seen.add(found.hashes)
                            writer.leave_out(int((~is_new).sum()))
                            found = found.only(is_new)
                        writer.add(found)
                        bar.advance(piece.bytes, found.characters, len(found.tokens))
                    if unit is todo[-1]:
                        self.tally.add(0, [], whole=True)
                    writer.finish()
