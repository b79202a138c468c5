"""Every command's help, and its example: it runs."""

import glob
import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest
import typer
import yaml
from ranks import ENVIRONMENT, ROOT
from terminal import told

from sparse_gpt.cli.main import app
from sparse_gpt.data import export_shards


def leaves(command, path=()):
    """Every command below one, with the words that call it."""
    if not hasattr(command, "commands"):
        yield path, command
        return
    for name, inner in command.commands.items():
        yield from leaves(inner, (*path, name))


COMMANDS = dict(leaves(typer.main.get_command(app)))
# What trains, or needs what was trained: minutes together.
TRAINING = [
    ("train",),
    ("prove-resume",),
    ("compare",),
    ("evaluate",),
    ("generate",),
    ("inspect",),
    ("export",),
    ("replay",),
    ("sweep", "run"),
    ("sweep", "status"),
    ("sweep", "fit"),
]
OTHERS = [path for path in COMMANDS if path not in TRAINING]


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_option_has_help_and_a_default(path):
    for option in COMMANDS[path].params:
        assert option.help, option.name
        if option.opts[0].startswith("--") and not (option.is_flag or option.required):
            assert option.default is not None or isinstance(option.show_default, str), option.name


def example(path):
    """What follows `sparse-gpt` in a command's example."""
    start, _, words = COMMANDS[path].epilog.partition(" sparse-gpt ")
    assert start == "Example:"
    assert tuple(words.split()[: len(path)]) == path
    return words


def prepared(folder, shards, gpt2_shards):
    """The files that the examples name."""
    text = (ROOT / "data/novels/persuasion.txt").read_text()
    (folder / "books").mkdir()
    (folder / "books/one.txt").write_text(text[:100_000])
    lines = (json.dumps({"text": part}) for part in text.split("\nChapter ")[:8])
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "shards").mkdir()
    (folder / "shards/novels").symlink_to(gpt2_shards)
    (folder / "shards/novels-bpe1024").symlink_to(shards)
    (folder / "fineweb10B").mkdir()
    for number, path in enumerate(export_shards(gpt2_shards, "llmc", folder / "llmc")):
        name = "train" if "train" in path.name else "val"
        path.rename(folder / f"fineweb10B/fineweb_{name}_{number:06}.bin")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shards, gpt2_shards):
    return prepared(tmp_path_factory.mktemp("examples"), shards, gpt2_shards)


@pytest.mark.parametrize("path", OTHERS, ids=" ".join)
def test_the_example_runs(folder, no_gpu, monkeypatch, path):
    monkeypatch.chdir(folder)
    words = [
        file for word in shlex.split(example(path).partition(" > ")[0])
        for file in sorted(glob.glob(word)) or [word]
    ]  # fmt: skip
    said, code = told(words)
    assert code == 0, said
    assert len(said) > 20


@pytest.mark.long
def test_the_examples_that_train_run(tmp_path, shards, gpt2_shards):
    """In order, as each needs the runs before it."""
    prepared(tmp_path, shards, gpt2_shards)
    commands = tmp_path / "bin"
    commands.mkdir()
    (commands / "sparse-gpt").write_text(f'#!/bin/sh\nexec {sys.executable} -m sparse_gpt "$@"\n')
    (commands / "sparse-gpt").chmod(0o755)
    environment = {
        **ENVIRONMENT,
        "PATH": f"{commands}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
    }

    def typed(line, code=0):
        done = subprocess.run(
            f"sparse-gpt {line}", shell=True, env=environment, cwd=tmp_path, capture_output=True,
            text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == code, (line, done.stdout + done.stderr)
        return done.stdout

    typed("train tiny-dense duration.steps=4")
    for name in ("quickstart-dense", "quickstart-sparse"):
        typed(f"train {name} 'duration={{steps: 20}}' schedule.warmup_steps=5 eval.every=10")
    diverging = "optimizer.lr=1e20 guard.stop_after=3 schedule.warmup_steps=1"
    typed(f"train quickstart-sparse run_dir=runs/bad 'duration={{steps: 12}}' {diverging}", code=1)
    [incident] = (tmp_path / "runs/bad/incidents").iterdir()
    sizes = {f"d{d}": {"model.d_model": d, "model.n_head": d // 16} for d in (32, 48, 64)}
    run = yaml.safe_load((ROOT / "configs/sweeps/laptop.yaml").read_text())["run"]
    run["data"] = {"path": "shards/novels-bpe1024"}
    run["schedule"]["warmup_steps"] = 2
    sweep = {
        "run": run,
        "families": {
            "dense": {"model.ffn": {"preset": "dense", "fan_in_init": True}},
            "sparse": {"model.ffn": "default"},
        },
        "baseline": "dense",
        "sizes": sizes,
        "budgets": [2e10, 4e10],
        "lr": [4e-3],
        "limits": {"tokens_per_parameter": [0, 1e9], "epochs": 1e6},
    }
    (tmp_path / "laptop").write_text(yaml.safe_dump(sweep))  # a file here goes before one of ours
    for path in TRAINING:
        if path == ("replay",):
            shutil.copytree(incident, tmp_path / example(path).split()[-1])
        assert typed(example(path)), path
