"""Blocks over ranks on paper: what each number needs and costs, and what `auto` takes."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ranks import ROOT

from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.plan.blocks import best_by_gpus, choose, fastest, sharings, with_blocks
from sparse_gpt.plan.memory import estimate
from sparse_gpt.plan.plan import make_plan
from sparse_gpt.plan.stage import RESERVED, step_of
from sparse_gpt.plan.step import Cluster, exchange_cost

CONFIG = ROOT / "configs/124m.yaml"
BUCKET = "deepspeed.zero_optimization.reduce_bucket_size=50000000"
DEFAULT = ("model.ffn=default", BUCKET, "activation_checkpointing=none")
NODE = Cluster(8, 8, 450e9)


def run(*more):
    return load_config(CONFIG, [*DEFAULT, *more])


@given(
    st.sampled_from([2, 4, 8, 16, 64]),
    st.sampled_from([1, 2, 16]),
    st.integers(0, 10**6),
    st.integers(1, 100),
    st.booleans(),
)
def test_what_is_exchanged_grows_with_the_ranks_and_not_with_the_cluster(
    ranks, times, rows, calls, again
):
    cluster = Cluster(ranks * times, 8, 450e9, latency=0)

    def cost(over, rows=rows, again=again):
        return exchange_cost(cluster, over, rows, calls, 768, 2, 64, again)

    half, own = cost(max(2, ranks // 2)), cost(ranks)
    assert half.exchanged_bytes <= own.exchanged_bytes < 6 * rows * (768 * 2 + 2) + 10**6
    assert half.exchange_seconds <= own.exchange_seconds
    assert own.seconds == (own.exchange_seconds, own.exchange_seconds)  # nothing hides it
    if again and rows:
        assert 1.4 < own.exchanged_bytes / cost(ranks, again=False).exchanged_bytes < 2


def test_bytes_of_an_exchange_are_those_of_its_rows_gains_and_counts():
    sent = exchange_cost(NODE, 4, rows=1000, calls=2, d_model=64, width=4, blocks=8, again=False)
    forward = 1000 * 64 * 4 * 2 + 1000 * 4 + 2 * 8 * 8
    backward = 1000 * 64 * 4 * 2 + 1000 * 4
    assert sent.exchanged_bytes == (forward + backward) * 3 / 4
    # Of 16 neighbours 8 are in the node; the others are reached through a GPU's own port.
    wide = exchange_cost(Cluster(16, 8, 450e9, latency=0), 16, 1000, 2, 64, 4, 8, again=False)
    assert wide.exchange_seconds == pytest.approx(wide.exchanged_bytes * 8 / 15 / 50e9)


@pytest.mark.parametrize("stage", [0, 1, 2])
def test_a_dictionary_falls_with_its_ranks_and_one_rank_is_as_before(stage):
    config = run("precision=fp32", "batch.micro_batch=4")
    counts, alone = parameter_counts(config.model), estimate(config, 8, stage)
    assert estimate(with_blocks(config, 1), 8, stage) == alone
    rest = counts.total - counts.dictionaries
    for ranks in (2, 4, 8):
        memory = estimate(with_blocks(config, ranks), 8, stage)
        assert memory.parameters == 4 * (rest + counts.dictionaries // ranks)
        if stage < 2:
            assert memory.gradients == memory.parameters
        if stage == 0:
            assert memory.optimizer == 2 * memory.parameters
        else:  # is shared out by the stage already
            assert memory.optimizer == alone.optimizer
        assert memory.total < alone.total
        # Rows that came, their gains and places, beside what else is kept.
        kept = memory.activations - alone.activations
        assert 0 < kept < 12 * 4 * 1024 * 2 * (2 * 768 * 4 + 100)
    assert estimate(with_blocks(config, 8), 8, 3) == estimate(config, 8, 3)


def test_dictionaries_are_gathered_and_reduced_over_replicas_alone():
    config, cluster = run("batch.micro_batch=8"), Cluster(64, 8, 450e9)
    counts = parameter_counts(config.model)
    rest, one = counts.total - counts.dictionaries, step_of(config, 1, cluster)
    for ranks in (8, 64):
        shared = step_of(with_blocks(config, ranks), 1, cluster)
        others = 64 // ranks - 1
        whole = rest * 63 / 64 + counts.dictionaries / ranks * others / (64 // ranks)
        assert shared.gathered_bytes == pytest.approx(2 * whole)
        assert shared.reduced_bytes == pytest.approx(4 * whole)
        assert one.exchange_seconds == 0 < shared.exchange_seconds


def test_the_fastest_that_fits_is_taken():
    config = run("batch.micro_batch=2")
    found = sharings(config, 80 * 2**30, NODE, 1.0)
    assert list(found) == [1, 2, 4, 8]
    assert fastest(found) == 1  # NVLink carries weights once a step sooner than all rows
    least, most = (found[ranks].memory.total for ranks in (8, 1))
    assert least < most
    tight = sharings(config, (least + most) // 2 + 2**31, NODE)
    assert (tight[1].fits, tight[8].fits) == (False, True)
    assert fastest(tight) == min(n for n, sharing in tight.items() if sharing.fits)
    assert fastest(sharings(config, 2**30, NODE)) is None
    assert list(sharings(load_config(CONFIG), 80 * 2**30, NODE)) == [1]
    zero_3 = run("deepspeed.zero_optimization.stage=3")
    assert list(sharings(zero_3, 80 * 2**30, NODE)) == [1]


def test_few_tokens_on_many_gpus_pay_for_it():
    by_gpus = best_by_gpus(run("batch.micro_batch=2"), 80 * 2**30, NODE)
    assert list(by_gpus) == [2**n for n in range(1, 10)]  # 512 sequences
    assert by_gpus[8] == 1 < by_gpus[512]


def test_auto_is_told_with_its_reason():
    ranks, why = choose(run("precision=fp32", "batch.micro_batch=1"), 4, 4)
    assert why.startswith(f"parallel.blocks: auto is {ranks} of 1, 2, 4: a rank has ")
    assert choose(load_config(CONFIG), 4, 4)[0] == 1
    assert choose(run("deepspeed.zero_optimization.stage=3"), 4, 4)[0] == 1
    with pytest.raises(ConfigError, match="no number fits: 1 needs least, "):
        choose(run("batch={global_tokens: 16777216, micro_batch: 4096}"), 4, 4)


def test_a_run_that_does_not_fit_is_told_the_number_that_does():
    def plan(size):
        return make_plan(run("batch.micro_batch=1"), 8, peak_flops=1e15, memory=size)

    totals = [sharing.memory.total for sharing in plan(80 * 2**30).sharings.values()]
    warnings = plan(RESERVED + (totals[0] + totals[-1]) // 2).warnings
    assert any("set parallel.blocks to " in warning for warning in warnings)


def test_the_commands_take_auto(command, refused):
    more = [*DEFAULT, "parallel.blocks=auto"]
    shown = " ".join(command("plan", CONFIG, *more, "--gpus", "8").stdout.split())
    for text in ("Blocks over ranks in ZeRO-1", "Fastest of what fits: parallel.blocks=1"):
        assert text in shown
    found = json.loads(command("plan", CONFIG, *more, "--gpus", "8", "--json").stdout)
    assert set(found["sharings"]) == {"1", "2", "4", "8"}
    assert (found["blocks"], found["best_blocks"]) == (1, 1)
    lines = command("plan", CONFIG, *more, "--gpus", "8").stdout.splitlines()
    start = next(i for i, line in enumerate(lines) if "Blocks over ranks" in line)
    assert max(len(line.rstrip()) for line in lines[start:]) <= 60
    assert "blocks: auto" in command("config", "show", CONFIG, *more).stdout
    assert "ZeRO-3 does not take" in refused(
        "plan", CONFIG, *DEFAULT, "parallel.blocks=2", "deepspeed.zero_optimization.stage=3",
        "--gpus", "8",
    )  # fmt: skip
