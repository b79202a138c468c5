"""Runs on several data sets: shares, resumes, losses by source, caps, changes of the data."""

import json
import shutil
from itertools import islice

import numpy as np
import pytest
import torch
import xxhash
from ranks import ROOT, finish, metrics, sparse_gpt, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_gpt.config.load import load_config
from sparse_gpt.data import Batches, open_blend, prepare, train_vocab
from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checks import check_run_dir
from sparse_gpt.train.feed import held_out, open_data, read_from, train_batches


def hashes(run_dir):
    return {row["step"]: row.get("data/batch_hash") for row in metrics(run_dir)}


def batch_hash(batch):
    """As `train.loop.batch_hash`, on one rank."""
    rows = batch.windows.numpy()
    return sum(xxhash.xxh3_64_intdigest(row.tobytes()) % 2**43 for row in rows) % 2**53


def test_a_blend_trains_resumes_elsewhere_and_changes_only_on_request(
    refused, blend_file, pair, tmp_path
):
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
        error = refused(*further, other)
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


def test_any_ranks_read_the_same_global_batches_from_any_sample(blend_file):
    config = load_config(blend_file)
    blend = open_data(config.data)
    assert len(blend.sources) == 2
    [whole] = islice(train_batches(config, blend, 1, start=48), 1)
    parts = [next(iter(train_batches(config, blend, 4, rank, start=48))) for rank in range(4)]
    assert torch.equal(torch.stack([p.windows for p in parts], 1).flatten(0, 1), whole.windows)
    assert whole.samples.tolist() == list(range(48, 64))
    assert whole.documents is None
    masked = load_config(blend_file, ["model.document_mask=true"])
    assert next(iter(train_batches(masked, blend, 1))).documents is not None


def test_batches_are_read_ahead_as_they_are(world, run_file):
    config = load_config(run_file)
    blend = open_data(config.data)
    ahead = read_from(config, blend, world, 32)
    for batch, expected in zip(
        islice(ahead, 5), train_batches(config, blend, 1, start=32), strict=False
    ):
        assert torch.equal(batch.windows, expected.windows)
    ahead.close()


def test_any_ranks_validate_on_the_same_windows(run_file):
    config = load_config(run_file, ["eval.max_tokens=3000"])
    split = open_data(config.data).sources[0].dataset.held_out

    def windows(world_size):
        batches = [list(held_out(config, split, world_size, rank)) for rank in range(world_size)]
        assert len({len(own) for own in batches}) == 1  # ZeRO-3 gathers weights in each
        return sorted(n for own in batches for b in own for n in b.samples.tolist() if n >= 0)

    assert windows(1) == windows(2) == windows(4)
    assert len(windows(1)) == 3000 // 32
