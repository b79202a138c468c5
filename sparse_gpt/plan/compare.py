"""Runs side by side: what each cost, what it reached, how fast it was."""

import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.table import Table

from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.costs import ffn_cost, model_report, parameter_counts, total
from sparse_gpt.train.metrics_file import read_metrics

Sort = Literal["loss", "flops", "speed"]
_FILE = "metrics.jsonl"
_MOST_COLUMNS = 3  # of runs side by side

# key of a summary -> (what the table calls it, how it prints a value)
_COLUMNS = {
    "parameters": ("parameters", "{:,.0f}"),
    "parameters_without_embeddings": ("  without embeddings", "{:,.0f}"),
    "active_parameters": ("active for a token", "{:,.0f}"),
    "active_parameters_without_embeddings": ("  without embeddings", "{:,.0f}"),
    "ffn_macs": ("MACs a token: FFN", "{:,.0f}"),
    "block_macs": ("  block", "{:,.0f}"),
    "model_macs": ("  model", "{:,.0f}"),
    "training_flops": ("training FLOPs", "{:.3g}"),
    "steps": ("steps", "{:,.0f}"),
    "first_validation_loss": ("validation loss: first", "{:.4f}"),
    "validation_loss": ("  last", "{:.4f}"),
    "tokens_per_second": ("tokens/s (median)", "{:,.0f}"),
}


@dataclass(frozen=True)
class Summary:
    """A run: costs a token in MAC-equivalents, nats of validation loss."""

    parameters: int
    parameters_without_embeddings: int
    active_parameters: int
    active_parameters_without_embeddings: int
    ffn_macs: int
    block_macs: int
    model_macs: int
    training_flops: float
    steps: int
    first_validation_loss: float | None
    validation_loss: float | None
    tokens_per_second: float


def summaries(folders: list[Path], sort: Sort | None = None) -> dict[str, Summary]:
    """One a run, by its folder: those given, and those with a step in folders given (a sweep, or
    runs/). Sorted: the least first, NaN last. Raises ConfigError for a folder without steps."""
    found = {str(run): _summary(run) for folder in folders for run in _runs(folder)}
    if sort is None:
        return found
    key = {"loss": "validation_loss", "flops": "training_flops", "speed": "tokens_per_second"}[sort]

    def place(item: tuple[str, Summary]) -> float:
        value = getattr(item[1], key)
        return math.inf if value is None or math.isnan(value) else value

    return dict(sorted(found.items(), key=place))


def _runs(folder: Path) -> list[Path]:
    if (folder / _FILE).exists():
        return [folder]
    inside = {file.parent for where in ("*", "runs/*") for file in folder.glob(f"{where}/{_FILE}")}
    return sorted(run for run in inside if _speeds(read_metrics(run))) or [folder]


def _speeds(rows: list[dict[str, Any]]) -> list[float]:
    """Of the steps; none where there is no step yet."""
    return [row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row]


def names(found: dict[str, Summary]) -> list[str]:
    """What the runs are called: their folders' names, where each has its own."""
    short = [Path(run).name for run in found]
    return short if len(set(short)) == len(short) else list(found)


def comparison(found: dict[str, Summary]) -> Table:
    """The runs as columns, each with its ratio to the first; as rows where they are many."""
    if len(found) > _MOST_COLUMNS:
        return _list(found)
    table = Table(title="Runs side by side; ratios are to the first")
    table.add_column("")
    for position, run in enumerate(names(found)):
        table.add_column(run, justify="right", overflow="fold")
        if position:
            table.add_column("ratio", justify="right")
    for key, (name, form) in _COLUMNS.items():
        cells: list[str] = []
        base = getattr(next(iter(found.values())), key)
        for position, summary in enumerate(found.values()):
            value = getattr(summary, key)
            cells.append(_cell(value, form))
            if position:
                cells.append(_cell(value / base, "{:.3f}") if value and base else "")
        table.add_row(name, *cells)
    return table


def _list(found: dict[str, Summary]) -> Table:
    table = Table(box=None)
    table.add_column("run", overflow="fold")
    shown = {"training_flops": "FLOPs", "validation_loss": "loss", "tokens_per_second": "tokens/s"}
    for title in shown.values():
        table.add_column(title, justify="right", no_wrap=True)
    for name, summary in zip(names(found), found.values(), strict=True):
        table.add_row(name, *(_cell(getattr(summary, key), _COLUMNS[key][1]) for key in shown))
    return table


def _cell(value: float | None, form: str) -> str:
    return "" if value is None else "NaN" if math.isnan(value) else form.format(value)


def _summary(run_dir: Path) -> Summary:
    metrics = run_dir / _FILE
    if not metrics.exists():
        raise ConfigError(
            f"{run_dir}: holds no metrics.jsonl; give the folder of a run, or of runs"
        )
    rows = read_metrics(run_dir)
    speeds = _speeds(rows)
    if not speeds:
        raise ConfigError(f"{metrics}: holds no step yet; train it first")
    validation = [row["val/loss"] for row in rows if "val/loss" in row] or [None]
    trained = [row["train/loss"] for row in rows if "train/loss" in row]
    if trained and math.isnan(trained[-1]):  # what was measured before it is not where it ended
        validation.append(math.nan)
    config = load_config(run_dir / "config.yaml").model
    parameters = parameter_counts(config)
    report = model_report(config)
    block, seq = report.blocks()[0], report.seq
    return Summary(
        parameters=parameters.total,
        parameters_without_embeddings=parameters.without_embeddings,
        active_parameters=parameters.active,
        active_parameters_without_embeddings=parameters.active_without_embeddings,
        ffn_macs=ffn_cost(block).mac_equivalents // seq,
        block_macs=total(block).mac_equivalents // seq,
        model_macs=report.total.mac_equivalents // seq,
        training_flops=rows[-1]["gflops"] * 1e9,
        steps=rows[-1]["step"],
        first_validation_loss=validation[0],
        validation_loss=validation[-1],
        tokens_per_second=statistics.median(speeds),
    )
