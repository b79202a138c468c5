"""Runs side by side: what each cost, what it reached, how fast it was."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.costs import ffn_cost, model_report, parameter_counts, total
from sparse_gpt.train.metrics_file import read_metrics

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


def summaries(run_dirs: list[Path]) -> dict[str, Summary]:
    """One a run, by its folder. Raises ConfigError for a folder without steps."""
    return {str(run_dir): _summary(run_dir) for run_dir in run_dirs}


def comparison(found: dict[str, Summary]) -> Table:
    """The runs as columns, each with its ratio to the first."""
    table = Table(title="Runs side by side; ratios are to the first")
    table.add_column("")
    for position, run in enumerate(found):
        table.add_column(Path(run).name, justify="right")
        if position:
            table.add_column("ratio", justify="right")
    for key, (name, form) in _COLUMNS.items():
        cells: list[str] = []
        base = getattr(next(iter(found.values())), key)
        for position, summary in enumerate(found.values()):
            value = getattr(summary, key)
            cells.append("" if value is None else form.format(value))
            if position:
                cells.append(f"{value / base:.3f}" if value and base else "")
        table.add_row(name, *cells)
    return table


def _summary(run_dir: Path) -> Summary:
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        raise ConfigError(f"{run_dir}: holds no metrics.jsonl; give the folder of a run")
    rows = read_metrics(run_dir)
    speeds = [row["perf/tokens_per_second"] for row in rows if "perf/tokens_per_second" in row]
    if not speeds:
        raise ConfigError(f"{metrics}: holds no step yet; train it first")
    validation = [row["val/loss"] for row in rows if "val/loss" in row] or [None]
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
