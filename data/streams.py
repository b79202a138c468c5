"""Sources that can only be read front to back, or a group of rows at a time.

    kind             a slice is             read by
    compressed       the whole file         pyarrow's gzip and zstd
    parquet          a row group            pyarrow
    hub data set     one of its shards      `datasets`, streaming

`hf:NAME[:SUBSET][:SPLIT]` names a data set as `datasets.load_dataset` does: on the hub, or a local
folder. Without SUBSET its default one is read, without SPLIT "train"; `hf:NAME::SPLIT` leaves out
the subset alone.
"""

import copy
import io
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from textwrap import shorten
from typing import Any, NamedTuple

import xxhash

from data.errors import DataError, Resumable

HUB = "hf:"
HUB_SHARD_BYTES = 400_000_000  # of one that is not a file; about a unit
_ROWS = 1024  # a batch


def shown(value: Any) -> str:
    """A value of a row as `where` compares it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


def open_compressed(path: Path, codec: str) -> io.BufferedReader:
    """The content of a compressed file, of one or several streams; reading raises OSError where it
    is damaged or cut short."""
    import pyarrow as pa

    return io.BufferedReader(pa.CompressedInputStream(pa.OSFile(str(path)), codec))


def row_groups(path: Path) -> list[tuple[int, int]]:
    """(byte at which it starts, rows) of each row group of a parquet file that holds any."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
    except pa.ArrowInvalid as error:
        raise DataError(f"{path}: not a parquet file: {_first_line(error)}") from None
    groups = []
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = [group.column(i) for i in range(group.num_columns)]
        start = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        groups.append((start, group.num_rows))
    return groups


def parquet_rows(path: Path, group: int, columns: list[str]) -> Iterator[list[Any]]:
    """The columns' values in each row of a row group; text comes as bytes, which may be broken."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require(columns, file.schema_arrow.names, str(path))
            batches = file.iter_batches(_ROWS, row_groups=[group], columns=columns)
            yield from _rows(map(pa.Table.from_batches, ([batch] for batch in batches)), columns)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot read row group {group}: {_first_line(error)}") from None


def hub_shards(source: str) -> list[tuple[int, str]]:
    """Each shard of a hub data set: its bytes (HUB_SHARD_BYTES if it is no file whose size is
    known), and a hash of its content and of how it is read: a commit that leaves both alone makes
    no other input."""
    builder, dataset, split, files = _hub(source)
    defaults = vars(type(builder.config))
    said = {key: v for key, v in vars(builder.config).items() if v != defaults.get(key)}
    found = said.pop("data_files", {}).get(split)
    origin = [*found, *found.origin_metadata] if found else [builder.hash, split]
    return [
        (file.bytes or HUB_SHARD_BYTES, _hash(builder.name, said, file.blob or [*origin, number]))
        for number, file in enumerate(files or [_File()] * dataset.num_shards)
    ]


def hub_rows(source: str, shard: int, columns: list[str]) -> Iterator[list[Any]]:
    """As `parquet_rows`, of a shard of a hub data set; raises Resumable if it cannot be had."""
    dataset = _narrow(source, tuple(columns))
    tables = _received(source, dataset.shard(num_shards=dataset.num_shards, index=shard), shard)
    first = next(tables, None)
    if first is not None:
        _require(columns, first.column_names, source)
        yield from _rows(chain([first], tables), columns)


def _received(source: str, dataset: Any, shard: int) -> Iterator[Any]:
    """The tables of a shard."""
    try:
        yield from dataset.with_format("arrow").iter(batch_size=_ROWS)
    except Exception as error:  # Arrow's, zlib's, httpx's, of whoever is between here and the hub
        builder, _, _, files = _hub(source)
        name = files[shard].url.removeprefix(f"{builder.base_path}/") if files else f"#{shard}"
        advice = "run the same prepare again to go on; finished units are kept"
        if isinstance(error, (ValueError, EOFError)):  # what came cannot be parsed
            advice = "download the files and prepare those: there, a broken line is set aside"
        raise Resumable(f"{source}: {name}: {_reason(error)}; {advice}") from None


class _File(NamedTuple):
    """A shard that is a file; blob: the hash of its content, if the hub told."""

    url: str = ""
    bytes: int | None = None
    blob: str | None = None


@lru_cache(maxsize=8)
def _hub(source: str) -> tuple[Any, Any, str, list[_File]]:
    """The builder of a data set, the data set, both of one revision as long as this process lives,
    its split and its files; none if a file is not a shard."""
    import datasets

    name, subset, split = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    if not name or source.count(":") > 3:
        raise DataError(f"{source}: a hub data set is hf:NAME[:SUBSET][:SPLIT]")
    split = split or "train"
    try:
        builder = datasets.load_dataset_builder(name, subset or None)
        dataset = builder.as_streaming_dataset(split=split)
        files = list(map(_file, (builder.config.data_files or {}).get(split, [])))
    except Exception as error:  # as in `_received`, and yaml's
        raise DataError(f"{source}: {_reason(error)}") from None
    return builder, dataset, split, files if len(files) == dataset.num_shards else []


def _file(url: str) -> _File:
    """A data file as the listing that `datasets` has fetched describes it."""
    from fsspec.core import url_to_fs

    files, path = url_to_fs(url)
    info = files.info(path)
    return _File(url, info.get("size"), info.get("blob_id"))


@lru_cache(maxsize=8)
def _narrow(source: str, columns: tuple[str, ...]) -> Any:
    """The data set; if it is parquet, only of these columns, which alone are then fetched."""
    builder, dataset, split, _ = _hub(source)
    if builder.name != "parquet" or builder.config.columns is not None:
        return dataset
    _require(list(columns), list(builder.info.features), source)
    narrow = copy.copy(builder)
    narrow.config = replace(builder.config, columns=list(columns))
    narrow.info = builder.info.copy()
    return narrow.as_streaming_dataset(split=split)


def _hash(*values: Any) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(values, default=str).encode())


def _reason(error: Exception) -> str:
    """What is wrong in one line, and what to do if it is a name or a right to read."""
    from datasets.exceptions import DatasetNotFoundError

    text = re.split(r"\n(?:For more|Example of)", str(error))[0]
    text = shorten(text, 300, placeholder=" …").rstrip(".") or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, DatasetNotFoundError) or status in (401, 403):
        text += "; check the name, and set HF_TOKEN to a token that may read it if it is private"
    return text


def _rows(tables: Iterable[Any], columns: list[str]) -> Iterator[list[Any]]:
    import pyarrow as pa

    for table in tables:
        values = []
        for name in columns:
            column = table.column(name)
            if pa.types.is_dictionary(column.type):
                column = column.cast(column.type.value_type)
            if column.type in (pa.string(), pa.large_string(), pa.string_view()):
                column = column.cast(pa.large_binary())  # else broken text fails a whole batch
            values.append(column.to_pylist())
        yield from map(list, zip(*values, strict=True))


def _require(columns: list[str], found: list[str], source: str) -> None:
    for name in columns:
        if name not in found:
            raise DataError(f"{source}: no column {name!r}; columns there: {', '.join(found)}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
