import json
import random
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data import load_tokenizer, open_shards, verify
from sparse_gpt.data.content_hash import content_hash, content_hashes
from sparse_gpt.data.corpus.blocks import Reading
from sparse_gpt.data.corpus.documents import read
from sparse_gpt.data.corpus.slices import cut
from sparse_gpt.data.corpus.sources import find_files
from sparse_gpt.data.shards.format import BLOCK_BYTES, INDEX, MAX_TOKENS
from sparse_gpt.data.shards.manifest import MANIFEST, SPLITS, read_manifest
from sparse_gpt.data.shards.writer import ShardWriter
from sparse_gpt.data.vocabulary import Vocabulary, dtype_for
from sparse_gpt.errors import DataError
from sparse_gpt.files import read_sealed, write_sealed

SAMPLES = Path(__file__).parents[3] / "data" / "novels"
MakeShards = Callable[..., Path]


@pytest.fixture
def copy(novels: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(novels, tmp_path / "copy"))


SPACES = [chr(c) for c in range(sys.maxunicode + 1) if chr(c).isspace()]


@settings(max_examples=200)
@given(
    st.lists(
        st.lists(
            st.one_of(
                st.sampled_from([*SPACES, "  ", "\r\n", "\u200b", "\u0085a\u00a0"]),
                st.text(st.characters(exclude_categories=["Cs"])),
                st.sampled_from(["word ", "é", "x" * 1024, " " * 1024, "\u3000" * 1024]),
            ),
            max_size=12,
        ).map("".join),
        max_size=5,
    )
)
def test_a_content_hash_does_not_see_white_space(texts: list[str]) -> None:
    """By its definition, for short texts and long, alone and among others."""
    texts += [text * 3 + "a" * 70_000 + text for text in texts[:1]] + texts
    expected = [xxhash.xxh3_64_intdigest(" ".join(text.split()).encode()) for text in texts]
    assert content_hashes(texts) == expected
    assert list(map(content_hash, texts)) == expected


def test_tokens_are_tiktokens_and_the_index_finds_every_document(novels: Path) -> None:
    tokenizer = load_tokenizer()
    expected: dict[str, list[list[int]]] = {split: [] for split in SPLITS}
    for file in find_files([SAMPLES]):
        for _, _, text in read(cut(file, "\nChapter ")[0], Reading("\nChapter ", "text")):
            split = SPLITS[content_hash(text) < int(0.05 * 2**64)]
            expected[split].append([50256, *tokenizer.encode(text).tolist()])
    manifest = read_manifest(novels)
    for split in SPLITS:
        found = []
        for shard in manifest.splits[split]:
            tokens = np.fromfile(novels / f"{shard.name}.bin", "<u2", offset=1024)
            index = np.fromfile(novels / f"{shard.name}.idx", INDEX)
            assert len(tokens) == shard.tokens
            assert len(index) == shard.documents
            for document, row in zip(np.split(tokens, index["start"][1:]), index, strict=True):
                found.append(document.tolist())
                assert content_hash(tokenizer.decode(document[1:])) == row["hash"]
            assert shard.tokens <= 20_000 or shard.documents == 1
        assert found == expected[split]
    assert len(manifest.splits["train"]) > 10
    assert expected["held_out"]


def test_header_is_llm_c_s(novels: Path) -> None:
    for shard in read_manifest(novels).splits["train"]:
        head = (novels / f"{shard.name}.bin").read_bytes()[:1024]
        assert struct.unpack("<iii", head[:12]) == (20240520, 1, shard.tokens)
        assert head[56:88].hex() == load_tokenizer().vocab_hash
        assert struct.unpack("<QQIII", head[24:52]) == (shard.tokens, shard.documents, 2, 50256, 1)
        assert head[88:] == bytes(1024 - 88)


def test_ids_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    assert [dtype_for(n) for n in (50257, 2**16, 2**16 + 1)] == ["uint16", "uint16", "uint32"]
    for dtype, largest in (("uint16", 2**16 - 1), ("uint32", 2**32 - 1)):
        writer = ShardWriter(tmp_path, dtype, Vocabulary("ab" * 32, dtype, 0))
        writer.add(np.array([largest], np.uint64), 0)
        with pytest.raises(DataError, match=f"id {largest + 1} does not fit {dtype}"):
            writer.add(np.array([0, largest + 1], np.uint64), 0)
        assert writer.finish().tokens == 1
    assert np.fromfile(tmp_path / "uint16.bin", "<u2", offset=1024).tolist() == [2**16 - 1]


def test_shards_beyond_llm_c_s_count_are_refused(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, "s", Vocabulary("ab" * 32, "uint16", 0))
    zeros = np.broadcast_to(np.uint16(0), (2**31,))  # takes no memory; refused before any copy
    with pytest.raises(DataError, match="more than 2147483647 tokens"):
        writer.add(zeros, 0)
    writer.close()


