"""Blocks over ranks: a step is what it is without, to rounding, and so is what is saved."""

import json
import re
from pathlib import Path

import pytest
from ranks import run_on_ranks, stage

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
