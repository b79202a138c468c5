"""What the runs of a sweep have come to: their state, and their points for the fit."""

import math
import os
import statistics
from pathlib import Path
from typing import Any

from sparse_gpt.errors import ConfigError
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.sweep.grid import Cell, Sweep
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.run_dir import finished, held, read_provenance

STATES = ("done", "diverged", "running", "stopped", "waiting", "unreadable")


def state(cell: Cell) -> str:
    """One of STATES but the last; `stopped` is a run that failed or was killed, and that `run`
    would resume. Raises ConfigError or OSError, as all here do, where the run's files are there and
    cannot be read, or are damaged: it is neither trained anew nor left out of the fit."""
    if held(cell.run_dir):
        return "running"
    if ended(cell):
        return "diverged" if math.isnan(reached(cell)) else "done"
    return "stopped" if log_path(cell).exists() else "waiting"


def gave_up(cell: Cell) -> bool:
    """Whether the guard stopped the run for bad steps, as it would again."""
    incidents = cell.run_dir / "incidents"
    for place in (incidents, *incidents.parents):
        if place.is_symlink() and not place.exists():
            raise ConfigError(f"{place}: is a link to {os.readlink(place)}, which is not there")
    try:
        return any(name.startswith("step-") for name in os.listdir(incidents))
    except FileNotFoundError:
        return False


def ended(cell: Cell) -> bool:
    """Whether there is nothing left to train."""
    return gave_up(cell) or finished(cell.config)


def reached(cell: Cell) -> float:
    """The loss of a run that has ended; NaN where it diverged."""
    if gave_up(cell):
        return math.nan
    rows = read_metrics(cell.run_dir)
    if not rows or rows[-1]["step"] < cell.steps:
        raise ConfigError(
            f"{cell.run_dir / 'metrics.jsonl'}: lacks step {cell.steps}, the last of a run that is "
            "finished; put it back, or remove the run to train it again"
        )
    return loss(rows)


def log_path(cell: Cell) -> Path:
    """What the launcher of a run printed, over all its starts."""
    return cell.run_dir.parent.parent / "logs" / f"{cell.name}.log"


def loss(rows: list[dict[str, Any]]) -> float:
    """The last validation loss, NaN where training diverged: not finite, or no better than new."""
    losses = [row["val/loss"] for row in rows if "val/loss" in row]
    return losses[-1] if losses and losses[-1] < losses[0] else math.nan


def computed_flops(cell: Cell) -> float:
    """Training FLOPs that a run has done itself until now; all of them once it has ended."""
    if ended(cell):
        return cell.own_flops
    rows = read_metrics(cell.run_dir)
    inherited = cell.training_flops - cell.own_flops
    return max(0.0, (rows[-1]["gflops"] * 1e9 if rows else 0.0) - inherited)


def point_rows(sweep: Sweep) -> list[dict[str, Any]]:
    """One row a run that has ended, as `sparse_gpt.scaling.Points.from_rows` takes them."""
    return [_row(cell) for cell in sweep.cells if ended(cell)]


def _row(cell: Cell) -> dict[str, Any]:
    rows = read_metrics(cell.run_dir)
    step_ms = [row["perf/step_ms"] for row in rows if "perf/step_ms" in row]
    parameters = parameter_counts(cell.config.model)
    seq, without_logits = cell.report.seq, cell.report.without_logits
    start = read_provenance(cell.run_dir)["starts"][-1]
    try:
        devices = start["hardware"]["world_size"]
        seconds = statistics.median(step_ms) / 1e3 * cell.steps * devices if step_ms else math.nan
    except (KeyError, TypeError):
        raise ConfigError(
            f"{cell.run_dir / 'provenance.json'}: starts: the last has no hardware.world_size; put "
            "the file back, or remove the run to train it again"
        ) from None
    return {
        "family": cell.family,
        "size": cell.size,
        "trunk": cell.chain,
        "seed": cell.seed,
        "lr": cell.lr,
        "budget": cell.budget,
        "params": parameters.total,
        "params_without_embeddings": parameters.without_embeddings,
        "forward_flops": cell.report.forward / seq,
        "forward_flops_without_logits": without_logits.forward / seq,
        "training_flops": cell.training_flops,
        "training_flops_without_logits": without_logits.training / seq * cell.tokens,
        "tokens": cell.tokens,
        "loss": reached(cell),
        "device_seconds": seconds,
    }
