"""Sources that can only be read front to back, or a group of rows at a time.

    kind             a slice is             read by
    compressed       the whole file         pyarrow's gzip and zstd
    parquet          a row group            pyarrow
    hub data set     one of its shards      `datasets`, streaming

`hf:NAME[:SUBSET][:SPLIT]` names a data set as `datasets.load_dataset` does: on the hub, or a local
folder. Without SUBSET its default one is read, without SPLIT "train"; `hf:NAME::SPLIT` leaves out
the subset alone.
"""

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import xxhash

from data.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

HUB = "hf:"
HUB_SHARD_BYTES = 400_000_000  # how much is in one is not known before it is read; about a unit
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


def hub_shards(source: str) -> tuple[int, str]:
    """How many shards a hub data set has, and a hash of which files at which revision it is."""
    return _hub(source)[1:]


def hub_tables(source: str, shard: int, columns: list[str]) -> "Iterator[pa.Table]":
    """As `parquet_tables`, of a shard of a hub data set."""
    dataset, shards, _ = _hub(source)
    part = dataset.shard(num_shards=shards, index=shard)
    try:
        for table in part.with_format("arrow").iter(batch_size=_ROWS):
            _require(columns, table.column_names, source)
            yield table.select(columns)
    except OSError as error:  # what fails between here and the hub
        raise DataError(f"{source}: {_first_line(error)}; run again to go on") from None


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
def _hub(source: str) -> tuple[Any, int, str]:
    import datasets

    name, subset, split = (*source.removeprefix(HUB).split(":"), "", "")[:3]
    if not name or source.count(":") > 3:
        raise DataError(f"{source}: a hub data set is hf:NAME[:SUBSET][:SPLIT]")
    split = split or "train"
    try:
        builder = datasets.load_dataset_builder(name, subset or None)
        dataset = builder.as_streaming_dataset(split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(f"{source}: {_first_line(error)}") from None
    files = (builder.config.data_files or {}).get(split)
    which = [builder.hash] if files is None else [list(map(str, files)), files.origin_metadata]
    identity = xxhash.xxh3_128_hexdigest(json.dumps(which).encode())
    return dataset, dataset.num_shards, identity


def _require(columns: list[str], found: list[str], source: str) -> None:
    for name in columns:
        if name not in found:
            raise DataError(f"{source}: no column {name!r}; columns there: {', '.join(found)}")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
