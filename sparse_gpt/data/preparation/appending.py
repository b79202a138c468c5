"""Adding documents to a corpus that is made: new units behind the old, which stay as they are."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from sparse_gpt.data.corpus.rejects import REJECTED, Reject
from sparse_gpt.data.corpus.slices import Cut
from sparse_gpt.data.preparation.units import Options
from sparse_gpt.data.shards.manifest import Manifest
from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.errors import DataError


def continued(options: Options, tokenizer: Tokenizer, old: Manifest, out: Path) -> Options:
    """The options for what is added: those given, which must be the corpus's own, and the document
    that it moved, so that no text is on both sides. Raises DataError that names what differs."""
    if options.dedup:
        raise DataError("append cannot find duplicates of what is there; make the corpus anew")
    given: dict[str, Any] = json.loads(json.dumps(options.fields()))
    given |= {key: str(value) for key, value in tokenizer.identity().items() if key != "name"}
    had = {**old.options, **{key: str(value) for key, value in old.tokenizer.items()}}
    for key in ("keep_separator", *given):  # which is left out where it is true
        if given.get(key, True) != had.get(key, True):
            raise DataError(
                f"{out}: was made with {key} {had.get(key, True)!r}, not {given.get(key, True)!r}; "
                "append with the same options and vocabulary, or write other shards"
            )
    return replace(options, moved=had.get("moved"))


def not_yet(cuts: Sequence[Cut], old: Manifest) -> list[Cut]:
    """The files whose content is not in the corpus."""
    known = set(map(_identity, old.sources))
    return [found for found in cuts if _identity(found.row) not in known]


def _identity(row: dict[str, Any]) -> str:
    return str(row.get("xxh3_128") or row.get("identity"))


def old_rejects(out: Path, old: Manifest) -> Iterator[Reject]:
    """Those of the corpus; what a run that was stopped has written behind them is left out."""
    if old.rejected:
        with open(out / REJECTED, encoding="utf-8") as file:
            yield from (Reject(**json.loads(line)) for line in islice(file, old.rejected))
