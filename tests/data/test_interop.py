"""Other tools' files, written and read: against their formats, and with Megatron itself."""

import base64
import itertools
import os
import resource
import signal
import struct
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data import (
    Batches,
    DataError,
    export_shards,
    import_shards,
    interop,
    load_tokenizer,
    open_shards,
    verify,
)
from data.manifest import SPLITS, read_manifest
from data.shards import INDEX, MAX_TOKENS

FORMATS = ("megatron", "llmc", "nanogpt")
E = 50256
MakeShards = Callable[..., Path]


def documents(folder: Path) -> dict[str, list[list[int]]]:
    """Every document's ids by split, as the index has them."""
    manifest = read_manifest(folder)
    found: dict[str, list[list[int]]] = {}
    for split in SPLITS:
        found[split] = []
        for shard in manifest.splits[split]:
            tokens = np.fromfile(folder / f"{shard.name}.bin", manifest.dtype, offset=1024)
            starts = np.fromfile(folder / f"{shard.name}.idx", INDEX)["start"]
            found[split] += [part.tolist() for part in np.split(tokens, starts[1:])]
    return found


def hashes(folder: Path) -> list[int]:
    shards = read_manifest(folder).splits.values()
    indexes = [np.fromfile(folder / f"{s.name}.idx", INDEX) for split in shards for s in split]
    return [h for index in indexes for h in index["hash"].tolist()]


def back(exported: Path, format: str, out: Path, **options: object) -> None:
    """Import what `export_shards` wrote."""
    names = sorted(path for path in exported.iterdir() if path.suffix == ".bin")
    sources = [path for path in names if "train" in path.name]
    held_out = [path for path in names if "val" in path.name]
    import_shards(sources, format, out, held_out=held_out, **options)


def write_vocabulary(path: Path, size: int) -> Path:
    """A rank file of `size` ids, end of text (the last) included."""
    tokens = itertools.chain(
        (bytes([i]) for i in range(256)), (struct.pack(">H", i) for i in range(2**16))
    )
    lines = (
        f"{base64.b64encode(token).decode()} {rank}\n"
        for rank, token in enumerate(itertools.islice(tokens, size - 1))
    )
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def vocabularies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """As many ids as uint16 holds, and some more."""
    folder = tmp_path_factory.mktemp("vocabularies")
    sizes = {"uint16": 2**16, "uint32": 2**16 + 200}
    return {dtype: write_vocabulary(folder / dtype, size) for dtype, size in sizes.items()}


@pytest.mark.parametrize("format", FORMATS)
def test_novels_come_back_as_they_were(novels: Path, tmp_path: Path, format: str) -> None:
    """Tokens, documents, splits and content hashes; and the same batches are trained on."""
    export_shards(novels, format, tmp_path / "theirs", shard_tokens=30_000)
    back(tmp_path / "theirs", format, tmp_path / "ours", shard_tokens=50_000)
    assert documents(tmp_path / "ours") == documents(novels)
    assert hashes(tmp_path / "ours") == hashes(novels)
    assert verify(tmp_path / "ours") == []
    manifest = read_manifest(tmp_path / "ours")
    assert len(manifest.splits["train"]) > 4
    assert all(shard.tokens <= 50_000 for shard in manifest.splits["train"])
    assert manifest.tokenizer["vocab_hash"] == load_tokenizer().vocab_hash
    assert manifest.tokenizer["engine"] == manifest.options["import"] == format
    assert [row["name"] for row in manifest.sources if row["name"].endswith(".bin")] == [
        path.name
        for word in ("train", "val")
        for path in sorted((tmp_path / "theirs").glob(f"*{word}*.bin"))
    ]
    batches = (
        next(iter(Batches(open_shards(folder).train, 64, 8, seed=3)))
        for folder in (novels, tmp_path / "ours")
    )
    assert np.array_equal(*(batch.windows.numpy() for batch in batches))


