"""Sweeps: the grid, kills, forks, what fails, and what a fit shows."""

import contextlib
import csv
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import yaml
from ranks import ENVIRONMENT, ROOT, exact, sparse_gpt, start
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_gpt.data import open_shards
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.sweep.collect import point_rows
from sparse_gpt.sweep.execute import slurm_script
from sparse_gpt.sweep.grid import read_sweep
from sparse_gpt.train.checkpoint.manifest import tag_of, write_manifest
from sparse_gpt.train.metrics_file import read_metrics


@pytest.fixture
def sweep_tree(run_file):
    """Two families of one size, two budgets: two trunks with a fork each."""
    run = yaml.safe_load(run_file.read_text())
    for key in ("run_dir", "duration"):
        del run[key]
    run["optimizer"] = {"width_transfer": True}
    run["schedule"] = {"kind": "wsd", "warmup_steps": 4, "decay_fraction": 0.3}
    return {
        "run": run,
        "families": {
            "dense": {"model.ffn": {"preset": "dense", "fan_in_init": True}},
            "sparse": {"model.ffn": "default"},
        },
        "baseline": "dense",
        "sizes": {"d32": {"model.d_model": 32}},
        "budgets": [2e9, 4e9],
        "lr": [3e-3],
    }


def write(tree, path):
    path.write_text(yaml.safe_dump(tree))
    return path


def comparable(sweep):
    """The points without what time it took."""
    rows = point_rows(sweep)
    return [{key: row[key] for key in row if key != "device_seconds"} for row in rows]


def test_the_grid_shares_trunks_and_says_what_it_leaves_out(sweep_tree, tmp_path):
    sweep_tree["run"]["model"]["vocab_size"] = 50257
    sweep_tree["budgets"] = [5e10, 1e11]
    sweep_tree["sizes"]["d512"] = {"model.d_model": 512, "model.n_head": 32}
    sweep_tree["seeds"] = [0, 1]
    sweep = read_sweep(write(sweep_tree, tmp_path / "s.yaml"), tmp_path / "out")
    assert [len(chain) for chain in sweep.chains] == [2] * 4
    for trunk, fork in sweep.chains:
        assert trunk.fork_step is None
        assert trunk.config.checkpoint.at == (fork.fork_step,)
        assert fork.fork_step == int(fork.steps * 0.7)
        assert fork.own_flops == pytest.approx(0.3 * fork.training_flops, rel=0.05)
        for cell in (trunk, fork):
            assert cell.training_flops == pytest.approx(cell.budget, rel=0.05)
    assert len(sweep.left_out) == 4
    assert all("d512 at" in line and "are warm-up (2 runs)" in line for line in sweep.left_out)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["wsd", "cosine"])
def test_budgets_in_lists_share_trunks_within_a_list(sweep_tree, tmp_path, kind):
    sweep_tree["run"]["schedule"]["kind"] = kind
    flat = read_sweep(write(sweep_tree | {"budgets": [2e9, 4e9]}, tmp_path / "s.yaml"))
    one = read_sweep(write(sweep_tree | {"budgets": [[2e9, 4e9]]}, tmp_path / "s.yaml"))
    assert one.chains == flat.chains
    lists = [[4e9, 2e9], [8e9], [16e9, 12e9]]
    sweep = read_sweep(write(sweep_tree | {"budgets": lists}, tmp_path / "s.yaml"))
    chains = {chain[0].chain: chain for chain in sweep.chains if chain[0].family == "dense"}
    every = ["4e09", "2e09", "8e09", "1.6e10", "1.2e10"]
    trunks = ["4e09", "8e09", "1.6e10"] if kind == "wsd" else every
    assert list(chains) == [f"dense-d32-lr0.003-s0-{largest}" for largest in trunks]
    names = [cell.name for cell in sweep.cells]
    assert names[:5] == [f"dense-d32-lr0.003-s0-{budget}" for budget in every]
    assert len(set(names)) == len(names) == 10
    for chain in sweep.chains:
        trunk, *forks = chain
        assert trunk.fork_step is None
        assert {cell.chain for cell in chain} == {trunk.chain}
        assert trunk.config.checkpoint.at == tuple(fork.fork_step for fork in forks)
        assert trunk.budget == max(cell.budget for cell in chain)


