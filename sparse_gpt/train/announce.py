"""What a run says of itself where it starts and where it ends."""

import math
import shlex
import statistics
from pathlib import Path

from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.costs import parameter_counts
from sparse_gpt.model.flops import FlopReport
from sparse_gpt.progress import duration
from sparse_gpt.train.checkpoint.manifest import tag_of
from sparse_gpt.train.distributed import World
from sparse_gpt.train.metrics_file import read_metrics


def beginning(config: RunConfig, world: World, report: FlopReport, step: int) -> None:
    """Print what starts after `step` completed steps: model, devices, length, cost, and where."""
    steps, batch = config.total_steps, config.batch.global_tokens
    flops = report.training / report.seq * batch
    goes_on = f"resuming from step {step:,} of {steps:,}" if step else "from the beginning"
    begun = f", with the weights of {config.start_from}" if config.start_from and not step else ""
    epochs = f", {config.duration.epochs:g} times the data" if config.duration.epochs else ""
    ranks, blocks = f"{world.size} rank{'s' * (world.size > 1)}", config.parallel.blocks
    shared = f", blocks over {blocks}" if blocks != 1 else ""
    print(
        f"run      {config.run_dir}: {goes_on}{begun}\n"
        f"model    {parameter_counts(config.model)}\n"
        f"devices  {ranks}{shared}, {world.device.type}, {config.precision}\n"
        f"length   {steps:,} steps of {batch:,} tokens, {steps * batch:,} tokens{epochs}\n"
        f"compute  {steps * flops:.3g} training FLOPs{_expected(config, steps - step)}",
        flush=True,
    )


def _expected(config: RunConfig, steps: int) -> str:
    """The time that is left, by the steps that the run's record has already."""
    rows = read_metrics(Path(config.run_dir))
    took = [row["perf/step_ms"] for row in rows[-100:] if "perf/step_ms" in row]
    if not took:
        return "; the time left (ETA) is in each line, once steps are measured"
    left = duration(statistics.median(took) / 1e3 * steps)
    return f"; about {left} left, by the median of the last {len(took)} logged steps"


def ending(config: RunConfig, run_dir: Path) -> float | None:
    """Print what a finished run has come to, where it lies and what can be done with it; its last
    loss, on validation where there is one. Nothing is printed of a run that has ended in NaN."""
    rows = read_metrics(run_dir)
    named = {"validation": "val/loss", "training": "train/loss"}
    found = {
        what: [(row[tag], row["step"]) for row in rows if tag in row] for what, tag in named.items()
    }
    what = "validation" if found["validation"] else "training"
    losses = found[what]
    if not losses:
        return None
    last = float(losses[-1][0])
    if math.isfinite(last):
        best, at = min(pair for pair in losses if math.isfinite(pair[0]))
        run = shlex.quote(str(run_dir))
        evaluate = f"         sparse-gpt evaluate {run}\n" if what == "validation" else ""
        print(
            f"done     {config.total_steps:,} steps: {what} loss {last:.4f}, "
            f"best {best:.4f} at step {at:,}\n"
            f"weights  {run_dir / 'checkpoints' / tag_of(config.total_steps)}\n"
            f"curves   tensorboard --logdir {run}\n"
            f"next     sparse-gpt generate {run} 'Once upon a time'\n"
            f"{evaluate}         sparse-gpt compare {run}",
            flush=True,
        )
    return last