@settings(max_examples=40, deadline=None)
@given(st.data())
@pytest.mark.parametrize(
    ("format", "dtype"),
    [(f, d) for f in FORMATS for d in ("uint16", "uint32") if (f, d) != ("nanogpt", "uint32")],
)
def test_any_documents_come_back_as_they_were(
    vocabularies: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
    make_shards: MakeShards,
    format: str,
    dtype: str,
    data: st.DataObject,
) -> None:
    """Ids up to the largest, documents of end of text alone, many shards, an empty held-out split;
    and pieces so small that documents lie across their borders."""
    tokenizer = load_tokenizer(vocabularies[dtype])
    ids = st.integers(0, tokenizer.eot - 1) | st.integers(tokenizer.eot - 3, tokenizer.eot - 1)
    document = st.lists(ids, max_size=8).map(lambda content: np.array([tokenizer.eot, *content]))
    shards = st.lists(st.lists(document, min_size=1, max_size=4), max_size=4)
    train, held_out = data.draw(shards.filter(bool)), data.draw(shards)
    folder = tmp_path_factory.mktemp("any")
    piece, shard_tokens = data.draw(st.integers(1, 9)), data.draw(st.integers(1, 30))
    vocab, vocab_hash = vocabularies[dtype], tokenizer.vocab_hash
    # Waiting for the disk is most of the time, and shows in no file.
    with mock.patch.object(interop, "_PIECE", piece), mock.patch("os.fsync"):
        ours = make_shards(folder / "ours", train, held_out, dtype, vocab_hash, tokenizer.eot)
        export_shards(ours, format, folder / "theirs", shard_tokens=shard_tokens)
        back(folder / "theirs", format, folder / "back", vocab=vocab, shard_tokens=shard_tokens)
    assert documents(folder / "back") == documents(ours)
    assert read_manifest(folder / "back").dtype == dtype
    assert verify(folder / "back") == []


THREE = [np.array([E, 1, 2]), np.array([E]), np.array([E, 3, 4, 5])]
STREAM = [1, 2, E, E, 3, 4, 5, E]  # with end of text after each


