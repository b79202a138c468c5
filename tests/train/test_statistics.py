"""How a dictionary's blocks are used: counted over all of a step, and balanced once a step."""

import json

import pytest
import torch
from ranks import run_on_ranks, stage

from sparse_gpt.model.config import DictionaryConfig
from sparse_gpt.model.ffn import BlockDictionary

TOKENS = 16 * 32  # of a step of `run_file`


def used(engine):
    """Loads and moves of every dictionary."""
    parts = engine.statistics.dictionaries.values()
    return [(part.loads.tolist(), part.moves.tolist()) for part in parts]


def step(engine, batch, *numbers):
    for number in numbers:
        engine.step(batch(number).tokens, batch(number).targets, number)
    return engine


@pytest.mark.parametrize("options", [(stage(0),), (stage(3),), (stage(2), "precision=bf16")])
def test_a_step_counts_its_tokens_and_moves_once_whatever_the_division(engine, batch, options):
    found = []
    for micro_batch in (2, 16):
        made = step(engine(f"batch.micro_batch={micro_batch}", *options), batch, 0)
        found.append(used(made))
        assert len(found[-1]) == 2
        for loads, moves in found[-1]:
            assert sum(loads) == 2 * TOKENS
            share = 2 * TOKENS / 64
            assert moves == [(load < share) - (load > share) for load in loads]
        step(made, batch, 1)
        for (loads, moves), (_, before) in zip(used(made), found[-1], strict=True):
            assert sum(loads) == 2 * TOKENS  # of this step alone
            assert {abs(now - then) for now, then in zip(moves, before, strict=True)} <= {0, 1}
    assert found[0] == found[1]
    assert {b.dtype for name, b in made.statistics.buffers.items() if "moves" in name} == {
        torch.int64
    }


def test_recomputation_counts_no_token_twice(engine, batch):
    plain = step(engine(), batch, 0, 1, 2)
    for what in ("selective", "full"):
        again = step(engine(f"activation_checkpointing={what}"), batch, 0, 1, 2)
        assert used(again) == used(plain)


def test_evaluation_moves_nothing(engine, batch):
    made = step(engine(), batch, 0)
    before = {name: value.clone() for name, value in made.statistics.buffers.items()}
    made.evaluate([batch(1)])
    assert before
    assert all(torch.equal(before[name], b) for name, b in made.statistics.buffers.items())


def test_what_is_said_of_routing_is_of_the_last_step(engine, batch):
    made = engine("model.ffn.spectral.blocks=8")
    step(made, batch, 0)
    found = made.statistics.routing()
    for number, (loads, _) in enumerate(used(made)):
        prefix = f"routing/block_{number:02}"
        assert found.pop(f"{prefix}/load_max_over_mean") == pytest.approx(max(loads) / 128)
        assert found.pop(f"{prefix}/dead_blocks") == loads.count(0)
    assert not found
    made.statistics._loads[1].copy_(torch.tensor([7, 0, 0, 1, 0, 0, 0, 0]))
    assert made.statistics.routing()["routing/block_01/load_max_over_mean"] == 7
    assert made.statistics.routing()["routing/block_01/dead_blocks"] == 6
    assert engine("model.ffn=light").statistics.routing() == {}


ON_RANKS = """
import json, os, sys, torch
from sparse_gpt.model.config import DictionaryConfig
from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.train.distributed import join_world
from sparse_gpt.train.statistics import RunningStatistics

world = join_world()
torch.manual_seed(0)
part = BlockDictionary(8, DictionaryConfig(blocks=6))
tokens = torch.randn(3, 48, 8)
statistics = RunningStatistics(part, part.state_dict().keys(), world)
said = []
for step, applied in enumerate((True, False, True)):
    statistics.begin()
    for micro_batch in tokens[step].chunk(world.size)[world.rank].chunk(2):
        part(micro_batch)
    statistics.end(applied)
    said.append([part.loads.tolist(), part.moves.tolist()])
print(json.dumps(said))
os._exit(0)
"""


def test_ranks_add_up_what_they_gave_and_move_alike_and_only_if_the_update_was_made():
    torch.manual_seed(0)
    part = BlockDictionary(8, DictionaryConfig(blocks=6))
    tokens, expected = torch.randn(3, 48, 8), []
    for number, applied in enumerate((True, False, True)):
        if applied:
            part.loads.zero_()
            part(tokens[number])
            part.balance()
        expected.append([part.loads.tolist(), part.moves.tolist()])
    assert [json.loads(said) for said in run_on_ranks(ON_RANKS)] == [expected] * 2