def test_a_limit_counts_the_parameters_that_a_token_uses(sweep_tree, tmp_path):
    sweep = read_sweep(write(sweep_tree, tmp_path / "s.yaml"))
    dense, sparse = (next(c for c in sweep.cells if c.family == f) for f in ("dense", "sparse"))
    assert dense.tokens_per_parameter == dense.tokens / parameter_counts(dense.config.model)[0]
    model = sparse.config.model
    active = parameter_counts(model).active
    spectral = model.ffn.spectral
    k = spectral.top_k
    only = model.ffn.model_copy(update={"spectral": spectral.model_copy(update={"blocks": k})})
    router = model.n_layer * model.d_model * (spectral.blocks - k)
    assert active == parameter_counts(model.model_copy(update={"ffn": only}))[0] + router
    assert active < parameter_counts(model)[0]
    assert sparse.tokens_per_parameter == sparse.tokens / active
    ratio = sparse.tokens_per_parameter
    for limits, kept in (([0, ratio * 1.01], 1), ([0, ratio * 0.99], 0)):
        change = {"limits": {"tokens_per_parameter": limits}, "budgets": [sparse.budget]}
        found = read_sweep(write(sweep_tree | change, tmp_path / "s.yaml"))
        assert sum(cell.family == "sparse" for cell in found.cells) == kept


def test_a_family_has_a_largest_budget(sweep_tree, tmp_path):
    most = sorted(sweep_tree["budgets"])[-2]
    change = {"limits": {"training_flops": {"sparse": most}}}
    whole = read_sweep(write(sweep_tree, tmp_path / "s.yaml"), tmp_path)
    cut = read_sweep(write(sweep_tree | change, tmp_path / "s.yaml"), tmp_path)
    keep = {cell.name for cell in whole.cells if cell.family != "sparse" or cell.budget <= most}
    assert {cell.name for cell in cut.cells} == keep != {cell.name for cell in whole.cells}
    [line] = [line for line in cut.left_out if "its limit" in line]
    assert f"({len(whole.cells) - len(cut.cells)} runs)" in line
    for chain in cut.chains:  # each with a trunk of its own
        assert chain[0].fork_step is None
        assert chain[0].config.checkpoint.at == tuple(fork.fork_step for fork in chain[1:])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"limits": {"training_flops": {"moe": 1e9}}},
            "limits.training_flops: there is no family 'moe'; there are dense, sparse",
        ),
        ({"budget": [1]}, "budget: unknown key; did you mean 'budgets'?"),
        ({"baseline": "gelu"}, "baseline: there is no family 'gelu'; there are dense, sparse"),
        ({"lr": {"dense": [1e-3]}}, "lr: names no learning rates for family 'sparse'"),
        ({"seeds": [1, 1]}, "seeds: [1, 1] has a value twice"),
        ({"budgets": [-1.0]}, "budgets: -1 must be above 0"),
        ({"budgets": []}, "budgets: [] has an empty list"),
        ({"budgets": [[1e9], []]}, "budgets: [[1000000000.0], []] has an empty list"),
        ({"budgets": [[1e9, 2e9], [2e9]]}, "[1000000000.0, 2000000000.0, 2000000000.0] has a"),
        ({"budgets": ["much"]}, "budgets"),
        ({"sizes": {"d9": {"model.d_model": 9}}}, "d_model 9"),
        ({"sizes": {"x": {"model.width": 9}}}, "model.width: unknown key"),
        (
            {"budgets": [1e6]},
            "every run is left out; the first: dense d32 at 1e06 FLOPs: too large",
        ),
        ({"lr": []}, "lr: [] has an empty list"),
        ({"lr": {"dense": [], "sparse": [1e-3]}}, "has an empty list"),
        ({"seeds": list(range(6_000))}, "10,000 are the most"),
        (
            {"budgets": [1e300]},
            "budgets: 1e+300 for d32: steps: input should be less than or equal",
        ),
        ({None: 2}, "a key that is no text; quote it"),
    ],
)
def test_a_wrong_sweep_file_is_refused_in_one_line(sweep_tree, tmp_path, change, says):
    path = write(sweep_tree | change, tmp_path / "s.yaml")
    with pytest.raises(ConfigError) as caught:
        read_sweep(path, tmp_path / "out")
    assert says in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.long