def test_nanogpt_gets_end_of_text_after_each_document(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    ours = make_shards(tmp_path / "ours", [THREE[:1], THREE[1:]], [[np.array([E, 9])]])
    paths = export_shards(ours, "nanogpt", tmp_path / "theirs")
    assert [path.name for path in paths] == ["train.bin", "val.bin"]
    assert np.memmap(paths[0], np.uint16, "r").tolist() == STREAM
    assert np.memmap(paths[1], np.uint16, "r").tolist() == [9, E]


@pytest.mark.parametrize(
    ("dtype", "magic", "version"), [("uint16", 20240520, 1), ("uint32", 20240801, 7)]
)
def test_llmc_gets_files_of_equal_length(
    tmp_path: Path, make_shards: MakeShards, dtype: str, magic: int, version: int
) -> None:
    """As llm.c's reader demands them: 256 int32 and exactly as many tokens as they say."""
    stream = np.concatenate(THREE * 5)
    ours = make_shards(tmp_path / "ours", [THREE] * 5, [[np.array([E, 9])]], dtype)
    paths = export_shards(ours, "llmc", tmp_path / "fineweb", shard_tokens=11)
    assert [path.name for path in paths] == [
        *(f"fineweb_train_{number:06d}.bin" for number in range(1, 5)),
        "fineweb_val_000000.bin",
    ]
    found = []
    for path in paths[:-1]:
        head = np.fromfile(path, np.int32, 256)
        tokens = np.fromfile(path, dtype, offset=1024)
        assert head.tolist() == [magic, version, len(tokens)] + [0] * 253
        found.append(tokens)
    assert [len(tokens) for tokens in found] == [10] * 4
    assert np.array_equal(np.concatenate(found), stream)


@pytest.mark.parametrize(("dtype", "code"), [("uint16", 8), ("int32", 4)])
def test_megatron_gets_an_index_of_documents_that_end_with_end_of_text(
    tmp_path: Path, make_shards: MakeShards, dtype: str, code: int
) -> None:
    shards = [THREE[:1], THREE[1:]]
    ours = make_shards(tmp_path / "ours", shards, dtype=dtype if code == 8 else "uint32")
    paths = export_shards(ours, "megatron", tmp_path / "theirs")
    assert [path.name for path in paths] == ["train.bin", "train.idx"]
    assert np.fromfile(paths[0], dtype).tolist() == STREAM
    index = paths[1].read_bytes()
    assert index[:9] == b"MMIDIDX\0\0"
    assert struct.unpack("<QBQQ", index[9:34]) == (1, code, 3, 4)
    itemsize = np.dtype(dtype).itemsize
    assert struct.unpack("<3i3q4q", index[34:]) == (
        *(3, 1, 4),  # lengths
        *(0, 3 * itemsize, 4 * itemsize),
        *(0, 1, 2, 3),
    )


def test_megatrons_index_counts_bytes_beyond_4_gib(
    tmp_path: Path, make_sparse_shards: MakeShards
) -> None:
    folder = make_sparse_shards(tmp_path / "s", [MAX_TOKENS, MAX_TOKENS], [E, 1], "uint32")
    dataset = open_shards(folder)
    with open(tmp_path / "index", "wb") as file:
        interop._write_index(file, dataset, dataset.train, 4, 4)
    long = MAX_TOKENS - 2
    assert struct.unpack("<4i4q", (tmp_path / "index").read_bytes()[34 : 34 + 48]) == (
        *(long, 2, long, 2),
        *(0, 4 * long, 4 * MAX_TOKENS, 4 * (MAX_TOKENS + long)),
    )


@pytest.fixture(scope="module")
def indexed_dataset() -> object:
    """Megatron's own module."""
    reason = "megatron-core is not installed (pip install --no-deps megatron-core)"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that Transformer Engine and Apex are missing
        return pytest.importorskip("megatron.core.datasets.indexed_dataset", reason=reason)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_megatrons_own_reader_reads_our_export(
    indexed_dataset: Any, novels: Path, tmp_path: Path, make_shards: MakeShards, dtype: str
) -> None:
    ours = novels if dtype == "uint16" else make_shards(tmp_path / "o", [THREE], [THREE], dtype)
    export_shards(ours, "megatron", tmp_path / "theirs")
    for split, name in zip(SPLITS, ("train", "valid"), strict=True):
        theirs = indexed_dataset.IndexedDataset(str(tmp_path / "theirs" / name))
        expected = documents(ours)[split]
        assert len(theirs) == len(theirs.document_indices) - 1 == len(expected)
        for document, (end, *content) in zip(theirs, expected, strict=True):
            assert document.tolist() == [*content, end]
        assert theirs[0].dtype == ("uint16" if dtype == "uint16" else "int32")
        assert theirs.get(1, offset=0, length=1).tolist() == [(expected[1] * 2)[1]]


def test_what_megatrons_own_writer_wrote_is_imported(indexed_dataset: Any, tmp_path: Path) -> None:
    """Two documents of two sentences, the second without end of text."""
    prefix = str(tmp_path / "my_text_document")
    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    builder.add_document([1, 2, 3, E], [2, 2])
    builder.add_document([4, 5, 6], [1, 2])
    builder.finalize(f"{prefix}.idx")
    for source in (prefix, f"{prefix}.bin", f"{prefix}.idx", str(tmp_path / "my_*")):
        out = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
        import_shards([source], "megatron", out)
        assert documents(out) == {"train": [[E, 1, 2, 3], [E, 4, 5, 6]], "held_out": []}
        assert verify(out) == []


def write_megatron(
    prefix: Path, tokens: np.ndarray, lengths: list[int], bounds: list[int], code: int
) -> None:
    tokens.tofile(f"{prefix}.bin")
    pointers = [0, *itertools.accumulate(n * tokens.itemsize for n in lengths)][:-1]
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(bounds))
    arrays = (np.array(lengths, "<i4"), np.array(pointers, "<i8"), np.array(bounds, "<i8"))
    Path(f"{prefix}.idx").write_bytes(head + b"".join(array.tobytes() for array in arrays))


