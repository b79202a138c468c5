"""Runs on several data sets: shares, resumes, losses by source, caps, changes of the data."""

import json
import re
import shutil
from itertools import islice

import numpy as np
import pytest
import xxhash
import yaml
from ranks import ROOT, finish, metrics, sparse_gpt, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_gpt.config.load import load_config
from sparse_gpt.data import Batches, open_blend, open_shards, prepare, train_vocab
from sparse_gpt.data.batches.batches import count_windows
from sparse_gpt.data.batches.order import blend_counts
from sparse_gpt.errors import ConfigError
from sparse_gpt.sweep.grid import read_sweep
from sparse_gpt.train.checks import check_epochs, check_run_dir
from sparse_gpt.train.feed import open_data


@pytest.fixture(scope="session")
def pair(shards, tmp_path_factory):
    """Each novel by itself, in the vocabulary of `shards`."""
    folder = tmp_path_factory.mktemp("pair")
    for novel in sorted((ROOT / "data/novels").glob("*.txt")):
        prepare(
            [str(novel)],
            folder / novel.stem,
            vocab=shards.parent / "bpe",
            separator="\nChapter ",
            held_out=0.1,
        )
    return sorted(map(str, folder.iterdir()))


@pytest.fixture
def blend_file(run_file, pair):
    """`run_file` on three samples of one novel to one of the other."""
    tree = yaml.safe_load(run_file.read_text())
    tree["data"] = {"blend": {pair[0]: 0.75, pair[1]: 0.25}}
    tree["duration"] = {"steps": 8}
    tree["log"]["batch_hash"] = True
    run_file.write_text(yaml.safe_dump(tree))
    return run_file


def hashes(run_dir):
    return {row["step"]: row.get("data/batch_hash") for row in metrics(run_dir)}


def batch_hash(batch):
    """As `train.loop.batch_hash`, on one rank."""
    rows = batch.windows.numpy()
    return sum(xxhash.xxh3_64_intdigest(row.tobytes()) % 2**43 for row in rows) % 2**53


