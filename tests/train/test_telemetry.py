"""What a run says of itself."""

import re
import textwrap
from pathlib import Path

import pytest
import torch
from ranks import exact, finish, metrics, start_ranks
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from sparse_gpt.config.load import load_config, to_yaml
from sparse_gpt.model.costs import model_report, parameter_counts
from sparse_gpt.train.distributed import World
from sparse_gpt.train.telemetry import Telemetry


@pytest.fixture
def telemetry(world, run_file, tmp_path):
    """Opens the log of a run of 120 steps that begins anew, on a rank."""

    def make(*overrides, rank=0):
        config = load_config(run_file, ["duration.steps=120", *overrides])
        world = World(rank, 0, 2, torch.device("cpu"))
        return Telemetry(config, tmp_path, world, model_report(config.model), 120, 0)

    return make


def test_a_line_says_where_the_run_is_and_how_fast(telemetry, capsys):
    with telemetry() as log:
        log.log(0, {"val/loss": 6.93147})
        log.log(
            7,
            {
                "train/loss": 6.5,
                "train/learning_rate": 3e-3,
                "train/grad_norm": 1.234,
                "perf/step_ms": 40_000.0,
                "perf/tokens_per_second": 12_345.6,
                "perf/tflops": 0.0123,
            },
        )
    first, second = capsys.readouterr().out.splitlines()
    assert first == "step   0/120  | validation loss 6.9315"
    assert second == (
        "step   7/120  loss 6.5000  lr 3.00e-03  grad 1.23  12,346 tok/s  0.012 TFLOP/s  "
        "ETA 1:15:20"
    )


def test_speed_is_of_the_steps_alone(telemetry, monkeypatch):
    """Not of what is untimed, and since the last time that it was asked for."""
    now = iter([100.0, 101.0, 101.5, 102.0, 112.0, 113.5, 117.5])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    with telemetry() as log:  # at 100 s
        with log.data_wait():  # 101 to 101.5 s
            pass
        with log.untimed():  # 102 to 112 s
            pass
        speed = log.speed(2)  # at 113.5 s: 3.5 seconds of training
        assert speed["perf/step_ms"] == pytest.approx(1750)
        assert speed["perf/data_wait_ms"] == pytest.approx(250)
        assert speed["perf/tokens_per_second"] == pytest.approx(2 * 512 / 3.5)
        flops = log.flops_per_step * 2 / 3.5
        assert speed["perf/tflops"] == pytest.approx(flops / 1e12)
        assert "perf/mfu" not in speed
        later = log.speed(6)  # at 117.5 s
        assert later["perf/step_ms"] == pytest.approx(1000)
        assert later["perf/data_wait_ms"] == 0


def test_rows_count_tokens_and_flops_and_are_drawn_against_compute(telemetry, tmp_path):
    with telemetry() as log:
        for step in range(3):
            log.log(step, {"train/loss": 7.0 - step})
        per_step = log.flops_per_step / 1e9
    rows = metrics(tmp_path)
    assert [row["tokens"] for row in rows] == [0, 512, 1024]
    assert [row["gflops"] for row in rows] == pytest.approx([0, per_step, 2 * per_step])
    assert all(row["memory/rss_gb"] > 0 for row in rows)
    board = EventAccumulator(str(tmp_path / "tensorboard"), {"scalars": 0})
    board.Reload()
    events = board.Scalars("compute/train_loss")
    assert [event.step for event in events] == [round(row["gflops"]) for row in rows]
    assert [event.value for event in events] == [7.0, 6.0, 5.0]


def layout(folder):
    """The charts of a folder's custom scalars, by group."""
    board = EventAccumulator(str(folder / "tensorboard"))
    board.Reload()
    [tensor] = board.Tensors("custom_scalars__config__")
    found = Layout.FromString(tensor.tensor_proto.string_val[0])
    return {
        group.title: {chart.title: list(chart.multiline.tag) for chart in group.chart}
        for group in found.category
    }


@pytest.mark.parametrize("ffn", ["default", "light", "dense"])
def test_the_first_view_shows_losses_and_how_blocks_are_used(telemetry, tmp_path, ffn):
    with telemetry(f"model.ffn={ffn}") as log:
        log.log(0, {"val/loss": 6.9})
    groups = layout(tmp_path)
    assert list(groups) == ["Loss", *(["Routing"] if ffn == "default" else []), "Cost"]
    if ffn == "default":
        charted = [tag for tags in groups["Routing"].values() for tag in tags]
        for name in ("load_max_over_mean", "dead_blocks", "energy_entropy"):
            tag = f"routing/block_11/{name}"
            assert sum(bool(re.fullmatch(each, tag)) for each in charted) == 1


def test_the_configuration_and_what_the_model_costs_are_there_as_text(telemetry, tmp_path):
    with telemetry("model.ffn=default"):
        pass
    board = EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    texts = {}
    for name in ("config", "model"):
        [tensor] = board.Tensors(f"{name}/text_summary")
        texts[name] = tensor.tensor_proto.string_val[0].decode()
    config = load_config(tmp_path / "small.yaml", ["duration.steps=120", "model.ffn=default"])
    assert textwrap.dedent(texts["config"]) == to_yaml(config)
    numbers = dict(re.findall(r"^\|([\w.]+)\|([\d,]+)\|$", texts["model"], re.MULTILINE))
    costs = model_report(config.model)
    assert numbers["flops.training"] == f"{costs.training / costs.seq:,.0f}"
    parts = [block["ffn.spectral"].forward / costs.seq for block in costs.blocks()]
    assert numbers["flops.ffn.spectral"] == f"{sum(parts):,.0f}"
    total, *_, active, _, _ = parameter_counts(config.model)
    assert (numbers["parameters.total"], numbers["parameters.active"]) == (
        f"{total:,}",
        f"{active:,}",
    )


def test_other_ranks_say_nothing(telemetry, tmp_path, capsys):
    before = sorted(tmp_path.iterdir())
    with telemetry(rank=1) as log:
        log.log(0, {"val/loss": 6.9})
        log.rewind(0)
    assert sorted(tmp_path.iterdir()) == before
    assert capsys.readouterr().out == ""


def test_a_disk_that_stalls_is_waited_for_and_told_of(run_file, tmp_path):
    whole, slow = tmp_path / "whole", tmp_path / "slow"
    finish(start_ranks(run_file, f"run_dir={whole}", world_size=1))
    script = Path(__file__).with_name("slow_disk_train.py")
    finish(start_ranks(run_file, f"run_dir={slow}", world_size=1, script=script))
    assert exact(slow) == exact(whole)
    waits = [row.get("perf/data_wait_ms", 0) for row in metrics(slow)]
    assert waits[10] >= 200
    assert sorted(waits)[len(waits) // 2] < 200