@pytest.mark.parametrize(("dtype", "code"), [("i2", 3), ("i4", 4), ("i8", 5), ("u2", 8)])
def test_megatrons_documents_are_those_of_its_index(tmp_path: Path, dtype: str, code: int) -> None:
    """Without sentences, with several, without end of text, with it inside, and empty."""
    end = E if dtype != "i2" else 300
    vocab = write_vocabulary(tmp_path / "v", end + 1) if end != E else None
    tokens = np.array([1, 2, end, 3, 4, end, 5, 6, end, 7], dtype)
    write_megatron(tmp_path / "m", tokens, [1, 2, 2, 0, 5], [0, 2, 3, 3, 4, 5], code)
    import_shards([tmp_path / "m"], "megatron", tmp_path / "out", vocab=vocab)
    expected = [[end, 1, 2], [end, 3, 4], [end], [end], [end, end, 5, 6, end, 7]]
    assert documents(tmp_path / "out")["train"] == expected
    export_shards(tmp_path / "out", "megatron", tmp_path / "again")
    back(tmp_path / "again", "megatron", tmp_path / "out2", vocab=vocab)
    assert documents(tmp_path / "out2")["train"] == expected
    for format in ("llmc", "nanogpt"):  # where it would be two documents
        with pytest.raises(DataError, match=r"5 documents hold 7 ends of text.* megatron keeps"):
            export_shards(tmp_path / "out", format, tmp_path / "theirs")
    assert not (tmp_path / "theirs").exists()


def write_llmc(path: Path, tokens: list[int], dtype: str = "u2") -> Path:
    known = {"u2": (20240520, 1), "u4": (20240801, 7)}[dtype]
    head = np.array([*known, len(tokens), *[0] * 253], np.int32)
    path.write_bytes(head.tobytes() + np.array(tokens, dtype).tobytes())
    return path


@pytest.mark.parametrize("dtype", ["u2", "u4"])
def test_llmcs_documents_go_on_from_file_to_file(tmp_path: Path, dtype: str) -> None:
    """And the first, which may begin before the first file, gets an end of text."""
    pieces = [[1, 2], [3, E], [E, 4], [5, 6, E, 7], [8]]
    for number, piece in enumerate(pieces):
        write_llmc(tmp_path / f"x_train_{number:06d}.bin", piece, dtype)
    write_llmc(tmp_path / "x_val_000000.bin", [E, 9, E], dtype)
    import_shards(
        [tmp_path / "x_train_*.bin"], "llmc", tmp_path / "out", held_out=[tmp_path / "x_val_*.bin"]
    )
    assert documents(tmp_path / "out") == {
        "train": [[E, 1, 2, 3], [E], [E, 4, 5, 6], [E, 7, 8]],
        "held_out": [[E, 9], [E]],
    }


def test_our_own_shards_are_llmcs_files(novels: Path, tmp_path: Path) -> None:
    names = [shard.name for shard in read_manifest(novels).splits["train"]]
    import_shards([novels / f"{name}.bin" for name in names], "llmc", tmp_path / "out")
    assert documents(tmp_path / "out")["train"] == documents(novels)["train"]


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([[1, 2, 3]], [[E, 1, 2, 3]]),
        ([[E]], [[E]]),
        ([[1, E, 2, E]], [[E, 1], [E, 2]]),
        ([[1, E, 2], [3, E, E]], [[E, 1], [E, 2, 3], [E]]),
        ([[1, E], [2, 3]], [[E, 1], [E, 2, 3]]),
        ([[1], [E]], [[E, 1]]),
    ],
)
def test_nanogpts_documents_end_at_end_of_text(
    tmp_path: Path, files: list[list[int]], expected: list[list[int]]
) -> None:
    paths = [tmp_path / f"{number}.bin" for number in range(len(files))]
    for path, tokens in zip(paths, files, strict=True):
        np.array(tokens, np.uint16).tofile(path)
    import_shards(paths, "nanogpt", tmp_path / "out")
    assert documents(tmp_path / "out") == {"train": expected, "held_out": []}


def make_bad(folder: Path, case: str) -> Path:
    """One token file, with something wrong in it."""
    path = folder / "bad.bin"
    tokens = np.array([1, 2, E, 3, E], np.uint16)
    write_megatron(path.with_suffix(""), tokens, [3, 2], [0, 1, 2], 8)
    index = bytearray(path.with_suffix(".idx").read_bytes())
    if case == "no index":
        path.with_suffix(".idx").unlink()
        return path
    if case in ("index magic", "index version", "index dtype"):
        index[{"index magic": 0, "index version": 9, "index dtype": 17}[case]] = 7
    elif case == "index cut short":
        del index[-1]
    elif case == "index empty":
        index.clear()
    elif case == "index of nothing":
        index[:] = index[:18] + struct.pack("<QQ", 0, 0)
    elif case == "index of others":
        path.write_bytes(tokens[:-1].tobytes())
    elif case == "negative length":
        index[34:58] = struct.pack("<2i2q", -3, 8, 0, -6)
    elif case == "unordered documents":
        index[-24:] = struct.pack("<3q", 0, 3, 2)
    elif case == "empty":
        path.write_bytes(b"")
    elif case == "odd":
        path.write_bytes(b"123")
    elif case == "llmc magic":
        path.write_bytes(bytes(2048))
    elif case == "llmc short":
        path.write_bytes(write_llmc(path, [1, 2, 3]).read_bytes()[:-2])
    elif case == "llmc without tokens":
        write_llmc(path, [])
    path.with_suffix(".idx").write_bytes(index)
    return path


