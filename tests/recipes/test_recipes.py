"""The recipes in data/, run as a person runs them, and what data/README.md says of the novels."""

import gzip
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub
from ranks import ROOT

from sparse_gpt.data import prepare, verify
from sparse_gpt.data.shards.manifest import SPLITS, read_manifest

NOVELS = ("pride-and-prejudice", "persuasion")  # in the order in which the README names them


def start(recipe: str, *arguments: str, cwd: Path, **env: str) -> "subprocess.Popen[str]":
    """Start data/RECIPE.sh in the folder `cwd`, with `sparse-gpt` on the path as an environment
    that is activated has it."""
    tools = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return subprocess.Popen(
        [str(ROOT / f"data/{recipe}.sh"), *arguments],
        cwd=cwd,
        env={**os.environ, "PATH": tools, "PYTHONPATH": str(ROOT), **env},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(recipe: str, *arguments: str, cwd: Path, code: int = 0, **env: str) -> str:
    """Run it to its end; returns its stderr."""
    return ended(start(recipe, *arguments, cwd=cwd, **env), code)


def ended(process: "subprocess.Popen[str]", code: int = 0) -> str:
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == code, stderr
    return stderr


def shards(folder: Path) -> list[Any]:
    """The shards of a whole folder, by what is in them."""
    assert verify(folder) == []
    manifest = read_manifest(folder)
    return [(shard.bin, shard.idx) for split in SPLITS for shard in manifest.splits[split]]


def parquet(rows: Iterable[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows)), sink)
    return sink.getvalue()


def test_the_novels_are_what_their_prepare_makes(tmp_path: Path, gpt2_shards: Path) -> None:
    run("novels", cwd=tmp_path)
    whole = read_manifest(gpt2_shards)
    assert read_manifest(tmp_path / "shards/novels").hash == whole.hash

    run("novels", "--held-out", "0.2", "--out", "elsewhere", cwd=tmp_path)
    other = read_manifest(tmp_path / "elsewhere")
    assert other.options["held_out"] == 0.2
    assert sum(map(other.tokens, SPLITS)) == sum(map(whole.tokens, SPLITS))


