"""Other tools' files, good and bad, made into shards."""

import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from token_files import (
    FORMATS,
    STREAM,
    E,
    back,
    documents,
    hashes,
    write_llmc,
    write_megatron,
    write_vocabulary,
)

from sparse_gpt.data import export_shards, import_shards, load_tokenizer, open_shards, verify
from sparse_gpt.data.content_hash import content_hash
from sparse_gpt.data.interop import importing
from sparse_gpt.data.shards.manifest import read_manifest
from sparse_gpt.errors import DataError


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


def test_any_number_of_workers_writes_the_same_bytes(tmp_path: Path) -> None:
    """Of documents in several batches and shards, whose ids are no whole UTF-8, or end of text;
    the content hashes are those of the text that tiktoken decodes."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, E, 40_000, dtype=np.uint16)
    tokens[random.integers(0, len(tokens), 100)] = E
    train, held_out = tmp_path / "train", tmp_path / "valid"
    lengths = [10_000, 0, 20_000, 1, 9_999]
    write_megatron(train, tokens, lengths, [*range(6)], 8)
    write_megatron(held_out, tokens[:500], [500], [0, 1], 8)
    outs = [tmp_path / f"out{workers}" for workers in (1, 2, 3)]
    for workers, out in enumerate(outs, 1):
        options = {"held_out": [held_out], "shard_tokens": 15_000, "workers": workers}
        with mock.patch.object(importing, "_BATCH", 5_000):
            import_shards([train], "megatron", out, **options)
    names = {path.name for path in outs[0].iterdir()}
    assert len(names) == 2 * 4 + 1
    for out in outs[1:]:
        assert {path.name for path in out.iterdir()} == names
        assert all((out / name).read_bytes() == (outs[0] / name).read_bytes() for name in names)
    reference = load_tokenizer()._encoding
    texts = [
        reference.decode(document[1:])
        for of_split in documents(outs[0]).values()
        for document in of_split
    ]
    assert hashes(outs[0]) == [content_hash(text) for text in texts]
    assert "\ufffd" in texts[0]
    assert "<|endoftext|>" in texts[0]


def test_an_error_in_a_later_batch_leaves_nothing(tmp_path: Path) -> None:
    tokens = np.arange(30_000, dtype=np.uint16)
    tokens[::100] = E
    tokens[-1] = E + 1
    tokens.tofile(tmp_path / "a.bin")
    small = mock.patch.multiple(importing, _BATCH=1_000, _PIECE=1_000)
    with small, pytest.raises(DataError, match=r"a\.bin: token 29999 is 50257"):
        import_shards([tmp_path / "a.bin"], "nanogpt", tmp_path / "out", workers=2)
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]
    with pytest.raises(DataError, match="workers is 0; it must be at least 1"):
        import_shards([tmp_path / "a.bin"], "nanogpt", tmp_path / "out", workers=0)


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
    with mock.patch.object(importing, "_PIECE", 5), pytest.raises(DataError, match=says):
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
    small = mock.patch.multiple(importing, _PIECE=100, _LONGEST=3000)
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


IMPORT = """
import sys
from sparse_gpt.data import import_shards
import_shards([sys.argv[1]], "nanogpt", sys.argv[2], shard_tokens=100_000)
"""


def test_a_killed_import_leaves_nothing_of_its_name_and_can_be_run_again(tmp_path: Path) -> None:
    source, out = tmp_path / "train.bin", tmp_path / "out"
    random = np.random.default_rng(0)
    tokens = random.integers(0, E, 2_000_000, dtype=np.uint16)
    tokens[999::1000] = E
    tokens.tofile(source)
    command = [sys.executable, "-c", IMPORT, str(source), str(out)]
    for _ in range(10):  # a busy machine may let us see it so late that it is done
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        while process.poll() is None and not list(tmp_path.glob(".tmp-out/train-*.bin")):
            time.sleep(0.001)
        process.send_signal(signal.SIGSTOP)
        if process.poll() is None and not out.exists():
            break
        process.kill()
        process.communicate()
        shutil.rmtree(out)
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