def test_kills_change_nothing_and_a_fork_is_the_run_it_stands_for(sweep_tree, tmp_path):
    path = write(sweep_tree, tmp_path / "s.yaml")
    done = sparse_gpt("sweep", "run", path, "--out", tmp_path / "whole", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    whole = read_sweep(path, tmp_path / "whole")
    expected = comparable(whole)
    assert len(expected) == 4

    out = tmp_path / "killed"
    command = [sys.executable, "-m", "sparse_gpt", "sweep", "run", path, "--out", out]
    rng, at_work = random.Random(0), 0
    for kill in range(5):
        with (tmp_path / "killed.log").open("a") as log:
            process = start([*command, "--jobs", "2"], stdout=log, stderr=log)
        # From before the first step of this life to some after it.
        goal = logged(out) + rng.randrange(12)
        while process.poll() is None and logged(out) < goal:
            time.sleep(0.005)
        at_work += process.poll() is None
        # Every second time the ranks outlive the sweep, as when it alone runs out of memory.
        family = [
            process,
            *(psutil.Process(process.pid).children(recursive=True) if kill % 2 else ()),
        ]
        for member in family:
            with contextlib.suppress(ProcessLookupError):
                os.kill(member.pid, signal.SIGKILL)
        process.wait()
    assert at_work > 2
    done = sparse_gpt("sweep", "run", path, "--out", tmp_path / "killed", "--jobs", "2")
    assert done.returncode == 0, done.stderr
    killed = read_sweep(path, tmp_path / "killed")
    assert comparable(killed) == expected
    before = {run.name: (run / "metrics.jsonl").stat().st_mtime_ns for run in _runs(killed)}
    again = sparse_gpt("sweep", "run", path, "--out", tmp_path / "killed")
    assert again.returncode == 0
    assert {run.name: (run / "metrics.jsonl").stat().st_mtime_ns for run in _runs(killed)} == before

    fork = next(cell for cell in whole.cells if cell.fork_step and cell.family == "sparse")
    assert sparse_gpt("train", fork.config_path, f"run_dir={tmp_path / 'alone'}").returncode == 0
    assert exact(tmp_path / "alone") == exact(fork.run_dir)


def logged(out):
    """Steps that the runs of a sweep have in their records."""
    return sum(len(read_metrics(run)) for run in (out / "runs").glob("*"))


def _runs(sweep):
    return sorted((sweep.out / "runs").iterdir())


def test_what_fails_or_diverges_is_said_and_the_rest_goes_on(command, sweep_tree, tmp_path):
    sweep_tree["families"] = {
        "dense": sweep_tree["families"]["dense"],
        "refused": {"start_from": "nowhere"},  # which is looked at when its turn comes
        "wild": {"model.ffn": "default", "optimizer.grad_clip": 0.0},
    }
    sweep_tree["families"]["refused"]["model.ffn"] = "default"
    sweep_tree["lr"] = {"dense": [3e-3], "refused": [3e-3], "wild": [1e18]}
    sweep_tree["budgets"] = [2e9]
    path = write(sweep_tree, tmp_path / "s.yaml")
    done = sparse_gpt("sweep", "run", path, "--out", tmp_path / "out", "--jobs", "3")
    assert done.returncode == 1
    assert "refused-d32-lr0.003-s0-2e09: failed with exit code 2; see" in done.stderr
    assert "wild-d32-lr1e+18-s0-2e09: diverged; it is left out of the fit" in done.stderr
    states = json.loads(
        command("sweep", "status", path, "--out", tmp_path / "out", "--json").stdout
    )
    assert [row["state"] for row in states] == ["done", "stopped", "diverged"]
    fit = command("sweep", "fit", path, "--out", tmp_path / "out")
    assert fit.returncode == 2
    assert "family 'refused' has no usable run yet (2 of 3 runs are finished)" in fit.stderr
    assert len(fit.stderr.splitlines()) == 1


def test_runs_that_cannot_be_are_said_before_the_first_starts(refused, sweep_tree, tmp_path):
    sweep_tree["families"]["sparse"]["batch.micro_batch"] = 5
    path = write(sweep_tree, tmp_path / "s.yaml")
    out = ("--out", tmp_path / "out")
    said = refused("sweep", "run", path, *out)
    assert said.count("micro_batch 5 does not divide") == 1
    assert "(in sparse-d32-lr0.003-s0-4e09, sparse-d32-lr0.003-s0-2e09)" in said
    sweep_tree["families"]["sparse"].pop("batch.micro_batch")
    sweep_tree["run"]["data"]["path"] = "nowhere"
    said = refused("sweep", "run", write(sweep_tree, path), *out)
    assert said.count("nowhere: no such folder of shards") == 1
    assert "(in" not in said  # all of them
    assert not (tmp_path / "out").exists()


def law(family, m, d):
    """The loss that the synthetic runs below have."""
    scale = {"dense": 1.0, "sparse": 0.9}[family]
    return 1.8 + scale * (60 * m**-0.3 + 25 * d**-0.25)


def pretend(cell, loss):
    """The files of a finished run that reached `loss`, as training writes them."""
    checkpoint = cell.run_dir / "checkpoints" / tag_of(cell.steps)
    checkpoint.mkdir(parents=True)
    write_manifest(checkpoint, {"step": cell.steps, "files": {}})
    rows = [
        {"step": 0, "gflops": 0, "val/loss": 9.0},
        {"step": cell.steps, "gflops": cell.training_flops / 1e9, "val/loss": loss,
         "perf/step_ms": 2e-9 * cell.training_flops / cell.steps},
    ]  # fmt: skip
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (cell.run_dir / "metrics.jsonl").write_text(text)
    start = {"hardware": {"world_size": 1}}
    (cell.run_dir / "provenance.json").write_text(
        json.dumps({"data_manifest_hash": "", "starts": [start]})
    )


@pytest.fixture
def finished_sweep(sweep_tree, tmp_path):
    sweep_tree["sizes"] = {
        f"d{d}": {"model.d_model": d, "model.n_head": d // 16} for d in (32, 64, 96, 128)
    }
    sweep_tree["budgets"] = [1e12, 2e12, 4e12]
    sweep_tree["limits"] = {"epochs": 1e6}
    return read_sweep(write(sweep_tree, tmp_path / "s.yaml"), tmp_path / "out")


@pytest.mark.slow
def test_a_fit_finds_the_multiplier_and_draws_it(command, finished_sweep, tmp_path):
    for cell in finished_sweep.cells:
        pretend(cell, law(cell.family, cell.report.forward / cell.report.seq, cell.tokens))
    out = ("--out", tmp_path / "out")
    done = command("sweep", "fit", finished_sweep.path, *out, "--resamples", "100")
    assert done.returncode == 0, done.stderr
    # (A, B) × 0.9 at equal exponents: the loss above E falls as C^-γ, γ = αβ/(α + β).
    expected = 0.9 ** (-(0.3 + 0.25) / (0.3 * 0.25))
    record = json.loads((tmp_path / "out/fit/fit.json").read_text())
    found = record["comparison"]["multipliers"]["sparse"]
    assert found["reference_compute"]["value"] == pytest.approx(expected, rel=0.08)
    assert f"{found['reference_compute']['value']:.2f} times fewer training FLOPs" in done.stdout

    with (tmp_path / "out/fit/points.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(finished_sweep.cells)
    with (tmp_path / "out/fit/multiplier_by_budget.csv").open() as file:
        measured = list(csv.DictReader(file))
    assert [float(row["budget"]) for row in measured] == [1e12, 2e12, 4e12]
    assert {row["family"] for row in measured} == {"sparse"}
    assert record["comparison"]["measured"]["sparse"]["compute"]["value"] == [
        pytest.approx(float(row["compute"])) for row in measured
    ]
    assert "sparse at 2e+12 FLOPs, from isoFLOP minima alone: best loss" in done.stdout
    for name in ("frontier", "isoflop", "multiplier", "residuals"):
        assert (tmp_path / f"out/fit/{name}.png").stat().st_size > 10_000
    frontier = _board(tmp_path / "out/fit/sparse/frontier").Scalars("scaling/loss_by_gflops")
    steps = [event.step for event in frontier]
    assert steps == sorted(set(steps))
    assert steps[0] == 1000
    assert steps[-1] == pytest.approx(4000, rel=0.1)
    points = _board(tmp_path / "out/fit/dense/points-d64").Scalars("scaling/loss_by_gflops")
    assert [event.step for event in points] == [1000, 2000, 4000]
    board = _board(tmp_path / "out/fit")
    assert set(board.Tags()["images"]) == {
        f"scaling/{name}" for name in ("frontier", "isoflop", "multiplier", "residuals")
    }
    band = _board(tmp_path / "out/fit/sparse")
    tags = [f"scaling/compute_multiplier{end}" for end in ("", "/low_80", "/high_80")]
    value, low, high = ([e.step for e in band.Scalars(tag)] for tag in tags)
    assert value == low == high  # TensorBoard draws no band otherwise
    assert all(event.value > 1 for event in band.Scalars(tags[1]))
    read = band.Scalars("scaling/measured_multiplier")
    assert [event.step for event in read] == [1000, 2000, 4000]
    assert [path.name for path in (tmp_path / "out").glob(".*")] == [".fit.lock"]


def test_fits_at_the_same_time_take_turns(finished_sweep, tmp_path):
    """As the tasks of a Slurm array draw, each when its chain is done."""
    for cell in finished_sweep.cells:
        pretend(cell, law(cell.family, cell.report.forward / cell.report.seq, cell.tokens))
    draw = "from sparse_gpt.sweep import grid, report; from pathlib import Path; import sys; " + (
        "sweep = grid.read_sweep(*map(Path, sys.argv[1:]));"
        "[report.draw_points(sweep) for _ in range(2)]"
    )
    command = [sys.executable, "-c", draw, finished_sweep.path, tmp_path / "out"]
    drawing = [subprocess.Popen(command, env=ENVIRONMENT, cwd=ROOT) for _ in range(2)]
    assert [process.wait(timeout=300) for process in drawing] == [0, 0]
    assert (tmp_path / "out/fit/fit.json").exists()


@pytest.mark.parametrize(
    ("keep", "says"),
    [
        (lambda cell: False, "no run is finished yet"),
        (lambda cell: cell.family == "dense", "family 'sparse' has no usable run yet"),
        (lambda cell: cell.budget == 1e12 and cell.size == "d32", "s.yaml: "),
        (lambda cell: cell.size == "d32", "s.yaml: "),
        (lambda cell: math.nan, "family 'dense' has no usable run yet"),
    ],
)
def test_a_fit_that_cannot_be_says_what_is_missing(command, finished_sweep, tmp_path, keep, says):
    for cell in finished_sweep.cells:
        if kept := keep(cell):
            loss = law(cell.family, cell.report.forward / cell.report.seq, cell.tokens)
            pretend(cell, loss * float(kept))
    done = command("sweep", "fit", finished_sweep.path, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert says in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "out/fit").exists()


def lead_nowhere(path):
    """Where a folder was, a link to a disk that is not there."""
    shutil.rmtree(path, ignore_errors=True)
    path.symlink_to("/no/such/disk")


@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("", lead_nowhere),
        ("checkpoints", lead_nowhere),
        ("incidents", lead_nowhere),
        ("metrics.jsonl", Path.unlink),
        ("metrics.jsonl", lambda path: (path.unlink(), path.mkdir())),
        ("metrics.jsonl", lambda path: path.write_text("{}\n")),
    ],
)
def test_a_run_that_cannot_be_read_is_said_and_neither_trained_anew_nor_left_out(
    command, sweep_tree, tmp_path, name, harm
):
    sweep = read_sweep(write(sweep_tree, tmp_path / "s.yaml"), tmp_path / "out")
    for cell in sweep.cells:
        pretend(cell, 4.0)
    harmed = sweep.cells[1]
    harm(harmed.run_dir / name)
    where = str(harmed.run_dir / name).rstrip("/")
    out = ("--out", tmp_path / "out")

    status = command("sweep", "status", sweep.path, *out, "--json")
    assert status.returncode == 2
    assert status.stderr.startswith(f"error: {where}")
    assert status.stderr.count("\n") == 1
    states = {row["name"]: row["state"] for row in json.loads(status.stdout)}
    assert states.pop(harmed.name) == "unreadable"
    assert set(states.values()) == {"done"}

    fit = command("sweep", "fit", sweep.path, *out)
    assert fit.returncode == 2
    assert fit.stderr == status.stderr

    run = command("sweep", "run", sweep.path, *out)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1] == f"{harmed.name}: {where}" + (
        status.stderr.removeprefix(f"error: {where}").rstrip("\n")
    )
    assert not (tmp_path / "out/logs").exists()  # nothing was trained


