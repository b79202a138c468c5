"""Data sets of the hub, streamed by `datasets`.

`hf:NAME[:SUBSET][:SPLIT]` names one as `datasets.load_dataset` does: on the hub, or a local folder.
Without SUBSET its default one is read, without SPLIT "train"; `hf:NAME::SPLIT` leaves out the
subset alone.
"""

import copy
import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from textwrap import shorten
from typing import Any, NamedTuple

import xxhash

from sparse_gpt.data.corpus.isolated import isolated
from sparse_gpt.data.corpus.readers import ROWS, packed, require_columns, top_columns
from sparse_gpt.errors import DataError, Resumable

HUB = "hf:"
_SHARD_BYTES = 400_000_000  # of a shard that is not a file; about a unit


class HubShard(NamedTuple):
    """One of a hub data set: its file, if it is one; its bytes (400 MB if they are not known); and
    a hash of its content and of how it is read, so that a commit which leaves both alone makes no
    other input."""

    file: str
    bytes: int
    hash: str


def hub_shards(source: str) -> list[HubShard]:
    """The shards of a hub data set; raises DataError if it cannot be opened."""
    return _hub(source)[-1]


def hub_rows(source: str, hash: str, columns: list[str]) -> Iterator[tuple[int, bytes]]:
    """As `readers.parquet_rows`, of the shard of a hub data set with this hash; raises Resumable if
    it cannot be had."""
    return isolated(source, _hub_rows, source, hash, columns)


def _hub_rows(source: str, hash: str, columns: list[str]) -> Iterator[tuple[int, bytes]]:
    shards = hub_shards(source)  # of a worker's own: there may be a new commit since the cutting
    number = next((n for n, shard in enumerate(shards) if shard.hash == hash), None)
    if number is None:
        raise Resumable(f"{source}: changed while it was being read; run again")
    try:
        dataset = _narrow(source, tuple(columns))
        part = dataset.shard(num_shards=len(shards), index=number)
        for table in part.with_format("arrow").iter(batch_size=ROWS):
            require_columns(columns, table.column_names, source)
            table = table.select(top_columns(columns, table.column_names))
            yield table.num_rows, packed(table)
    except DataError:
        raise
    except Exception as error:  # Arrow's, zlib's, httpx's, of whoever is between here and the hub
        advice = "run again to go on from what is finished"
        if isinstance(error, (ValueError, EOFError)):  # what came cannot be parsed
            advice = "download the files and prepare those: there, a broken line is set aside"
        name = shards[number].file or f"shard {number}"
        raise Resumable(f"{source}: {name}: {_reason(error)}; {advice}") from None


@lru_cache(maxsize=8)
def _hub(source: str) -> tuple[Any, Any, str, list[HubShard]]:
    """The builder of a data set, the data set, both of one revision as long as this process lives,
    its split and its shards."""
    import datasets
    from fsspec.core import url_to_fs

    name, subset, split = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    if not name or source.count(":") > 3:
        raise DataError(f"{source}: a hub data set is hf:NAME[:SUBSET][:SPLIT]")
    split = split or "train"
    try:
        builder = datasets.load_dataset_builder(name, subset or None)
        dataset = builder.as_streaming_dataset(split=split)
        defaults = vars(type(builder.config))
        said = {key: v for key, v in vars(builder.config).items() if v != defaults.get(key)}
        files = said.pop("data_files", {}).get(split, [])
        places = [url_to_fs(file) for file in files]
        infos = [where.info(path) for where, path in places]  # the listing is fetched already
    except Exception as error:  # as in `_hub_rows`, and yaml's
        raise Resumable(f"{source}: {_reason(error)}") from None
    origin = [*files, *files.origin_metadata] if files else [builder.hash, split]
    if len(files) != dataset.num_shards:  # archives, or several splits
        files, infos = [""] * dataset.num_shards, [{}] * dataset.num_shards
    shards = []
    for number, (file, info) in enumerate(zip(files, infos, strict=True)):
        what = [builder.name, said, info.get("blob_id") or [*origin, number]]
        hash = xxhash.xxh3_128_hexdigest(json.dumps(what, default=str).encode())
        place = file.removeprefix(f"{builder.base_path}/")
        shards.append(HubShard(place, info.get("size") or _SHARD_BYTES, hash))
    return builder, dataset, split, shards


@lru_cache(maxsize=8)
def _narrow(source: str, columns: tuple[str, ...]) -> Any:
    """The data set; if it is parquet, only of these columns, which alone are then fetched."""
    builder, dataset, split, _ = _hub(source)
    if builder.name != "parquet" or builder.config.columns is not None:
        return dataset
    require_columns(list(columns), list(builder.info.features), source)
    narrow = copy.copy(builder)
    tops = top_columns(list(columns), list(builder.info.features))
    narrow.config = replace(builder.config, columns=tops)
    narrow.info = builder.info.copy()
    return narrow.as_streaming_dataset(split=split)


def _reason(error: Exception) -> str:
    """What is wrong in one line, and what to do if it is a name or a right to read."""
    from datasets.exceptions import DatasetNotFoundError

    text = re.split(r"\n(?:For more|Example of)", str(error))[0]
    text = shorten(text, 300, placeholder=" …").rstrip(".") or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, DatasetNotFoundError) or status in (401, 403):
        text += "; check the name, and set HF_TOKEN to a token that may read it if it is private"
    return text
