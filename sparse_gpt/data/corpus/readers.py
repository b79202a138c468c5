"""Files that can only be read front to back, or a group of rows at a time: of compressed ones a
slice is the whole file, of parquet a row group."""

import bz2
import gzip
import io
import json
import lzma
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
    written where JSON has no such thing: a date is 2026-11-27. What is missing is null."""
    if value is ...:
        value = None
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
        raw: Any = gzip.GzipFile(fileobj=file) if codec == "gzip" else _Streams(file, codec)
        try:
            yield io.BufferedReader(raw), file.tell
        except (EOFError, zlib.error, lzma.LZMAError, zstandard.ZstdError) as error:
            raise OSError(str(error)) from None


_ENGINES: dict[str, Callable[[], Any]] = {  # of one stream
    "zstd": lambda: zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj(),
    "bzip2": bz2.BZ2Decompressor,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ),
}


class _Streams(io.RawIOBase):
    """The content of streams one after another, and zeros behind them. zstandard's own reader takes
    a frame that is cut short for its end, those of bz2 and lzma a damaged stream for what is to be
    ignored, and pyarrow's refuses long windows."""

    def __init__(self, file: BinaryIO, codec: str) -> None:
        self._pieces = self._content(file, _ENGINES[codec])
        self._rest = memoryview(b"")

    def _content(self, file: BinaryIO, engine: Callable[[], Any]) -> Iterator[bytes]:
        packed = b""
        while packed := packed or file.read(_READ):
            packed = packed.lstrip(b"\0")
            if not packed:
                continue
            stream = engine()
            while not stream.eof:
                if not packed:
                    raise EOFError("the file ends within a stream")
                yield stream.decompress(packed)
                packed = stream.unused_data if stream.eof else file.read(_READ)

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
        table = table.set_column(number, name, as_bytes(table.column(number)))
    table.validate(full=True)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def as_bytes(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """A column with its text, in lists and structs too, as bytes, which may be broken: else broken
    text fails a whole batch."""
    kind = _bytes_type(column.type)
    return column if column.type == kind else column.cast(kind)


def _bytes_type(kind: "pa.DataType") -> "pa.DataType":
    import pyarrow as pa

    if pa.types.is_dictionary(kind):
        return _bytes_type(kind.value_type)
    if kind in (pa.string(), pa.large_string(), pa.string_view()):
        return pa.large_binary()
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        make = pa.list_ if pa.types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_bytes_type(kind.value_type)))
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_bytes_type(field.type)) for field in kind])
    return kind


def decoded(value: Any, errors: str = "strict") -> Any:
    """A value of a table's row with its bytes as text; raises UnicodeDecodeError unless `errors`
    are replaced."""
    if isinstance(value, bytes):
        return value.decode(errors=errors)
    if isinstance(value, list):
        return [decoded(one, errors) for one in value]
    if isinstance(value, dict):
        return {key: decoded(one, errors) for key, one in value.items()}
    return value


def rows_of(content: bytes, columns: list[str], source: str) -> Iterator[list[Any]]:
    """The columns' values in each row of a packed table, or of b"", which has none; text comes as
    bytes. Raises DataError, naming the source, if a struct has no such field."""
    if not content:
        return
    import pyarrow as pa

    table = pa.ipc.open_stream(content).read_all()
    values = [as_bytes(_nested(table, name, source)).to_pylist() for name in columns]
    yield from map(list, zip(*values, strict=True))


def value_at(row: Any, field: str) -> Any:
    """The value of a field of a row, by its own name, or, of a dotted one, in objects within; `...`
    where there is none."""
    if field in row:
        return row[field]
    for key in field.split("."):
        if not isinstance(row, dict) or key not in row:
            return ...
        row = row[key]
    return row


def top_columns(columns: list[str], found: list[str]) -> list[str]:
    """The columns of a table in which these are found: those of their names, or the structs that a
    dotted name reaches into."""
    tops = (name if name in found else name.partition(".")[0] for name in columns)
    return list(dict.fromkeys(tops))


def _nested(table: "pa.Table", name: str, source: str) -> "pa.ChunkedArray":
    import pyarrow as pa
    import pyarrow.compute as pc

    if name in table.column_names:
        return table.column(name)
    require_columns([name], table.column_names, source)
    top, *keys = name.split(".")
    column = table.column(top)
    for key in keys:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(key) < 0:
            raise DataError(f"{source}: no column {name!r}; {top!r} there is {column.type}")
        column = pc.struct_field(column, key)
    return column


def require_columns(columns: list[str], found: list[str], source: str) -> None:
    """Raise DataError if a column is not found, naming those that are."""
    for name, top in ((name, *top_columns([name], found)) for name in columns):
        if top not in found:
            raise DataError(f"{source}: no column {name!r}; columns there: {', '.join(found)}")
        if found.count(top) > 1:
            raise DataError(f"{source}: has {found.count(top)} columns {top!r}; rename one")


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