def test_a_blend_trains_resumes_elsewhere_and_changes_only_on_request(blend_file, pair, tmp_path):
    """With ZeRO-3 too, where ranks that validate on other numbers of batches would hang."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    finish(start_ranks(blend_file, f"run_dir={whole}", "deepspeed={zero_optimization: {stage: 3}}"))
    names = [path.split("/")[-1] for path in pair]
    tags = ["val/loss", *(f"val/loss/{name}" for name in names)]
    for row in (metrics(whole)[0], metrics(whole)[-1]):
        overall, *losses = (row[tag] for tag in tags)
        assert overall == pytest.approx(0.75 * losses[0] + 0.25 * losses[1])
        assert losses[0] != losses[1]
    board = EventAccumulator(str(whole / "tensorboard"), {"scalars": 0})
    board.Reload()
    assert set(tags) <= set(board.Tags()["scalars"])

    finish(start_ranks(blend_file, f"run_dir={cut}", "duration.steps=4"))
    moved = []
    for path in pair:
        moved.append(tmp_path / "moved" / path.split("/")[-1])
        shutil.copytree(path, moved[-1])
    there = f"data.blend={{{moved[1]}: 1, {moved[0]}: 3}}"
    finish(start_ranks(blend_file, f"run_dir={cut}", there, world_size=1))
    assert hashes(cut) == hashes(whole)
    assert metrics(cut)[0]["val/loss"] == pytest.approx(metrics(whole)[0]["val/loss"], rel=1e-5)
    starts = json.loads((cut / "provenance.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 4]
    assert not any("data_change" in start for start in starts)

    even = f"data.blend={{{pair[0]}: 1, {pair[1]}: 1}}"
    further = ("train", blend_file, f"run_dir={cut}", "duration.steps=12", "--devices", "1")
    for other, what in ((even, "the blend"), (f"data.path={pair[0]}", pair[0])):
        refused = sparse_gpt(*further, other)
        assert refused.returncode == 2
        [error] = refused.stderr.splitlines()
        assert f"{what} is not the data that {cut} was trained on" in error
        assert "data.allow_change=true" in error

    novel, other_ids = str(ROOT / "data/novels/persuasion.txt"), tmp_path / "other-ids"
    train_vocab([novel], tmp_path / "bpe", size=1024, progress=False)
    prepare([novel], other_ids, vocab=tmp_path / "bpe", held_out=0)
    config = load_config(blend_file, [f"run_dir={cut}", f"data.path={other_ids}"])
    for allow in (False, True):
        data = config.data.model_copy(update={"allow_change": allow})
        with pytest.raises(ConfigError, match="other-ids has another vocabulary"):
            check_run_dir(config.model_copy(update={"data": data}), open_data(data))

    went_on = sparse_gpt(*further, even, "data.allow_change=true")
    assert went_on.returncode == 0, went_on.stderr
    starts = json.loads((cut / "provenance.json").read_text())["starts"]
    before, after = (open_blend(dict(zip(pair, w, strict=True))).hash for w in ((3, 1), (1, 1)))
    assert starts[2]["data_change"] == {"sample": 8 * 16, "from": before, "to": after}
    new = Batches(open_blend(dict.fromkeys(pair, 1)), seq_len=32, global_batch=16, start=8 * 16)
    after_change = [hashes(cut)[step] for step in range(9, 13)]
    assert after_change == [batch_hash(batch) for batch in islice(new, 4)]
    last = metrics(cut)[-1]
    assert last["step"] == 12
    assert last["val/loss"] == pytest.approx(np.mean([last[tag] for tag in tags[1:]]))


def test_caps_on_epochs_say_what_would_fit(blend_file, pair):
    def check(steps, *overrides):
        config = load_config(blend_file, [f"duration.steps={steps}", *overrides])
        check_epochs(config, open_data(config.data))

    windows = count_windows(open_shards(pair[0]).train, 32)
    quotas = open_blend({pair[0]: 0.75, pair[1]: 0.25})
    place = [source.folder for source in quotas.sources].index(pair[0])
    fits = max(
        steps
        for steps in range(1, windows)
        if blend_counts(steps * 16, quotas.quotas, 0)[place] <= 1.5 * windows
    )
    capped = f"data.blend={{{pair[0]}: {{weight: 3, max_epochs: 1.5}}, {pair[1]}/: 1}}"
    check(10 * fits)
    check(fits, capped)
    with pytest.raises(ConfigError, match=rf"{pair[0]} would be read .* {fits:,} steps") as error:
        check(fits + 1, capped)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match=r"1\.5. times"):
        check(fits + 1, capped, "data.max_epochs=100")  # its own counts
    with pytest.raises(ConfigError, match="with a weight under") as error:
        check(2 * fits, capped)
    under = float(re.search(r"under ([\d.]+)", str(error.value))[1])
    check(2 * fits, capped.replace("weight: 3", f"weight: {under * 0.99}"))
    with pytest.raises(ConfigError, match="would be read"):
        check(2 * fits, capped.replace("weight: 3", f"weight: {under * 1.02}"))


def test_a_cap_is_for_one_data_set_too(run_file, shards):
    epoch = count_windows(open_shards(shards).train, 32)
    fits = epoch // 16
    config = load_config(run_file, [f"duration.steps={fits}", "data.max_epochs=1"])
    check_epochs(config, open_data(config.data))
    done = sparse_gpt("train", run_file, f"duration.steps={fits + 1}", "data.max_epochs=1")
    assert done.returncode == 2
    [error] = done.stderr.splitlines()
    assert f"{fits:,} steps ({fits * 512:,} tokens) are possible" in error
    assert "weight" not in error


def test_a_sweep_counts_epochs_of_the_source_that_is_read_first(run_file, pair, tmp_path):
    tree = yaml.safe_load(run_file.read_text())
    shared = {key: value for key, value in tree.items() if key not in ("run_dir", "duration")}
    scarce = open_shards(pair[1]).train.n_tokens
    shared["data"] = {"blend": {pair[0]: 1, pair[1]: 9}}
    shared["optimizer"] = {}
    sweep = {
        "run": shared,
        "families": {"dense": {"model.ffn": "dense"}},
        "sizes": {"small": {}},
        "budgets": [1e9, 1e13],
        "lr": [1e-3],
        "baseline": "dense",
        "limits": {"tokens_per_parameter": [0, 1e9], "epochs": 1},
    }
    (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(sweep))
    planned = read_sweep(tmp_path / "sweep.yaml", tmp_path / "out")
    assert all(cell.tokens <= scarce / 0.9 for cell in planned.cells)
    assert len(planned.cells) == 1
    [line] = planned.left_out
    assert "epochs of the data, above 1" in line
