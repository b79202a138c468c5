"""Files that can only be read front to back, or a group of rows at a time: of compressed ones a
slice is the whole file, of parquet a row group."""

import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import zstandard

from sparse_gpt.data.corpus.isolated import isolated
from sparse_gpt.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

ROWS = 1024  # a table
_WINDOW = 1 << 31  # bytes; the longest of `zstd --long=31`
_READ = 1 << 14  # bytes of a file; what they hold at most, of zeros, is some 500 MB


def shown(value: Any) -> str:
    """A value of a row as `where` compares it: text as it is, anything else as JSON, or as it is
    written where JSON has no such thing: a date is 2026-11-27."""
    if value is None or isinstance(value, bool | int | float | list | dict):
        return json.dumps(value, default=str)
    return str(value)


@contextmanager
def open_content(
    path: Path, codec: str | None
) -> Iterator[tuple[io.BufferedReader, Callable[[], int]]]:
    """The content of a file, if it is compressed of one or several streams, and a function that
    tells how many bytes of the file are read; reading raises OSError where it is damaged or cut
    short."""
    with open(path, "rb") as file:
        if codec is None:
            yield file, file.tell
            return
        raw: Any = gzip.GzipFile(fileobj=file) if codec == "gzip" else _Zstd(file)
        try:
            yield io.BufferedReader(raw), file.tell
        except (EOFError, zlib.error, zstandard.ZstdError) as error:
            raise OSError(str(error)) from None


class _Zstd(io.RawIOBase):
    """The content of frames of zstd one after another. zstandard's own reader takes a frame that is
    cut short for its end, and pyarrow's refuses long windows."""

    def __init__(self, file: BinaryIO) -> None:
        self._pieces = self._content(file)
        self._rest = memoryview(b"")

    def _content(self, file: BinaryIO) -> Iterator[bytes]:
        engine = zstandard.ZstdDecompressor(max_window_size=_WINDOW)
        packed = file.read(_READ)
        while packed:
            frame = engine.decompressobj()
            while not frame.eof:
                if not packed:
                    raise EOFError("the file ends within a frame")
                yield frame.decompress(packed)
                packed = frame.unused_data if frame.eof else file.read(_READ)
            packed = packed or file.read(_READ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece)
        size = min(len(buffer), len(self._rest))
        buffer[:size] = self._rest[:size]
        self._rest = self._rest[size:]
        return size


def line_blocks(content: io.BufferedReader, size: int) -> Iterator[bytes]:
    """The content in blocks that end where a line ends, of about `size` bytes or one line."""
    while block := content.read(size):
        yield block + content.readline()


def row_groups(path: Path) -> list[tuple[int, int]]:
    """(byte at which it starts, rows) of each row group of a parquet file that holds any. Raises
    OSError where it cannot be read now."""
    return [group for group, _ in isolated(str(path), _row_groups, path)]


def _row_groups(path: Path) -> Iterator[tuple[tuple[int, int], bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        metadata = pq.read_metadata(path)
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            if not columns:
                raise DataError(f"{path}: has no columns")
            start = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
            yield (start, group.num_rows), b""
    except (pa.ArrowException, OSError, ValueError) as error:
        if isinstance(error, DataError) or getattr(error, "errno", None):
            raise
        raise DataError(f"{path}: not a parquet file: {_first_line(error)}") from None


def parquet_rows(path: Path, group: int, columns: list[str]) -> Iterator[tuple[int, bytes]]:
    """How many rows, and the columns of them, `packed`: a row group, some rows at a time."""
    return isolated(f"{path}, row group {group}", _parquet_rows, path, group, columns)


def _parquet_rows(path: Path, group: int, columns: list[str]) -> Iterator[tuple[int, bytes]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            require_columns(columns, file.schema_arrow.names, str(path))
            for batch in file.iter_batches(ROWS, row_groups=[group], columns=columns):
                yield batch.num_rows, packed(pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: cannot read row group {group}: {_first_line(error)}") from None


def packed(table: "pa.Table") -> bytes:
    """A table for `rows_of`, in Arrow's format: other than its pickle it holds these rows alone.
    Text is bytes, which may be broken. Raises ArrowException for what is no table."""
    import pyarrow as pa

    for number, name in enumerate(table.column_names):
        column = table.column(number)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.type in (pa.string(), pa.large_string(), pa.string_view()):
            column = column.cast(pa.large_binary())  # else broken text fails a whole batch
        table = table.set_column(number, name, column)
    table.validate(full=True)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def rows_of(content: bytes, columns: list[str]) -> Iterator[list[Any]]:
    """The columns' values in each row of a packed table, or of b"", which has none."""
    if not content:
        return
    import pyarrow as pa

    table = pa.ipc.open_stream(content).read_all()
    yield from map(list, zip(*(table.column(name).to_pylist() for name in columns), strict=True))


def require_columns(columns: list[str], found: list[str], source: str) -> None:
    """Raise DataError if a column is not found, naming those that are."""
    for name in columns:
        if name not in found:
            raise DataError(f"{source}: no column {name!r}; columns there: {', '.join(found)}")
        if found.count(name) > 1:
            raise DataError(f"{source}: has {found.count(name)} columns {name!r}; rename one")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
