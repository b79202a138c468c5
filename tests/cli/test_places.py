"""Every command that writes, told to write where it cannot: one line, and nothing half-made."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from one_rank import train_here, world  # noqa: F401 - fixtures
from ranks import ENVIRONMENT, ROOT

pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")


@pytest.fixture
def no_places(tmp_path, small_disk):
    """Where nobody can write, root neither."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "file").write_text("a file")
    (place / "gone").symlink_to("/proc/gone")
    (place / "loop").symlink_to("loop")
    (place / "disk").symlink_to(small_disk.folder)
    subprocess.run(["mount", "-o", "remount,ro", small_disk.folder], check=True)
    return [place / "file/out", place / "gone/out", place / "loop/out", place / "disk/out",
            place / ("long" * 75), place / ("long" * 75) / "out"]  # fmt: skip


def tree(folder):
    return sorted(folder.rglob("*"))


@pytest.fixture
def commands(shards, run_file, tmp_path, command):
    """The words of each command before those that say where to write."""
    novel = ROOT / "data/novels/persuasion.txt"
    run = yaml.safe_load(run_file.read_text())
    sweep = {
        "run": {key: run[key] for key in run.keys() - {"run_dir", "duration", "optimizer"}},
        "families": {"dense": {"model.ffn": "dense"}},
        "sizes": {"small": {}},
        "budgets": [1e10],
        "lr": [1e-3],
        "baseline": "dense",
        "limits": {"epochs": 1e9},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    foreign = tmp_path / "foreign"
    made = command("shards", "export", shards, "--format", "megatron", "--out", foreign)
    assert made.returncode == 0, made.stderr
    return {
        "prepare": ["prepare", novel, "--separator", "\nChapter ", "--out"],
        "vocab": ["vocab", "train", novel, "--size", "300", "--out"],
        "shards export": ["shards", "export", shards, "--format", "megatron", "--out"],
        "shards import": ["shards", "import", foreign / "train.bin", "--format", "megatron",
                          "--vocab", shards.parent / "bpe", "--out"],
        "sweep run": ["sweep", "run", tmp_path / "sweep.yaml", "--out"],
        "sweep plan": ["sweep", "plan", tmp_path / "sweep.yaml", "--calibrate", "--out"],
        "prove-resume": ["prove-resume", run_file, "--out"],
        "export": ["export", tmp_path / "run", "--out"],
        "inspect": ["inspect", tmp_path / "run", "--max-tokens", "64", "--out"],
    }  # fmt: skip


def refuse_all(refused, words, places):
    place = places[0].parents[1]
    before = tree(place)
    for out in places:
        line = refused(*words, out)
        name = out.relative_to(place).parts[0]
        targets = (name, "/proc/gone", str((place / "disk").resolve()))
        assert any(target in line for target in targets), line
        assert tree(place) == before, line
    assert (place / "file").read_text() == "a file"


@pytest.mark.parametrize(
    "name",
    ["prepare", "vocab", "shards export", "shards import", "sweep run", "sweep plan",
     "prove-resume"],
)  # fmt: skip
def test_where_nothing_can_be_written_a_command_says_so(refused, commands, no_places, name):
    refuse_all(refused, commands[name], no_places)


@pytest.mark.parametrize("name", ["export", pytest.param("inspect", marks=pytest.mark.long)])
def test_a_model_is_not_written_there_either(
    train_here,  # noqa: F811
    refused,
    commands,
    no_places,
    name,
):
    train_here("duration.steps=2")
    refuse_all(refused, commands[name], no_places)


def test_an_output_that_is_full_is_told_and_one_that_is_closed_is_not():
    words = [sys.executable, "-m", "sparse_gpt", "config", "schema"]
    options = {"stderr": subprocess.PIPE, "env": ENVIRONMENT, "cwd": ROOT, "text": True}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(words, stdout=full, **options)
    assert (done.returncode, done.stderr) == (2, "error: the output: No space left on device\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(words, stdout=writer, **options)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")
