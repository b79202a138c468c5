"""Blocks over ranks: a step is what it is without, to rounding, and so is what is saved."""

import json
import re
from itertools import product
from pathlib import Path

import pytest
import torch
from ranks import ENVIRONMENT, EXACT, finish, metrics, run_on_ranks, sparse_gpt, stage, start_ranks
from safetensors.torch import load_file

from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checks import check_settings

EXCHANGING = Path(__file__).with_name("exchanging.py").read_text()
TOKENS, D_MODEL, BLOCKS, LAYERS = 16 * 32, 32, 64, 2


def test_blocks_over_ranks_change_nothing_but_rounding(run_file, tmp_path):
    first, *_ = run_on_ranks(EXCHANGING, run_file, tmp_path / "checkpoints", world_size=4)
    said = json.loads(first.splitlines()[-1])
    ways = said["ways"]
    *plain, moves = ways["0 1 0"]
    assert len(ways) == 9 + 3 + 2
    for way in ways:
        if way.startswith("bf16"):
            continue
        *steps, moved = ways[way]
        assert steps == [pytest.approx(step, rel=1e-5) for step in plain]
        assert moved == moves
    assert ways["bf16 2"] == [pytest.approx(step, rel=1e-2) for step in ways["bf16 1"]]

    # No token is dropped where all want the same two blocks; and what is sent is what must be.
    assert said["skewed 2"] == [pytest.approx(step, rel=1e-5) for step in said["skewed 1"]]
    for loads in said["loads 2"]:
        assert loads == [TOKENS, TOKENS] + [0] * (BLOCKS - 2)
    assert said["exchanged 1"] == {}
    exchanged = said["exchanged 2"]
    assert exchanged.pop("perf/exchange_ms") > 0
    travelling = 2 * TOKENS / 2 / 4  # rows that the mean rank has for others: k · tokens / 2, of 4
    rows = 4 * travelling * D_MODEL * 4 + 2 * travelling * 4  # there and back, twice; with gains
    assert exchanged == {"perf/exchange_bytes": LAYERS * (rows + BLOCKS / 2 * 8)}

    assert said["left out"] == [4] * 4  # ranks, in ZeRO 0 to 2 and in bf16
    what, suspects = said["differs"].split("; suspect ")
    assert "spectral.analysis differ" in what
    assert re.findall(r"rank (\d)", suspects) == ["1", "3"]  # of two either may be wrong
    assert said["gone on"] == [pytest.approx(step, rel=1e-5) for step in said["undisturbed"]]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.blocks=3",), "3 does not divide the 64 blocks"),
        (("parallel.blocks=8",), "8 does not divide the 2 ranks; possible: 1, 2"),
        (("parallel.blocks=auto",), "auto is chosen by sparse-gpt train"),
        (("parallel.blocks=2", "model.ffn=dense"), "no blocks to share"),
        (("parallel.blocks=2", stage(3)), "use deepspeed.zero_optimization.stage: 1 or 2"),
    ],
)
def test_what_cannot_be_shared_is_one_line(run_file, overrides, message):
    with pytest.raises(ConfigError, match=message):
        check_settings(load_config(run_file, overrides), 2)


@pytest.mark.long
def test_fifty_steps_are_the_same_however_blocks_are_shared(run_file, tmp_path, monkeypatch):
    """Four ranks, in fp32; a token whose blocks are tied to the last bit may part the runs."""
    monkeypatch.delitem(ENVIRONMENT, "TORCHDYNAMO_DISABLE")
    wholes = {}
    again = ("batch.micro_batch=2",)  # two of them a step
    for stage_number, ranks, options in [
        *product((0, 1, 2), (1, 2, 4), ((),)),
        *product((0, 1, 2), (2, 4), (again,)),
        *product((1,), (2,), (("activation_checkpointing=full",), ("compile=true",))),
        (2, 4, (*again, "activation_checkpointing=selective")),
        (1, 4, ("model.document_mask=true",)),
        (1, 1, ("model.document_mask=true",)),
    ]:
        name = f"{stage_number}-{ranks}-{'-'.join(options)}"
        settings = (stage(stage_number), f"parallel.blocks={ranks}", "duration.steps=50")
        place = f"run_dir={tmp_path / name}"
        finish(start_ranks(run_file, *settings, *options, place, world_size=4))
        of_model = tuple(option for option in options if option.startswith("model."))
        found = [[row.get(tag) for tag in EXACT] for row in metrics(tmp_path / name)]
        dictionary = torch.load(
            tmp_path / name / "checkpoints/step-00000050/rank-0.pt", weights_only=True
        )["engine"]["statistics"]
        whole, balance = wholes.setdefault(of_model, (found, dictionary))
        assert len(found) == 51
        for row, expected in zip(found, whole, strict=True):
            assert row == [each and pytest.approx(each, rel=1e-5) for each in expected], name
        for key in dictionary:
            assert torch.equal(dictionary[key], balance[key]), (name, key)


@pytest.mark.long
def test_a_run_goes_on_over_other_ranks_and_its_weights_are_exported_alike(run_file, tmp_path):
    """Blocks over 2, 1, 4 of four ranks, then over 2 of two ranks: as undisturbed."""
    constant = "schedule.final_lr_ratio=1"
    finish(start_ranks(run_file, constant, f"run_dir={tmp_path / 'whole'}", world_size=4))
    exported = {}
    for steps, world_size, ranks in ((4, 4, 2), (8, 4, 1), (12, 4, 4), (16, 2, 2)):
        settings = (constant, f"parallel.blocks={ranks}", f"duration.steps={steps}")
        place = f"run_dir={tmp_path / 'run'}"
        finish(start_ranks(run_file, *settings, place, world_size=world_size))
        done = sparse_gpt("export", tmp_path / "run", "--out", tmp_path / f"gpt-{steps}")
        assert done.returncode == 0, done.stderr
        exported[steps] = load_file(tmp_path / f"gpt-{steps}" / "model.safetensors")
    rows = zip(metrics(tmp_path / "run"), metrics(tmp_path / "whole"), strict=True)
    for row, expected in rows:
        for tag in EXACT:
            if tag in row and tag in expected:  # the end of each run has a validation loss besides
                assert row[tag] == pytest.approx(expected[tag], rel=1e-5)
    done = sparse_gpt("export", tmp_path / "whole", "--out", tmp_path / "gpt-whole")
    assert done.returncode == 0, done.stderr
    whole = load_file(tmp_path / "gpt-whole" / "model.safetensors")
    assert whole.keys() == exported[16].keys()
    for key, value in whole.items():
        torch.testing.assert_close(exported[16][key], value, rtol=1e-3, atol=1e-5)