def test_split_reads_across_shards_and_around_the_end(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    stream = np.arange(100, dtype=np.uint16)
    pieces = np.split(stream, [1, 2, 50, 97])
    split = open_shards(make_shards(tmp_path / "s", [[piece] for piece in pieces])).train
    starts = np.arange(-3, 203)
    out = np.zeros((len(starts), 30), np.uint16)
    split.read(starts, out)
    assert np.array_equal(out, (starts[:, None] + np.arange(30)) % 100)


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_files_and_splits_beyond_4_gib(
    tmp_path: Path, make_sparse_shards: MakeShards, dtype: str
) -> None:
    """Sparse files of the largest size a shard can have: bytes and tokens counted beyond 2^32."""
    counts, tail = [MAX_TOKENS, MAX_TOKENS, 100], [50256, *range(1, 8)]
    folder = make_sparse_shards(tmp_path / "s", counts, tail, dtype)
    files = [path.stat() for path in folder.glob("*.bin")]
    assert max(file.st_size for file in files) > 2**32
    assert sum(512 * file.st_blocks for file in files) < 2**20
    split = open_shards(folder).train
    assert split.n_tokens > 2**32
    starts = np.cumsum(counts) - 10
    out = np.zeros((4, 12), dtype)  # across the end of each shard, and of the last to the first
    split.read(np.append(starts, starts[2] + split.n_tokens), out)
    assert out.tolist() == [[0, 0, *tail, 0, 0]] * 4
    assert split.n_documents == 6


def test_more_shards_than_file_descriptors(tmp_path: Path, make_shards: MakeShards) -> None:
    """By the machine's limit, wherever that is."""
    folder = make_shards(tmp_path / "s", [[np.array([number])] for number in range(320)])
    for hard in (32, 256, 4096):
        limit = f'ulimit -Sn 32; ulimit -Hn {hard}; exec "$@"'
        done = subprocess.run(
            ["bash", "-c", limit, "_", sys.executable, "-c", READ_ALL, str(folder)],
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        expected = (np.arange(640)[:, None] + np.arange(3)) % 320
        assert json.loads(done.stdout) == {"limit": hard, "rows": expected.tolist()}


READ_ALL = """
import json, resource, sys
import numpy as np
from sparse_gpt.data import open_shards
split = open_shards(sys.argv[1]).train
out = np.zeros((640, 3), np.uint16)
split.read(np.arange(640), out)
print(json.dumps({"limit": resource.getrlimit(resource.RLIMIT_NOFILE)[0], "rows": out.tolist()}))
"""


def test_what_cannot_be_opened_is_not_said_to_have_changed(
    tmp_path: Path, make_shards: MakeShards
) -> None:
    folder = make_shards(tmp_path / "s", [[np.array([1, 2, 3])]])
    split = open_shards(folder).train
    [path] = folder.glob("train-*.bin")
    path.unlink()
    path.symlink_to(path)
    says = r"train-.*\.bin: cannot be read: Too many levels"
    with pytest.raises(DataError, match=says):
        split.read(np.zeros(1, np.int64), np.zeros((1, 2), np.uint16))
    with pytest.raises(DataError, match=says):
        open_shards(folder)


def test_whole_shards_have_no_damage(novels: Path) -> None:
    assert verify(novels) == []


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:
        file.seek(bit // 8)
        (byte,) = file.read(1)
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


@pytest.mark.slow
def test_every_flipped_bit_is_found(copy: Path) -> None:
    """A thousand, over token files, indexes and the manifest alike."""
    chance = random.Random(0)
    kinds = [sorted(copy.glob(pattern)) for pattern in ("*.bin", "*.idx", MANIFEST)]
    for number in range(1000):
        path = chance.choice(kinds[number % 3])
        size = path.stat().st_size
        bit = chance.randrange(8 * size)
        flip(path, bit)
        if path.name == MANIFEST:
            for check in (verify, open_shards):
                with pytest.raises(DataError, match=r"manifest\.json"):
                    check(copy)
        else:
            assert verify(copy) == [f"{path}: block 0 (bytes 0 to {size:,}) is damaged"]
        flip(path, bit)
    assert verify(copy) == []


def test_the_damaged_block_is_named(tmp_path: Path, make_shards: MakeShards) -> None:
    folder = make_shards(tmp_path / "s", [[np.zeros(BLOCK_BYTES * 5 // 4, np.uint16)]])
    (path,) = folder.glob("*.bin")
    with open(path, "r+b") as file:
        for place in (2 * BLOCK_BYTES, BLOCK_BYTES - 1):
            file.seek(place)
            file.write(b"\x01")
    assert [line.split(" (")[0] for line in verify(folder)] == [
        f"{path}: block 0",
        f"{path}: block 2",
    ]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_files_cut_short_grown_or_missing_are_found(copy: Path, suffix: str) -> None:
    path = sorted(copy.glob(f"train-*.{suffix}"))[3]
    content = path.read_bytes()
    for changed in (content[:-1], content[: len(content) // 2], b"", content + b"\0"):
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{path.name}: .* bytes, .* truncated"):
            open_shards(copy)
        found = verify(copy)
        assert found[0].startswith(f"{path}: {len(changed):,} bytes, the manifest says")
        assert all(line.startswith(f"{path}: ") for line in found)
    path.unlink()
    with pytest.raises(DataError, match=rf"{path.name}: is missing"):
        open_shards(copy)
    assert verify(copy) == [f"{path}: No such file or directory"]


@pytest.mark.parametrize("suffix", ["bin", "idx"])
def test_swapped_files_are_found(
    copy: Path, tmp_path: Path, make_shards: MakeShards, suffix: str
) -> None:
    """In a real folder, and between shards of the same size, which can be opened."""
    long, short = np.array([50256, 1]), np.array([50256])
    twins = make_shards(tmp_path / "twins", [[long, short], [short, long]])
    for folder in (copy, twins):
        one, other = sorted(folder.glob(f"*.{suffix}"))[:2]
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second)
        other.write_bytes(first)
        assert {line.split(": ")[0] for line in verify(folder)} == {str(one), str(other)}
    open_shards(twins)


def test_a_manifest_cut_short_grown_or_swapped_is_found(
    copy: Path, tmp_path: Path, make_shards: MakeShards
) -> None:
    path = copy / MANIFEST
    content = path.read_bytes()
    places = random.Random(0).sample(range(len(content)), 100)
    for changed in (b"", *(content[:place] for place in places), content + b"\n", content * 2):
        path.write_bytes(changed)
        for check in (verify, open_shards):
            with pytest.raises(DataError, match=r"manifest\.json"):
                check(copy)
    other = make_shards(tmp_path / "other", [[np.array([50256])]])
    shutil.copy(other / MANIFEST, path)
    shard = copy / f"train-00000-00-{'0' * 16}"
    assert verify(copy) == [
        f"{shard}.{suffix}: No such file or directory" for suffix in ("bin", "idx")
    ]


@pytest.mark.parametrize("change", [{"name": 1}, {"bytes": -1}, {"split": []}])
def test_a_source_that_cannot_be_is_refused_though_sealed(
    copy: Path, change: dict[str, object]
) -> None:
    fields = read_sealed(copy / "manifest.json")
    del fields["hash"]
    fields["sources"][0].update(change)
    write_sealed(copy / "manifest.json", fields)
    with pytest.raises(DataError, match=r"manifest\.json: not a manifest of ours \(sources\.0"):
        read_manifest(copy)


def test_a_header_that_contradicts_the_manifest_is_refused_at_open(copy: Path) -> None:
    path = sorted(copy.glob("train-*.bin"))[0]
    with open(path, "r+b") as file:
        file.seek(60)
        file.write(b"\xff")
    with pytest.raises(DataError, match=rf"{path.name}: its header is not the manifest's"):
        open_shards(copy)


def test_half_published_and_foreign_folders_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / MANIFEST).unlink()
    with pytest.raises(DataError, match="copy: unfinished"):
        open_shards(copy)
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    with pytest.raises(DataError, match="foreign: not a folder of shards"):
        open_shards(foreign)
    for content in ("{}", "[]", "null", '{"hash": 3}', '{"hash": ""}', "\xff", ""):
        (foreign / MANIFEST).write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=r"manifest\.json"):
            open_shards(foreign)
    with pytest.raises(DataError, match="nowhere: no such folder"):
        open_shards(tmp_path / "nowhere")


def test_split_hash_depends_on_the_tokens_alone(tmp_path: Path, make_shards: MakeShards) -> None:
    one, same, other = (
        open_shards(make_shards(tmp_path / name, [[np.array(tokens)]])).train.hash
        for name, tokens in (("a", [1, 2]), ("b", [1, 2]), ("c", [2, 1]))
    )
    assert one == same != other


def test_manifest_is_plain_json(novels: Path) -> None:
    manifest = json.loads((novels / MANIFEST).read_text())
    assert manifest["tokenizer"]["vocab_hash"] == load_tokenizer().vocab_hash
    assert [source["name"] for source in manifest["sources"]] == [
        "persuasion.txt",
        "pride-and-prejudice.txt",
    ]
    assert manifest["hash"] == open_shards(novels).manifest.hash
