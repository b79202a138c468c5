"""Export and import together, and with Megatron itself."""

import resource
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_files import FORMATS, THREE, E, back, documents, hashes, write_vocabulary

from sparse_gpt.data import (
    Batches,
    export_shards,
    import_shards,
    load_tokenizer,
    open_shards,
    verify,
)
from sparse_gpt.data.interop import exporting, importing
from sparse_gpt.data.shards.manifest import SPLITS, read_manifest
from sparse_gpt.errors import DataError

MakeShards = Callable[..., Path]


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
    assert manifest.tokenizer["engines"] == [manifest.options["import"]] == [format]
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


@pytest.mark.slow
@settings(max_examples=40)
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
    pieces = (mock.patch.object(module, "_PIECE", piece) for module in (exporting, importing))
    with next(pieces), next(pieces), mock.patch("os.fsync"):
        ours = make_shards(folder / "ours", train, held_out, dtype, vocab_hash, tokenizer.eot)
        export_shards(ours, format, folder / "theirs", shard_tokens=shard_tokens)
        back(folder / "theirs", format, folder / "back", vocab=vocab, shard_tokens=shard_tokens)
    assert documents(folder / "back") == documents(ours)
    assert read_manifest(folder / "back").dtype == dtype
    assert verify(folder / "back") == []


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