@pytest.mark.parametrize(
    ("format", "case", "says"),
    [
        ("megatron", "no index", r"bad\.idx: No such file"),
        ("megatron", "index magic", r"bad\.idx: not an index of Megatron's"),
        ("megatron", "index version", r"bad\.idx: not an index of Megatron's"),
        ("megatron", "index dtype", r"bad\.idx: not an index of Megatron's"),
        ("megatron", "index cut short", r"bad\.idx: 81 bytes, but its header says 82"),
        ("megatron", "index empty", r"bad\.idx: is empty"),
        ("megatron", "index of nothing", r"bad\.idx: holds no documents"),
        ("megatron", "index of others", r"bad\.idx: its sequences do not cover the 8 bytes of bad"),
        ("megatron", "negative length", r"bad\.idx: its sequences do not cover"),
        ("megatron", "unordered documents", r"bad\.idx: its sequences do not cover"),
        ("megatron", "empty", r"bad\.idx: its sequences do not cover the 0 bytes of bad\.bin"),
        ("nanogpt", "empty", r"bad\.bin: is empty"),
        ("nanogpt", "odd", r"bad\.bin: 3 bytes are no whole number of uint16"),
        ("llmc", "empty", r"bad\.bin: not a token file of llm\.c"),
        ("llmc", "llmc magic", r"bad\.bin: not a token file of llm\.c"),
        ("llmc", "llmc short", r"bad\.bin: 1,028 bytes, but its header says 1,030"),
        ("llmc", "llmc without tokens", r"bad\.bin: is empty"),
    ],
)
def test_bad_files_are_refused_in_one_line_and_leave_nothing(
    tmp_path: Path, format: str, case: str, says: str
) -> None:
    path = make_bad(tmp_path, case)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(DataError, match=says) as error:
        import_shards([path], format, tmp_path / "new" / "out")
    assert "\n" not in str(error.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("format", FORMATS)
def test_an_id_beyond_the_vocabulary_is_named_with_its_place(tmp_path: Path, format: str) -> None:
    tokens = np.array([E, *[1] * 20, 50257, 2, 60000], np.uint16)
    if format == "llmc":
        path = write_llmc(tmp_path / "a.bin", tokens.tolist())
    else:
        path = tmp_path / "a.bin"
        write_megatron(tmp_path / "a", tokens, [len(tokens)], [0, 1], 8)
    says = r"a\.bin: token 21 is 50257, but vocabulary 'gpt2' has ids 0 … 50256"
    with mock.patch.object(interop, "_PIECE", 5), pytest.raises(DataError, match=says):
        import_shards([path], format, tmp_path / "out")
    write_megatron(tmp_path / "b", np.array([1, 2, -1, E], "<i4"), [4], [0, 1], 4)
    with pytest.raises(DataError, match=r"b\.bin: token 2 is -1, but vocabulary"):
        import_shards([tmp_path / "b"], "megatron", tmp_path / "out")


@pytest.mark.parametrize("format", FORMATS)
def test_documents_without_end_are_refused_before_they_fill_the_memory(
    tmp_path: Path, format: str
) -> None:
    path = tmp_path / "a.bin"
    write_megatron(tmp_path / "a", np.ones(5000, np.uint16), [5000], [0, 1], 8)
    if format == "llmc":
        write_llmc(path, [1] * 5000)
    says = (
        r"a\.bin: a document of more than 3000 tokens, where vocabulary 'gpt2' ends text with 50256"
    )
    small = mock.patch.multiple(interop, _PIECE=100, _LONGEST=3000)
    with small, pytest.raises(DataError, match=says):
        import_shards([path], format, tmp_path / "out")


def test_sources_that_are_not_as_they_should_be(tmp_path: Path) -> None:
    a, b = (tmp_path / f"{name}.bin" for name in "ab")
    for path in (a, b):
        np.array(STREAM, np.uint16).tofile(path)
    for sources, held_out, says in (
        ([], [a], "no source given"),
        ([a, tmp_path / "*.bin"], [], r"a\.bin: given twice"),
        ([tmp_path / "*.bin"], [b], r"b\.bin: given twice"),
        ([tmp_path / "c.bin"], [], r"c\.bin: no such file"),
        ([tmp_path / "*.dat"], [], r"\*\.dat: no such file"),
        ([tmp_path], [], "no such file; name the files themselves"),
    ):
        with pytest.raises(DataError, match=says):
            import_shards(sources, "nanogpt", tmp_path / "out", held_out=held_out)
    with pytest.raises(DataError, match="format 'npy'; the formats are megatron, llmc, nanogpt"):
        import_shards([a], "npy", tmp_path / "out")
    with pytest.raises(DataError, match="shard_tokens is 0"):
        import_shards([a], "nanogpt", tmp_path / "out", shard_tokens=0)
    with pytest.raises(DataError, match="is there already"):
        import_shards([a], "nanogpt", tmp_path)
    assert sorted(tmp_path.iterdir()) == [a, b]


def test_exports_that_would_not_be_ours_are_refused(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    ours = make_shards(
        tmp_path / "a", [[np.array([E, 1])], [np.array([E, 2, 2**16])]], dtype="uint32"
    )
    with pytest.raises(
        DataError, match=r"a \(train\): token 4 is 65536; .* uint16 and no id above"
    ):
        export_shards(ours, "nanogpt", tmp_path / "out")
    ours = make_shards(tmp_path / "b", [[np.array([E])]], [[np.array([E, 2**31])]], dtype="uint32")
    with pytest.raises(
        DataError, match=r"b \(held_out\): token 1 is 2147483648; .* int32 and no id"
    ):
        export_shards(ours, "megatron", tmp_path / "out")
    with pytest.raises(DataError, match="its splits are empty"):
        export_shards(make_shards(tmp_path / "c", []), "nanogpt", tmp_path / "out")
    with pytest.raises(DataError, match="shard_tokens is 2147483648"):
        export_shards(ours, "llmc", tmp_path / "out", shard_tokens=2**31)
    with pytest.raises(DataError, match="the formats are"):
        export_shards(ours, "npy", tmp_path / "out")
    with pytest.raises(DataError, match="is there already"):
        export_shards(ours, "llmc", tmp_path / "a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]


def test_a_full_disk_is_one_line_and_leaves_nothing(novels: Path, tmp_path: Path) -> None:
    """A limit on the size of files stands for the disk: the write fails in the same place."""
    export_shards(novels, "nanogpt", tmp_path / "theirs")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(DataError, match="File too large"):
            export_shards(novels, "nanogpt", tmp_path / "out")
        with pytest.raises(DataError, match="File too large"):
            back(tmp_path / "theirs", "nanogpt", tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


IMPORT = """
import sys
from data import import_shards
import_shards([sys.argv[1]], "nanogpt", sys.argv[2], shard_tokens=100_000)
"""


def test_a_killed_import_leaves_nothing_of_its_name_and_can_be_run_again(tmp_path: Path) -> None:
    source, out = tmp_path / "train.bin", tmp_path / "out"
    random = np.random.default_rng(0)
    tokens = random.integers(0, E, 2_000_000, dtype=np.uint16)
    tokens[999::1000] = E
    tokens.tofile(source)
    command = [sys.executable, "-c", IMPORT, str(source), str(out)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".tmp-out/train-*.bin")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(DataError, match="another run is writing there"):
        import_shards([source], "nanogpt", out)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert not out.exists()
    with pytest.raises(DataError, match="unfinished"):
        open_shards(tmp_path / ".tmp-out")
    import_shards([source], "nanogpt", out)
    assert read_manifest(out).tokens("train") == len(tokens)
    assert verify(out) == []
    assert {path.name for path in tmp_path.iterdir()} == {"train.bin", "out"}
