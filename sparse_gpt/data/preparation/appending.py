"""Adding documents to a corpus that is made: new units behind the old, which stay as they are."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from sparse_gpt.data.corpus.rejects import REJECTED, Reject
from sparse_gpt.data.corpus.slices import Cut
from sparse_gpt.data.preparation.options import USUAL, Options
from sparse_gpt.data.shards.manifest import Manifest
from sparse_gpt.data.tokenizer import Tokenizer
from sparse_gpt.errors import DataError


def continued(options: Options, tokenizer: Tokenizer, old: Manifest, out: Path) -> Options:
    """The options for what is added: those given, which must be the corpus's own, and the document
    that it moved, so that no text is on both sides. Raises DataError that names what differs."""
    if options.dedup:
        raise DataError("append cannot find duplicates of what is there; make the corpus anew")
    given: dict[str, Any] = {**USUAL, **json.loads(json.dumps(options.fields()))}
    given |= {key: str(value) for key, value in tokenizer.identity().items() if key != "name"}
    had = {**USUAL, **old.options, **{key: str(value) for key, value in old.tokenizer.items()}}
    for key in given:
        if key not in ("cut_last", "moved") and given[key] != had.get(key):  # those it chose itself
            raise DataError(
                f"{out}: was made with {key} {had.get(key)!r}, not {given[key]!r}; append with the "
                "same options and vocabulary, or write other shards"
            )
    return replace(options, moved=had["moved"])


def not_yet(cuts: Sequence[Cut], old: Manifest) -> list[Cut]:
    """The files whose content is not in the corpus."""
    known = set(map(identity, old.sources))
    return [found for found in cuts if identity(found.row) not in known]


def identity(row: dict[str, Any]) -> str:
    """What tells the content of a source from that of another, from its row in the manifest."""
    return str(row.get("xxh3_128") or row.get("identity"))


def old_rejects(out: Path, old: Manifest) -> Iterator[Reject]:
    """Those of the corpus; what a run that was stopped has written behind them is left out."""
    if old.rejected:
        with open(out / REJECTED, encoding="utf-8") as file:
            yield from (Reject(**json.loads(line)) for line in islice(file, old.rejected))
