"""What the runs of a sweep have come to: their state, and their points for the fit."""

import json
import math
import statistics
from pathlib import Path
from typing import Any

from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.sweep.grid import Cell, Sweep
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.run_dir import finished, held

STATES = ("done", "diverged", "running", "stopped", "waiting")


def state(cell: Cell) -> str:
    """One of STATES; `stopped` is a run that failed or was killed, and that `run` would resume."""
    if held(cell.run_dir):
        return "running"
    if gave_up(cell):
        return "diverged"
    if finished(cell.config):
        return "diverged" if math.isnan(loss(read_metrics(cell.run_dir))) else "done"
    return "stopped" if log_path(cell).exists() else "waiting"


def gave_up(cell: Cell) -> bool:
    """Whether the guard stopped the run for bad steps, as it would again."""
    return any((cell.run_dir / "incidents").glob("step-*"))


def ended(cell: Cell) -> bool:
    """Whether there is nothing left to train."""
    return finished(cell.config) or gave_up(cell)


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
    starts = json.loads((cell.run_dir / "provenance.json").read_text())["starts"]
    step_ms = [row["perf/step_ms"] for row in rows if "perf/step_ms" in row]
    parameters = parameter_counts(cell.config.model)
    seq, without_logits = cell.report.seq, cell.report.without_logits
    devices = starts[-1]["hardware"]["world_size"]
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
        "loss": math.nan if gave_up(cell) else loss(rows),
        "device_seconds": statistics.median(step_ms) / 1e3 * cell.steps * devices,
    }
