"""Real shard folders and object storage for the tests of this room."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_gpt.data.preparation.prepare import prepare
from sparse_gpt.data.shards.format import DTYPES, HEADER_BYTES, INDEX, FileEntry, ShardEntry, header
from sparse_gpt.data.shards.manifest import write_manifest
from sparse_gpt.data.shards.writer import ShardWriter
from sparse_gpt.data.vocabulary import Vocabulary

SAMPLES = Path(__file__).parents[2] / "data" / "novels"


def write_folder(
    folder: Path,
    train: list[list[np.ndarray]],
    held_out: list[list[np.ndarray]] = [],  # noqa: B006 - never changed
    dtype: str = "uint16",
    vocab_hash: str = "ab" * 32,
    eot: int = 50256,
) -> Path:
    """A shard folder out of ready documents: a list of documents for each shard."""
    folder.mkdir(parents=True)
    splits = {}
    for split, shards in (("train", train), ("held_out", held_out)):
        splits[split] = []
        for number, documents in enumerate(shards):
            name = f"{split}-{number:05d}-00-{'0' * 16}"
            writer = ShardWriter(folder, name, Vocabulary(vocab_hash, dtype, eot))
            for document_hash, document in enumerate(documents):
                writer.add(document, document_hash)
            splits[split].append(writer.finish())
    return publish(folder, splits, Vocabulary(vocab_hash, dtype, eot))


def write_sparse_folder(folder: Path, counts: list[int], tail: list[int], dtype: str) -> Path:
    """A training split whose shards are holes (zeros) but for the tokens of `tail` at the end of
    each, a document of their own; their hashes are not true."""
    vocabulary = Vocabulary("ab" * 32, dtype, 50256)
    itemsize = DTYPES[dtype].itemsize
    folder.mkdir()
    shards = []
    for number, count in enumerate(counts):
        shard, size = folder / f"train-{number}.bin", HEADER_BYTES + count * itemsize
        shard.write_bytes(header(count, 2, vocabulary))
        with open(shard, "r+b") as file:
            file.truncate(size)
            file.seek(size - len(tail) * itemsize)
            file.write(np.array(tail, DTYPES[dtype]).tobytes())
        index = np.array([(0, 0), (count - len(tail), 1)], INDEX)
        shard.with_suffix(".idx").write_bytes(index.tobytes())
        files = [FileEntry(n, "0" * 64, "") for n in (size, index.nbytes)]
        shards.append(ShardEntry(shard.stem, count, 2, *files))
    return publish(folder, {"train": shards, "held_out": []}, vocabulary)


def publish(folder: Path, splits: dict[str, list[ShardEntry]], vocabulary: Vocabulary) -> Path:
    tokenizer = {"name": "made", "vocab_size": vocabulary.eot + 1, "vocab_hash": vocabulary.hash}
    write_manifest(folder, tokenizer, vocabulary, {}, [], splits)
    return folder


@pytest.fixture(scope="session")
def make_shards() -> Callable[..., Path]:
    return write_folder


@pytest.fixture(scope="session")
def make_sparse_shards() -> Callable[..., Path]:
    return write_sparse_folder


@pytest.fixture(scope="session")
def novels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The two sample novels, a chapter a document, in many small shards. Not to be changed."""
    folder = tmp_path_factory.mktemp("novels") / "shards"
    prepare([SAMPLES], folder, held_out=0.05, separator="\nChapter ", shard_tokens=20_000)
    return folder


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    yield
    server.stop()


@pytest.fixture
def gs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    port = server._api._httpd.server_port
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path))  # nobody's credentials
    monkeypatch.delenv("GOOGLE_APPLICATION_CREDENTIALS", raising=False)
    monkeypatch.setenv("NO_GCE_CHECK", "true")
    # Buckets of folders are asked for by another protocol; gcsfs looks when it is imported.
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
    yield
    server.stop()


@pytest.fixture(params=["s3", "gs"])
def scheme(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """Of URLs that lead to a server of ours; the cache is `tmp_path / "cache"`."""
    request.getfixturevalue(request.param)
    monkeypatch.setenv("SPARSE_GPT_CACHE", str(tmp_path / "cache"))
    return request.param


@pytest.fixture
def storage(scheme: str) -> Iterator[Any]:
    """With an empty bucket `team`."""
    import fsspec

    kind = fsspec.get_filesystem_class(scheme)
    kind.clear_instance_cache()
    storage = kind()
    storage.mkdir("team")
    yield storage
    storage.rm("team", recursive=True)
    kind.clear_instance_cache()