@pytest.mark.parametrize("text", ["{", "[]", '{"seconds": {"dense d32": {"start": "soon"}}}'])
def test_a_damaged_measurement_of_time_is_said(refused, sweep_tree, tmp_path, text):
    path = write(sweep_tree, tmp_path / "s.yaml")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/calibration.json").write_text(text)
    assert "calibration.json: is damaged" in refused(
        "sweep", "plan", path, "--out", tmp_path / "out"
    )


def test_a_plan_measures_its_time(command, sweep_tree, tmp_path):
    sweep_tree["families"].pop("dense")
    sweep_tree["baseline"] = "sparse"
    path = write(sweep_tree, tmp_path / "s.yaml")
    options = ("--out", tmp_path / "out", "--json")
    assert json.loads(command("sweep", "plan", path, *options).stdout)["seconds"] is None
    done = sparse_gpt("sweep", "plan", path, *options, "--calibrate")
    found = json.loads(done.stdout)
    trunk, fork = found["runs"]
    assert 0 < fork["seconds"] < trunk["seconds"]
    assert found["seconds"] == pytest.approx(trunk["seconds"] + fork["seconds"])
    assert not (tmp_path / "out/runs").exists()


def test_an_array_has_a_task_a_chain(sweep_tree, tmp_path, monkeypatch):
    sweep = read_sweep(write(sweep_tree, tmp_path / "s.yaml"), tmp_path / "out")
    script = slurm_script(sweep, jobs=8, devices=4)
    assert "#SBATCH --array=0-1%8" in script
    assert "#SBATCH --gpus-per-node=4" in script
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    done = sparse_gpt("sweep", "run", sweep.path, "--chain", "2")
    assert done.returncode == 2
    assert "--chain 2: the sweep has chains 0 to 1" in done.stderr
    monkeypatch.setitem(ENVIRONMENT, "PATH", str(tmp_path))  # no Slurm, wherever this runs
    refused = sparse_gpt("sweep", "run", sweep.path, "--out", tmp_path / "out", "--slurm")
    assert refused.returncode == 2
    assert "there is no sbatch here" in refused.stderr


def _board(folder: Path) -> EventAccumulator:
    board = EventAccumulator(str(folder), {"scalars": 0, "images": 0})
    board.Reload()
    return board


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
