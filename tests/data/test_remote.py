"""Shards in object storage, against a server of S3's protocol."""

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import s3fs
from moto.server import ThreadedMotoServer

from data import DataError, open_shards, verify


@pytest.fixture
def storage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[s3fs.S3FileSystem]:
    """An empty bucket `team`; the cache is `tmp_path / "cache"`."""
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("SPARSE_GPT_CACHE", str(tmp_path / "cache"))
    s3fs.S3FileSystem.clear_instance_cache()
    storage = s3fs.S3FileSystem()
    storage.mkdir("team")
    yield storage
    storage.rm("team", recursive=True)
    s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def test_shards_are_copied_once_and_read_as_local_ones(
    storage: s3fs.S3FileSystem, novels: Path
) -> None:
    storage.put(f"{novels}/", "team/novels/", recursive=True)
    remote, local = open_shards("s3://team/novels/"), open_shards(novels)
    assert remote.manifest == local.manifest
    tokens = np.zeros((2, 1, local.train.n_tokens), np.uint16)
    for dataset, out in zip((remote, local), tokens, strict=True):
        dataset.train.read(np.zeros(1, np.int64), out)
    assert np.array_equal(*tokens)
    assert verify("s3://team/novels") == []

    shards = storage.glob("team/novels/*.bin")
    storage.rm(shards)
    assert open_shards("s3://team/novels").train.hash == local.train.hash
    with pytest.raises(DataError, match=r"s3://team/other: cannot be read: .*team/other"):
        open_shards("s3://team/other")


def test_what_is_not_as_the_manifest_says_is_not_opened(
    storage: s3fs.S3FileSystem, novels: Path, tmp_path: Path
) -> None:
    storage.put(f"{novels}/", "team/novels/", recursive=True)
    victim = storage.glob("team/novels/*.bin")[3]
    whole = storage.cat_file(victim)
    storage.pipe_file(victim, whole[:-2] + b"\0\0")
    with pytest.raises(DataError, match="is not what its manifest says"):
        open_shards("s3://team/novels")
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    storage.pipe_file(victim, whole)
    assert open_shards("s3://team/novels").manifest.hash == open_shards(novels).manifest.hash


def test_ranks_that_open_it_at_once_get_one_copy(
    storage: s3fs.S3FileSystem, novels: Path, tmp_path: Path
) -> None:
    storage.put(f"{novels}/", "team/novels/", recursive=True)
    code = "import data; print(data.open_shards('s3://team/novels').train.folder)"
    ranks = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    [folder] = {rank.communicate(timeout=120)[0].strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0, 0, 0]
    names = {path.name for path in Path(folder).iterdir()}
    wanted = {path.name for path in novels.iterdir() if not path.name.startswith("unit-")}
    assert names == wanted | {".lock"}
    assert json.loads(Path(folder, "manifest.json").read_text())["hash"].startswith(folder[-16:])


def test_an_unknown_kind_of_storage_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"^nowhere://team/novels: cannot be read: [^\n]*nowhere"):
        open_shards("nowhere://team/novels")
