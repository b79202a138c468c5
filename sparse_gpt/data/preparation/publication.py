"""Finished units become a data set: their records together are its manifest."""

import math
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from sparse_gpt.data.corpus.rejects import Reject, Tally, write_rejects
from sparse_gpt.data.preparation.appending import old_rejects
from sparse_gpt.data.preparation.options import Options
from sparse_gpt.data.preparation.units import Unit, records
from sparse_gpt.data.shards.format import INDEX
from sparse_gpt.data.shards.manifest import SPLITS, Manifest, Splits, write_manifest
from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.errors import DataError


def publish_all(
    out: Path,
    units: list[Unit],
    options: Options,
    tokenizer: Tokenizer,
    rows: list[dict[str, Any]],
    max_rejected: float,
    old: Manifest | None,
    by_file: bool,
) -> None:
    """Write the manifest, the vocabulary and `rejected.jsonl` of what all units made, behind those
    of the `old` corpus if there is one; `rows` are the sources'; `by_file`: files were to be held
    out. Raises DataError if a split that was asked for is empty, Resumable if too many documents
    are broken."""
    splits: Splits = {split: [] for split in SPLITS}
    engines: set[str] = set()
    tally, duplicates, markers = Tally(max_rejected), 0, 0
    first: Reject | None = None
    if old is not None:
        splits = {split: list(old.splits[split]) for split in SPLITS}
        engines |= set(old.tokenizer.get("engines", []))
        markers = old.markers
    for record in records(out, units):
        for split in SPLITS:
            splits[split] += record.splits[split]
        engines.add(record.engine)
        duplicates += record.duplicates
        markers += record.markers
        tally.add(record.documents() + record.duplicates, record.rejected)
        first = first or next(iter(record.rejected), None)
    tally.add(0, [], whole=True)
    _refuse_empty(splits, out, options, by_file, first)
    tokenizer.publish(out)
    rejects_before = list(old_rejects(out, old)) if old else []
    rejected = (reject for record in records(out, units) for reject in record.rejected)
    write_manifest(
        out,
        {**tokenizer.identity(), "engines": sorted(engines)},
        tokenizer.vocabulary,
        old.options if old else options.fields(),
        [*old.sources, *rows] if old else rows,
        splits,
        rejected=write_rejects(out, chain(rejects_before, rejected)),
        duplicates=duplicates,
        **({"markers": markers} if markers else {}),
    )


def _refuse_empty(
    splits: Splits, out: Path, options: Options, by_file: bool, first: Reject | None
) -> None:
    """Raise DataError if a split that was asked for, by a share or by files, got no document;
    `first` of those that are broken."""
    train, held_out = (sum(shard.documents for shard in splits[split]) for split in SPLITS)
    if train and (held_out or not (options.held_out or by_file)):
        return
    if train + held_out == 0 and first is not None:
        raise DataError(
            f"{first.file}:{first.line}: {first.reason}; nor is there another document to be used"
        )
    if train + held_out == 0:
        raise DataError("the corpus holds no text: its documents are empty or white space")
    if by_file:
        which = "to hold out hold" if train else "to train on hold"
        raise DataError(f"the files {which} no text: their documents are empty or white space")
    if train + held_out == 1:
        raise DataError(
            "the corpus is one document, which cannot be both trained on and held out; split it "
            "with a separator, or set held_out to 0"
        )
    shards = [shard for split in SPLITS for shard in splits[split]]
    hashes = np.concatenate([np.fromfile(out / f"{s.name}.idx", INDEX)["hash"] for s in shards])
    if len(np.unique(hashes)) == 1:
        raise DataError(
            f"all {train + held_out} documents are the same text, which cannot be both trained on "
            "and held out; set held_out to 0"
        )
    if train == 0:
        raise DataError(
            f"all {held_out} documents are held out; lower held_out below {options.held_out}"
        )
    lowest = int(hashes.min()) / 2**64
    raise DataError(
        f"none of the {train} documents is held out at held_out {options.held_out}; "
        f"{math.ceil(lowest * 1e4) / 1e4} is the smallest that holds one out, 0 asks for none"
    )
