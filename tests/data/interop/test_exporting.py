"""What an export writes, against the formats' own descriptions."""

import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from token_files import STREAM, THREE, E

from sparse_gpt.data import export_shards, open_shards
from sparse_gpt.data.interop import exporting
from sparse_gpt.data.shards.format import MAX_TOKENS
from sparse_gpt.errors import DataError

MakeShards = Callable[..., Path]


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
        exporting._write_index(file, dataset, dataset.train, 4, 4)
    long = MAX_TOKENS - 2
    assert struct.unpack("<4i4q", (tmp_path / "index").read_bytes()[34 : 34 + 48]) == (
        *(long, 2, long, 2),
        *(0, 4 * long, 4 * MAX_TOKENS, 4 * (MAX_TOKENS + long)),
    )


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
