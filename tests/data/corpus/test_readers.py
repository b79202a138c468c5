import bz2
import datetime
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_gpt.data import prepare, verify
from sparse_gpt.data.corpus.blocks import Reading, blocks
from sparse_gpt.data.corpus.documents import Document, read
from sparse_gpt.data.corpus.readers import open_content
from sparse_gpt.data.corpus.rejects import Reject
from sparse_gpt.data.corpus.slices import cut
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.data.shards.manifest import SPLITS, Manifest
from sparse_gpt.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"text": f"document {n} é😀\r\n" * (n % 7), "lang": "en" if n % 3 else "de", "good": n % 2 == 0}
    for n in range(4_000)
]


def lines(rows: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zstd(content: bytes) -> bytes:
    shape = zstandard.ZstdCompressionParameters(write_checksum=True)
    return zstandard.ZstdCompressor(compression_params=shape).compress(content)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows in every form, compressed ones in two streams, parquet in row groups."""
    folder = tmp_path_factory.mktemp("corpora")
    half, whole = len(ROWS) // 2, lines(ROWS)
    (folder / "a.jsonl").write_bytes(whole)
    for suffix, compress in ((".gz", gzip.compress), (".zst", zstd)):
        path = folder / f"a.jsonl{suffix}"
        path.write_bytes(compress(lines(ROWS[:half])) + compress(lines(ROWS[half:])))
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "a.parquet", row_group_size=300)
    (folder / "hub").mkdir()
    for number, part in enumerate((ROWS[:1500], ROWS[1500:])):
        pq.write_table(pa.Table.from_pylist(part), folder / "hub" / f"train-{number}.parquet")
    return folder


def documents(source: str | Path, **reading: Any) -> list[Document | Reject]:
    reading = {"separator": None, "text_field": "text", **reading}
    return [
        document
        for file in find_files([source])
        for document in read(cut(file, reading["separator"])[0], Reading(**reading))
    ]


def shards(manifest: Manifest) -> list[Any]:
    return [(shard.bin, shard.idx) for split in SPLITS for shard in manifest.splits[split]]


@pytest.mark.parametrize("form", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet", "hf:hub"])
@pytest.mark.parametrize("options", [{}, {"where": {"lang": "en", "good": "true"}}])
def test_every_form_gives_the_same_shards(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, options: dict
) -> None:
    monkeypatch.chdir(corpora)
    for reads in ("preparation.tokenizing", "corpus.blocks"):  # blocks and pieces of a stream
        monkeypatch.setattr(sys.modules[f"sparse_gpt.data.{reads}"], "SLICE_BYTES", 10_000)
    options = {"held_out": 0.1, "min_chars": 40, **options}
    expected = prepare(["a.jsonl"], tmp_path / "plain", **options)
    wanted = [r for r in ROWS if len(r["text"]) >= 40]
    if "where" in options:
        wanted = [r for r in wanted if r["lang"] == "en" and r["good"]]
    assert sum(expected.documents(split) for split in SPLITS) == len(wanted)
    assert shards(prepare([form], tmp_path / "out", **options)) == shards(expected)
    assert verify(tmp_path / "out") == []


@pytest.mark.slow
def test_row_groups_and_hub_shards_are_slices(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpora)
    (file,) = find_files(["a.parquet"])
    slices, row = cut(file, None)
    assert [part.line for part in slices] == list(range(1, 4000, 300))
    assert sum(part.end - part.start for part in slices) == row["bytes"] == file.path.stat().st_size
    found = list(read(slices[-1:], Reading(None, "text")))
    assert found[0] == Document("a.parquet", 3901, ROWS[3900]["text"])
    (file,) = find_files(["hf:hub"])
    slices, row = cut(file, None)
    assert (len(slices), row["shards"]) == (2, 2)
    assert cut(file, None)[1] == row
    prepare(["hf:hub"], tmp_path / "1", held_out=0.1, shard_tokens=1000)
    prepare(["hf:hub"], tmp_path / "2", held_out=0.1, shard_tokens=1000, workers=2)
    for path in (tmp_path / "1").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / path.name).read_bytes()


LINES = st.lists(st.sampled_from([b'{"text": "a"}', b'{"text": "long, long"}', b"{", b"", b"\xff"]))


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, st.sampled_from([b"\n", b"\r\n", b"\n\n"]), st.booleans(), st.integers(1, 60))
def test_blocks_of_lines_are_the_lines(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    lines: list[bytes],
    end: bytes,
    ended: bool,
    size: int,
) -> None:
    """However short the blocks, with their numbers, the good ones and the broken; and all of the
    file is accounted for."""
    monkeypatch.setattr(sys.modules["sparse_gpt.data.corpus.blocks"], "SLICE_BYTES", size)
    content = end.join(lines) + end * ended
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(content))
    plain, packed = (
        [d[1:] if isinstance(d, Document) else (d.line, d.reason) for d in found]
        for found in map(documents, (tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"))
    )
    assert packed == plain
    (file,) = find_files([tmp_path / "b.jsonl.gz"])
    (part,) = cut(file, None).slices
    assert sum(block.bytes for block in blocks(part, Reading(None, "text"))) == part.end


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    codec=st.sampled_from([".gz", ".zst", ".bz2", ".xz"]),
    streams=st.lists(st.binary(max_size=400), min_size=1, max_size=4),
    cut_at=st.integers(0, 2000),
    flip=st.integers(0, 2000),
)
def test_streams_are_read_whole_or_refused(
    tmp_path: Path, codec: str, streams: list[bytes], cut_at: int, flip: int
) -> None:
    """Cut short it is refused, but between streams; with a bit flipped it is never another text."""
    pack = {".gz": gzip.compress, ".zst": zstd, ".bz2": bz2.compress, ".xz": lzma.compress}[codec]
    texts = [b"".join(b"%02x" % byte for byte in stream) for stream in streams]
    packed, (name, _) = [pack(text) for text in texts], CODECS_OF[codec]
    path = tmp_path / f"a.txt{codec}"

    def content(of: bytes) -> bytes:
        path.write_bytes(of)
        with open_content(path, name) as (stream, _):
            return stream.read()

    whole = b"".join(packed)
    assert content(whole) == b"".join(texts)
    assert content(whole + CODECS_OF[codec][1]) == b"".join(texts)
    cut_at %= len(whole) + 1
    ends = [sum(map(len, packed[:n])) for n in range(len(packed) + 1)]
    if cut_at in ends:
        assert content(whole[:cut_at]) == b"".join(texts[: ends.index(cut_at)])
    else:
        with pytest.raises(OSError, match=r"\w"):
            content(whole[:cut_at])
    flipped = bytearray(whole)
    flipped[flip // 8 % len(whole)] ^= 1 << flip % 8
    try:
        found = content(bytes(flipped))
    except OSError:
        return
    assert found == b"".join(texts)


# Its name, and what its own tools take behind a stream: zeros of a tape; a frame to be skipped.
CODECS_OF = {
    ".gz": ("gzip", b"\0" * 1000),
    ".zst": ("zstd", b"\x50\x2a\x4d\x18\x04\x00\x00\x00skip"),
    ".bz2": ("bzip2", b""),
    ".xz": ("xz", b"\0" * 40_000),
}


def test_a_long_window_is_read(tmp_path: Path) -> None:
    """As of `zstd --long=31`, which pyarrow's limit of 2^27 bytes refuses."""
    shape = zstandard.ZstdCompressionParameters(
        window_log=30, hash_log=10, chain_log=10, strategy=1, write_content_size=False
    )
    packing = zstandard.ZstdCompressor(compression_params=shape).compressobj()
    text = b"a long window\n" * 10
    (tmp_path / "a.txt.zst").write_bytes(packing.compress(text) + packing.flush())
    assert zstandard.get_frame_parameters((tmp_path / "a.txt.zst").read_bytes()).window_size > 1e9
    [found] = documents(tmp_path / "a.txt.zst")
    assert isinstance(found, Document)
    assert found.text == text.decode()


def test_compressed_text_is_split_as_plain_text_is(tmp_path: Path) -> None:
    text = "one\n#two\n#three\r\n"
    (tmp_path / "a.txt").write_text(text, newline="")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(text.encode()))
    plain, packed = documents(tmp_path / "a.txt", separator="#"), tmp_path / "b.txt.gz"
    assert [d.text for d in documents(packed, separator="#")] == [d.text for d in plain]
    assert [d.line for d in documents(packed, separator="#")] == [1, 2, 3]
    (whole,) = documents(packed)
    assert whole.text == text


