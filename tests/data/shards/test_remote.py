"""Shards in object storage, against servers of S3's and of Google Cloud Storage's protocol."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sparse_gpt.data import export_shards, open_shards, prepare, verify
from sparse_gpt.errors import DataError


def test_shards_are_copied_once_and_read_as_local_ones(
    storage: Any, scheme: str, novels: Path
) -> None:
    storage.put(f"{novels}/", "team/novels/", recursive=True)
    remote, local = open_shards(f"{scheme}://team/novels/"), open_shards(novels)
    assert remote.manifest == local.manifest
    tokens = np.zeros((2, 1, local.train.n_tokens), np.uint16)
    for dataset, out in zip((remote, local), tokens, strict=True):
        dataset.train.read(np.zeros(1, np.int64), out)
    assert np.array_equal(*tokens)
    assert verify(f"{scheme}://team/novels") == []

    shards = storage.glob("team/novels/*.bin")
    storage.rm(shards)
    assert open_shards(f"{scheme}://team/novels").train.hash == local.train.hash
    with pytest.raises(DataError, match=f"^{scheme}://team/other: not a folder of shards"):
        open_shards(f"{scheme}://team/other")


def test_what_is_not_as_the_manifest_says_is_not_opened(
    storage: Any, scheme: str, novels: Path, tmp_path: Path
) -> None:
    storage.put(f"{novels}/", "team/novels/", recursive=True)
    victim = storage.glob("team/novels/*.bin")[3]
    whole = storage.cat_file(victim)
    storage.pipe_file(victim, whole[:-2] + b"\0\0")
    with pytest.raises(DataError, match="is not what its manifest says"):
        open_shards(f"{scheme}://team/novels")
    assert not list((tmp_path / "cache").rglob("manifest.json"))
    storage.pipe_file(victim, whole)
    assert open_shards(f"{scheme}://team/novels").manifest.hash == open_shards(novels).manifest.hash


def test_ranks_that_open_it_at_once_get_one_copy(
    storage: Any, scheme: str, novels: Path, tmp_path: Path
) -> None:
    storage.put(f"{novels}/", "team/novels/", recursive=True)
    code = f"from sparse_gpt import data; print(data.open_shards('{scheme}://team/novels').train.folder)"
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


def test_the_commands_take_urls(storage: Any, scheme: str, tmp_path: Path) -> None:
    """And what was set aside is said to be where it is: it is not copied."""
    corpus = tmp_path / "corpus.jsonl"
    rows = [json.dumps({"text": f"document number {n}"}) for n in range(200)]
    corpus.write_text("\n".join([*rows, "{"]))
    prepare([corpus], tmp_path / "ours", held_out=0.1)
    storage.put(f"{tmp_path}/ours/", "team/ours/", recursive=True)
    url = f"{scheme}://team/ours"

    def shards(*arguments: str) -> str:
        command = [sys.executable, "-m", "sparse_gpt", "shards", *arguments]
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    lines = shards("info", f"{url}/").splitlines()
    assert f"{url}/: gpt2 (50,257 ids)" in lines[0]
    assert lines[-1] == f"broken documents set aside: 1, named in {url}/rejected.jsonl"
    assert shards("verify", url) == f"{url}: whole\n"
    theirs = str(tmp_path / "theirs")
    assert shards("export", url, "--format", "nanogpt", "--out", theirs).count("\n") == 2
    export_shards(tmp_path / "ours", "nanogpt", tmp_path / "same")
    for path in (tmp_path / "same").iterdir():
        assert (tmp_path / "theirs" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://team/a", "s3://team/a: reading it needs: pip install 'sparse-gpt[s3]'"),
        ("gs://team/a", "gs://team/a: reading it needs: pip install 'sparse-gpt[gs]'"),
        ("gcs://team/a", "gcs://team/a: reading it needs: pip install 'sparse-gpt[gs]'"),
        ("abfs://team/a", "abfs://team/a: cannot be read: Install adlfs"),
    ],
)
def test_what_is_not_installed_is_named(url: str, says: str) -> None:
    code = (
        "import sys; sys.modules |= dict.fromkeys(['s3fs', 'gcsfs', 'adlfs'])\n"  # None: no import
        "from sparse_gpt import data\n"
        "try: data.open_shards(sys.argv[1])\n"
        "except data.DataError as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code, url], stdout=subprocess.PIPE, text=True)
    assert done.stdout.startswith(says)


def test_an_unknown_kind_of_storage_is_refused_in_one_line() -> None:
    with pytest.raises(DataError, match=r"^nowhere://team/novels: cannot be read: [^\n]*nowhere"):
        open_shards("nowhere://team/novels")