def test_the_readme_has_the_novels_right(gpt2_shards: Path) -> None:
    readme, manifest = (ROOT / "data/README.md").read_text(), read_manifest(gpt2_shards)
    rows = re.findall(r"^\| `data/novels\.sh` \|.*\| (\S+) \| (\S+) \| (\S+) MB \|$", readme, re.M)
    size = sum(p.stat().st_size for p in gpt2_shards.iterdir() if p.suffix in (".bin", ".idx"))
    documents, tokens = (sum(map(of, SPLITS)) for of in (manifest.documents, manifest.tokens))
    assert rows == [(f"{documents:,}", f"{tokens:,}", f"{size / 1e6:.2f}")]

    text = " ".join(readme.split())
    train, held_out = ((manifest.documents(split), manifest.tokens(split)) for split in SPLITS)
    assert f"{train[0]} documents with {train[1]:,} tokens are for training" in text
    assert f", {held_out[0]} with {held_out[1]:,} held out" in text

    novels = [(ROOT / f"data/novels/{name}.txt").read_bytes() for name in NOVELS]
    chapters = [novel.count(b"\nChapter ") for novel in novels]
    assert f"a chapter ({chapters[0]} and {chapters[1]})" in text
    assert documents == sum(chapters) + len(novels)  # "or what stands before the first"
    assert f"download: {sum(map(len, novels)) / 1e6:.2f} MB" in text


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    mine = tmp_path / "home/mine"
    (mine / "deep").mkdir(parents=True)
    (mine / "letter.txt").write_text("Dear reader,\r\n")
    (mine / "notes.rst").write_text("of another kind\n")
    texts = [f"text number {n} é" for n in range(600)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts[:300])
    (mine / "deep/rows.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (mine / "rows.parquet").write_bytes(parquet({"text": text} for text in texts[300:]))

    run("own-folder", "home/mine/", cwd=tmp_path)
    manifest = read_manifest(tmp_path / "shards/mine")
    assert sum(map(manifest.documents, SPLITS)) == 601
    prepare([mine], tmp_path / "same", held_out=0.01)
    assert shards(tmp_path / "shards/mine") == shards(tmp_path / "same")

    rows = "".join(json.dumps({"body": text, "lang": "en"}) + "\n" for text in texts)
    (tmp_path / "bodies").mkdir()
    (tmp_path / "bodies/rows.jsonl").write_text(rows + json.dumps({"body": "x", "lang": "de"}))
    options = ("--text-field", "body", "--where", "lang=en")
    run("own-folder", "bodies", "out of the way", *options, cwd=tmp_path)
    manifest = read_manifest(tmp_path / "out of the way")
    assert sum(map(manifest.documents, SPLITS)) == 600

    before = sorted(tmp_path.rglob("*"))
    for wrong in ([], ["--workers", "2"]):
        stderr = run("own-folder", *wrong, cwd=tmp_path, code=2)
        assert re.fullmatch(r"usage: \S+ FOLDER \[OUT\] \[OPTION\.\.\.\]\n", stderr)
    assert run("own-folder", "none", cwd=tmp_path, code=2).startswith("error: none: no such file")
    assert sorted(tmp_path.rglob("*")) == before


# How the hub lays out each data set: its card's configurations, its columns and its files; and the
# recipe's share of documents to hold out.
HUB: dict[str, tuple[str, list[tuple[str, str]], dict[str, Any], str, float]] = {
    "openwebtext": (
        "Skylion007/openwebtext",
        [("plain_text", "plain_text/train-*")],
        {},
        "plain_text/train-{:05d}-of-00002.parquet",
        0.0005,
    ),
    "fineweb-edu": (
        "HuggingFaceFW/fineweb-edu",
        [("default", "data/*/*"), ("sample-10BT", "sample/10BT/*")],
        {"id": "<urn:uuid:0>", "language": "en", "token_count": 7, "score": 3.1, "int_score": 3},
        "sample/10BT/{:03d}_00000.parquet",
        0.001,
    ),
}
UNITS = ("--shard-tokens", "100")  # so small that each file is a unit of its own


@pytest.mark.parametrize(
    ("recipe", "parts"),
    [pytest.param("openwebtext", 2, marks=pytest.mark.long), ("fineweb-edu", 1)],
)
def test_a_corpus_of_the_hub(recipe: str, parts: int, tmp_path: Path) -> None:
    """Served here, small, in its layout; in two parts as RANK and WORLD_SIZE say, or at once."""
    name, configs, columns, file, held_out = HUB[recipe]
    rows = [{"text": f"a page about {n}", **columns} for n in range(300)]
    files = {file.format(n): parquet(rows[150 * n : 150 * (n + 1)]) for n in range(2)}
    card = [{"config_name": config, "data_files": pattern} for config, pattern in configs]
    others = {
        "README.md": f"---\n{json.dumps({'configs': card})}\n---\n".encode(),
        "data/CC-MAIN-2013-20/000_00000.parquet": parquet([{**rows[0], "text": "not in it"}]),
    }
    with Hub() as hub:
        hub.push(name, files | others)
        env = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # which go elsewhere
        }
        ranks = [{"RANK": str(n), "WORLD_SIZE": str(parts)} for n in range(parts)]
        running = [start(recipe, *UNITS, cwd=tmp_path, **env, **rank) for rank in ranks]
        for process in running:
            ended(process)
    for n, content in enumerate(files.values()):
        (tmp_path / f"{n}.parquet").write_bytes(content)
    local = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    prepare(local, tmp_path / "local", held_out=held_out, shard_tokens=100)
    made = tmp_path / "shards" / recipe
    assert len(list(made.glob("unit-*.json"))) == 2
    assert shards(made) == shards(tmp_path / "local")


def test_recipes_are_bash() -> None:
    recipes = sorted((ROOT / "data").glob("*.sh"))
    assert [path.stem for path in recipes] == ["fineweb-edu", "novels", "openwebtext", "own-folder"]
    for path in recipes:
        assert os.access(path, os.X_OK)
        assert "\nset -euo pipefail\n" in path.read_text()
        subprocess.run(["bash", "-n", str(path)], check=True)
