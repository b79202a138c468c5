"""What a step costs on a cluster: seconds of products, bytes and seconds of links."""

import json

import pytest
from ranks import ROOT

from sparse_gpt.config.load import load_config
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.plan.plan import make_plan
from sparse_gpt.plan.step import Cluster, gathered_elements, reduced_elements, step_cost

CONFIG = ROOT / "configs/124m.yaml"
DEFAULT = ("model.ffn=default", "activation_checkpointing=selective")


def test_a_ring_is_as_fast_as_its_slowest_border():
    assert Cluster(8, 8, link=450e9).bandwidth == 450e9
    assert Cluster(16, 8, link=450e9).bandwidth == 8 * 50e9
    assert Cluster(16, 8, link=300e9).bandwidth == 300e9
    assert Cluster(2, 1, link=450e9, network=25e9).bandwidth == 25e9


def test_each_stage_moves_what_it_must():
    size = 10**10
    moved = {s: (gathered_elements(size, s, 4), reduced_elements(size, s, 4)) for s in range(4)}
    assert moved[0] == (0, 2 * size)
    assert moved[1] == (size, 2 * size)
    assert moved[2] == (size, 4 * 2 * size)
    assert moved[3] == (4 * (2 * size - 5 * 10**8), 4 * size)
    assert gathered_elements(10**6, 3, 1) == 10**6  # is kept from the forward to the backward


def test_a_lone_rank_sends_nothing():
    cost = step_cost(Cluster(1, 8, 450e9), 2.0, gathered=10**9, reduced=10**9)
    assert (cost.links_seconds, cost.seconds) == (0, (2, 2))
    cost = step_cost(Cluster(8, 8, 450e9), 2.0, gathered=10**9, reduced=0)
    assert cost.gathered_bytes == 7 / 8 * 1e9
    assert cost.gather_seconds == pytest.approx(7 / 8 / 450)


def test_a_plan_has_the_steps_of_its_days():
    config = load_config(CONFIG, DEFAULT)
    plan = make_plan(config, 16, "H100", 0.4)
    step = plan.stages[1].step
    assert step.products_seconds * plan.steps / 86_400 == pytest.approx(plan.days)
    parameters = parameter_counts(config.model)
    assert (plan.parameters, plan.active_parameters) == (parameters.total, parameters.active)
    assert step.gathered_bytes == 2 * parameters.total * 15 / 16
    assert step.reduced_bytes == 2 * step.gathered_bytes
    exact = load_config(CONFIG, [*DEFAULT, "deepspeed.communication_data_type=fp32"])
    wide = make_plan(exact, 16, "H100", 0.4).stages[1].step
    assert wide.reduced_bytes == 2 * step.reduced_bytes


def test_gathers_that_outlast_the_products_are_warned_of():
    stage_3 = [*DEFAULT, "deepspeed={zero_optimization: {stage: 3}}", "batch.micro_batch=1"]

    def warnings(*more):
        made = make_plan(load_config(CONFIG, [*stage_3, *more]), 16, "H100", 0.4)
        return [warning for warning in made.warnings if "gathers" in warning]

    [warning] = warnings()
    assert warning.startswith("ZeRO-3's gathers take ")
    assert "all 64 blocks of each layer though a token uses 2" in warning
    assert not warnings("batch.micro_batch=16")


def test_the_command_shows_a_step_of_several_gpus(command):
    shown = command("plan", CONFIG, *DEFAULT, "--gpus", "16", "--network", "25").stdout
    for text in ("active for a token", "gathered, GB", "links at 200 GB/s", "a step, s"):
        assert text in " ".join(shown.split())
    alone = command("plan", CONFIG, "--gpus", "1").stdout
    assert "gathered, GB" not in alone
    assert "active" not in alone
    options = ("--gpus", "16", "--gpus-per-node", "16", "--json")
    found = json.loads(command("plan", CONFIG, *options).stdout)
    assert found["bytes_per_second"] == 450e9
    assert found["parameters"] == found["active_parameters"]
    assert set(found["stages"]["3"]["step"]) >= {"gather_seconds", "products_seconds"}