def test_a_folder_is_searched_for_all_of_them(corpora: Path) -> None:
    assert [f"{file.name} {file.kind} {file.codec}" for file in find_files([corpora])] == [
        "a.jsonl jsonl None",
        "a.jsonl.gz jsonl gzip",
        "a.jsonl.zst jsonl zstd",
        "a.parquet parquet None",
        "hub/train-0.parquet parquet None",
        "hub/train-1.parquet parquet None",
    ]


def test_broken_rows_are_rejected_alone(tmp_path: Path) -> None:
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(
        gzip.compress(b'\xef\xbb\xbf{"text": "a"}\n{\n{"text": "\xff"}\n{"text": "b"}')
    )
    good, *broken, last = documents(packed)
    assert (good, last) == (Document("a.jsonl.gz", 1, "a"), Document("a.jsonl.gz", 4, "b"))
    assert [reject.line for reject in broken] == [2, 3]

    raw = pa.array([b"a", b"\xff", None, b"b"])
    text = pa.Array.from_buffers(pa.string(), 4, raw.buffers())
    pq.write_table(
        pa.table({"text": text.dictionary_encode(), "plain": text}), tmp_path / "a.parquet"
    )
    for column in ("text", "plain"):
        good, bad, null, last = documents(tmp_path / "a.parquet", text_field=column)
        assert (good, last) == (Document("a.parquet", 1, "a"), Document("a.parquet", 4, "b"))
        assert bad == Reject("a.parquet", 2, "not UTF-8 text (byte 0 of the document is 0xff)")
        assert null == Reject("a.parquet", 3, f"{column!r} is NoneType, must be a string")


