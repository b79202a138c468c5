import json

from ranks import run_on_ranks

from sparse_gpt.train.votes import Votes

VOTING = """
import json, os
from sparse_gpt.train.distributed import join_world
from sparse_gpt.train.votes import Votes

world = join_world()
votes, second = Votes(world), world.rank == 1
print(json.dumps([
    votes.cast(second, False),  # nobody was asked before
    votes.cast(False, False),
    votes.cast(False, not second),
    votes.cast(False, False),
    votes.now(second),
    votes.cast(False),  # what was open before `now` is dropped
    votes.cast(second),
    votes.gather({"rank": world.rank}),
]))
os._exit(0)
"""


def test_a_flag_of_any_rank_counts_on_all_at_the_step_after():
    first, second = (json.loads(output) for output in run_on_ranks(VOTING))
    assert first == second
    *flags, gathered = first
    assert flags == [None, [True, False], [False, False], [False, True], [True], None, [False]]
    assert gathered == [{"rank": 0}, {"rank": 1}]


def test_a_rank_alone_has_its_own_way(world):
    votes = Votes(world)
    assert votes.cast(True, False) is None
    assert votes.cast(False, True) == [True, False]
    assert votes.now(True) == [True]
    assert votes.cast(False) is None
    assert votes.gather("mine") == ["mine"]
