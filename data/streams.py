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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, Any, NamedTuple

import xxhash

from data.errors import DataError, Resumable

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "hf:"
HUB_SHARD_BYTES = 400_000_000  # of one that is not a file; about a unit
_ROWS = 1024  # a batch


def shown(value: Any) -> str:
    """A value of a row as `where` compares it: text as it is, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


@contextmanager
def open_compressed(
    path: Path, codec: str
) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """The content of a compressed file, of one or several streams, and a function that tells how
    many bytes of the file are read; reading raises OSError where it is damaged or cut short."""
    import pyarrow as pa

    with pa.OSFile(str(path)) as file, pa.CompressedInputStream(file, codec) as content:
        yield io.BufferedReader(content), file.tell


def line_blocks(content: io.BufferedReader, size: int) -> Iterator[bytes]:
    """The content in blocks that end where a line ends, of about `size` bytes or one line."""
    while block := content.read(size):
        yield block + content.readline()


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


def parquet_tables(path: Path, group: int, columns: list[str]) -> "Iterator[pa.Table]":
    """The columns of a row group, some rows at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            _require(columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                yield pa.Table.from_batches([batch])
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot read row group {group}: {_first_line(error)}") from None


class HubShard(NamedTuple):
    """One of a hub data set: its file, if it is one; its bytes (HUB_SHARD_BYTES if they are not
    known); and a hash of its content and of how it is read, so that a commit which leaves both
    alone makes no other input."""

    file: str
    bytes: int
    hash: str


def hub_shards(source: str) -> list[HubShard]:
    """The shards of a hub data set; raises DataError if it cannot be opened."""
    return _hub(source)[-1]


def hub_tables(source: str, hash: str, columns: list[str]) -> "Iterator[pa.Table]":
    """As `parquet_tables`, of the shard of a hub data set with this hash; raises Resumable if it
    cannot be had."""
    shards = hub_shards(source)  # of a worker's own: there may be a new commit since the cutting
    number = next((n for n, shard in enumerate(shards) if shard.hash == hash), None)
    if number is None:
        raise Resumable(f"{source}: changed while it was being read; run again")
    try:
        dataset = _narrow(source, tuple(columns))
        part = dataset.shard(num_shards=len(shards), index=number)
        for table in part.with_format("arrow").iter(batch_size=_ROWS):
            _require(columns, table.column_names, source)
            yield table.select(columns)
    except DataError:
        raise
    except Exception as error:  # Arrow's, zlib's, httpx's, of whoever is between here and the hub
        advice = "run again to go on from what is finished"
        if isinstance(error, (ValueError, EOFError)):  # what came cannot be parsed
            advice = "download the files and prepare those: there, a broken line is set aside"
        name = shards[number].file or f"shard {number}"
        raise Resumable(f"{source}: {name}: {_reason(error)}; {advice}") from None


def packed(table: "pa.Table") -> bytes:
    """A table for `rows_of`, in Arrow's format: other than its pickle it holds these rows alone."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def rows_of(content: bytes, columns: list[str]) -> Iterator[list[Any]]:
    """The columns' values in each row of a packed table, or of b"", which has none; text comes as
    bytes, which may be broken."""
    if not content:
        return
    import pyarrow as pa

    table = pa.ipc.open_stream(content).read_all()
    values = []
    for name in columns:
        column = table.column(name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.type in (pa.string(), pa.large_string(), pa.string_view()):
            column = column.cast(pa.large_binary())  # else broken text fails a whole batch
        values.append(column.to_pylist())
    yield from map(list, zip(*values, strict=True))


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
    except Exception as error:  # as in `hub_tables`, and yaml's
        raise Resumable(f"{source}: {_reason(error)}") from None
    origin = [*files, *files.origin_metadata] if files else [builder.hash, split]
    if len(files) != dataset.num_shards:  # archives, or several splits
        files, infos = [""] * dataset.num_shards, [{}] * dataset.num_shards
    shards = []
    for number, (file, info) in enumerate(zip(files, infos, strict=True)):
        what = [builder.name, said, info.get("blob_id") or [*origin, number]]
        hash = xxhash.xxh3_128_hexdigest(json.dumps(what, default=str).encode())
        place = file.removeprefix(f"{builder.base_path}/")
        shards.append(HubShard(place, info.get("size") or HUB_SHARD_BYTES, hash))
    return builder, dataset, split, shards


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


def _reason(error: Exception) -> str:
    """What is wrong in one line, and what to do if it is a name or a right to read."""
    from datasets.exceptions import DatasetNotFoundError

    text = re.split(r"\n(?:For more|Example of)", str(error))[0]
    text = shorten(text, 300, placeholder=" …").rstrip(".") or type(error).__name__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, DatasetNotFoundError) or status in (401, 403):
        text += "; check the name, and set HF_TOKEN to a token that may read it if it is private"
    return text


def _require(columns: list[str], found: list[str], source: str) -> None:
    for name in columns:
        if name not in found:
            raise DataError(f"{source}: no column {name!r}; columns there: {', '.join(found)}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