def test_where_compares_what_json_has_not_as_it_is_written(tmp_path: Path) -> None:
    day = datetime.date(2026, 11, 27)
    table = {"text": ["a", "b"], "day": [day, day + datetime.timedelta(1)], "of": [[day], [day]]}
    pq.write_table(pa.table(table), tmp_path / "a.parquet")
    for condition, texts in (
        ((("day", "2026-11-27"),), ["a"]),
        ((("of", '["2026-11-27"]'),), ["a", "b"]),
    ):
        found = documents(tmp_path / "a.parquet", where=condition)
        assert [d.text for d in found if isinstance(d, Document)] == texts


def parquet(names: list[str]) -> bytes:
    sink = pa.BufferOutputStream()
    columns = [pa.array(["a"]) for _ in names]
    pq.write_table(pa.Table.from_arrays(columns, names=names), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.parquet", parquet(["text", "lang", "text"]), "has 2 columns 'text'; rename one"),
        ("a.parquet", parquet(["body"]), "no column 'text'; columns there: body"),
        (
            "a.jsonl.gz",
            gzip.compress(lines(ROWS))[:-100],
            r"a\.jsonl\.gz: damaged or not gzip: Compressed file ended",
        ),
        ("a.jsonl.zst", b"no zstd", r"a\.jsonl\.zst: damaged or not zstd"),
        ("a.parquet", b"no parquet" * 9, r"a\.parquet: not a parquet file"),
        ("a.parquet.gz", b"", "parquet has its own compression"),
        ("a.txt", b"text", r"a\.txt: where chooses among rows, but this file is plain text"),
    ],
)
def test_bad_files_are_one_line_and_leave_nothing(
    tmp_path: Path, name: str, content: bytes, says: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=says) as error:
        prepare([tmp_path / name], tmp_path / "out", where={"lang": "en"})
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_columns_that_are_not_there(
    corpora: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(corpora)
    for source in ("a.parquet", "hf:hub"):
        with pytest.raises(DataError, match="no column 'body'; columns there: text, lang, good"):
            prepare([source], tmp_path / "out", text_field="body")
    with pytest.raises(DataError, match=r"hf: a hub data set is hf:NAME|hf:: a hub"):
        prepare(["hf:"], tmp_path / "out")
    with pytest.raises(DataError, match="hf:hub::test: Bad split: test"):
        prepare(["hf:hub::test"], tmp_path / "out")


def test_a_hub_that_cannot_be_reached(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sparse_gpt",
        "prepare",
        "hf:some/thing",
        "--out",
        str(tmp_path),
    ]
    done = subprocess.run(
        command, env={**os.environ, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: hf:some/thing: ")
    assert done.stderr.count("\n") == 1
