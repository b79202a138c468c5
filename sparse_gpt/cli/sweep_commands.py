"""`sparse-gpt sweep`: plan, run, status, fit."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from sparse_gpt.cli.terminal import Json, SweepFile, print_json, show
from sparse_gpt.progress import duration

if TYPE_CHECKING:
    from sparse_gpt.sweep.grid import Sweep

sweep_app = typer.Typer(
    no_args_is_help=True,
    help="Scaling experiments: dense against sparse over budgets of compute.",
)

Out = Annotated[
    Path | None, typer.Option(help="Folder of the sweep.", show_default="runs/<name of the file>")
]
Jobs = Annotated[int, typer.Option(min=1, help="Runs at a time.")]
Devices = Annotated[int, typer.Option(min=1, help="GPUs (on the CPU: ranks) for each run.")]


@sweep_app.command(epilog="Example: sparse-gpt sweep plan laptop --jobs 2")
def plan(
    file: SweepFile,
    out: Out = None,
    jobs: Jobs = 1,
    devices: Devices = 1,
    calibrate: Annotated[
        bool, typer.Option(help="Train a few steps of each shape first, to know the time.")
    ] = False,
    as_json: Json = False,
) -> None:
    """The grid with its FLOPs, tokens and time, and what is left out and why. Trains nothing."""
    from sparse_gpt.sweep import calibration
    from sparse_gpt.sweep.execute import Trainer
    from sparse_gpt.sweep.grid import read_sweep

    sweep = read_sweep(file, out)
    if calibrate:
        calibration.calibrate(sweep, Trainer(jobs, devices))
    seconds = calibration.estimate(sweep)
    total = None if seconds is None else sum(seconds.values()) / jobs
    if as_json:
        print_json(
            {
                "runs": [
                    {
                        "name": cell.name,
                        "steps": cell.steps,
                        "fork_step": cell.fork_step,
                        "tokens": cell.tokens,
                        "training_flops": cell.training_flops,
                        "own_flops": cell.own_flops,
                        "seconds": seconds and seconds[cell.name],
                    }
                    for cell in sweep.cells
                ],
                "left_out": sweep.left_out,
                "seconds": total,
            }
        )
        return
    show(_grid_table(sweep))
    own = sum(cell.own_flops for cell in sweep.cells)
    alone = sum(cell.training_flops for cell in sweep.cells)
    print(
        f"{len(sweep.cells)} runs in {len(sweep.chains)} chains: {own:.3g} training FLOPs", end=""
    )
    print(f" ({alone:.3g} without shared trunks)" if alone > 1.001 * own else "")
    if total is None:
        print("time: unknown; measure it with --calibrate")
    elif sweep.config.assumed:
        assumed = sweep.config.assumed
        print(
            f"time: {duration(total * jobs)} on {assumed.devices} devices at an assumed "
            f"{assumed.flops_per_second:.3g} FLOP/s each (not measured)"
        )
    else:
        print(f"time: about {duration(total)} with --jobs {jobs}, measured here")
    for line in sweep.left_out:
        print(f"left out: {line}")


@sweep_app.command(epilog="Example: sparse-gpt sweep run laptop --jobs 2")
def run(
    file: SweepFile,
    out: Out = None,
    jobs: Jobs = 1,
    devices: Devices = 1,
    chain: Annotated[
        int | None,
        typer.Option(
            help="This chain of the grid, as a task of an array does.", show_default="all"
        ),
    ] = None,
    slurm: Annotated[
        bool,
        typer.Option(
            help="Submit an array instead, a task a chain, --jobs of them at a time. Partition, "
            "time limit and the like: set SBATCH_PARTITION, SBATCH_TIMELIMIT, ..."
        ),
    ] = False,
) -> None:
    """Train what is missing; run again after any interruption. Watch it in TensorBoard."""
    import shlex
    import signal

    from sparse_gpt.sweep.execute import Trainer, run_sweep, submit_array
    from sparse_gpt.sweep.grid import read_sweep
    from sparse_gpt.sweep.plots import check_plots
    from sparse_gpt.sweep.report import draw_points
    from sparse_gpt.train.preemption import stop_signals

    check_plots()
    sweep = read_sweep(file, out)
    if slurm:
        print(submit_array(sweep, jobs, devices))
        return
    for number in stop_signals():  # they end it as Ctrl-C does
        signal.signal(number, signal.default_int_handler)
    try:
        problems = run_sweep(sweep, Trainer(jobs, devices), chain, lambda: draw_points(sweep))
    except KeyboardInterrupt:
        again = shlex.join(["sparse-gpt", *sys.argv[1:]])
        print(
            f"{sweep.out}: stopped, each run with a checkpoint; to go on: {again}", file=sys.stderr
        )
        raise
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        sys.exit(1)
    print(f"{sweep.out}: every run is done; now: sparse-gpt sweep fit {file}")


@sweep_app.command(epilog="Example: sparse-gpt sweep status laptop")
def status(file: SweepFile, out: Out = None, as_json: Json = False) -> None:
    """Every run of the sweep: waiting, running, stopped, done or diverged, and its loss.

    Where the files of a run cannot be read it says so, and exits 2.
    """
    from sparse_gpt.errors import ConfigError, told
    from sparse_gpt.sweep.collect import STATES, loss, state
    from sparse_gpt.sweep.grid import read_sweep
    from sparse_gpt.train.metrics_file import read_metrics

    sweep = read_sweep(file, out)
    found: list[dict[str, Any]] = []
    problems = []
    for cell in sweep.cells:
        try:
            rows, now = read_metrics(cell.run_dir), state(cell)
        except Exception as error:
            if (line := told(error)) is None:
                raise
            problems.append(line)
            rows, now = [], "unreadable"
        found.append(
            {
                "name": cell.name,
                "state": now,
                "step": rows[-1]["step"] if rows else 0,
                "steps": cell.steps,
                "loss": loss(rows) if now == "done" else None,
            }
        )
    if as_json:
        print_json(found)
    else:
        _show_states(found, STATES)
    if problems:
        more = f" (and so {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ConfigError(f"{problems[0]}{more}")


def _show_states(found: list[dict[str, Any]], states: Sequence[str]) -> None:
    table = Table("run", "state")
    for column in ("step", "of", "validation loss"):
        table.add_column(column, justify="right")
    for row in found:
        value = "" if row["loss"] is None else f"{row['loss']:.4f}"
        steps = f"{row['step']:,}", f"{row['steps']:,}"
        table.add_row(str(row["name"]), str(row["state"]), *steps, value)
    show(table)
    counts = {name: sum(row["state"] == name for row in found) for name in states}
    print(", ".join(f"{count} {name}" for name, count in counts.items() if count))


@sweep_app.command(epilog="Example: sparse-gpt sweep fit laptop --resamples 200")
def fit(
    file: SweepFile,
    out: Out = None,
    resamples: Annotated[int, typer.Option(min=100, help="Bootstrap refits.")] = 1000,
    as_json: Json = False,
) -> None:
    """Fit the scaling law to the finished runs; draw it in TensorBoard, PNG, CSV and JSON."""
    from sparse_gpt.errors import ConfigError
    from sparse_gpt.scaling import ScalingError
    from sparse_gpt.sweep.grid import read_sweep
    from sparse_gpt.sweep.report import fit_sweep

    try:
        report = fit_sweep(read_sweep(file, out), resamples)
    except ScalingError as error:
        raise ConfigError(f"{file}: {error}") from None
    if as_json:
        print_json(report.record, None)
        return
    for line in report.summary:
        print(line)
    print(
        f"\nSee it all:  tensorboard --logdir {report.out}   (plots also in {report.out / 'fit'})"
    )


def _grid_table(sweep: "Sweep") -> Table:
    from sparse_gpt.sweep.grid import short

    config = sweep.config
    seeds = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    table = Table(title=f"{sweep.path}: steps (tokens a parameter) by training FLOPs; {seeds}")
    table.add_column("family, size")
    for column in ("learning rates", "FLOPs a token"):
        table.add_column(column, justify="right")
    for budget in config.all_budgets:
        table.add_column(short(budget), justify="right")
    for family in config.families:
        for size in config.sizes:
            cells = [cell for cell in sweep.cells if (cell.family, cell.size) == (family, size)]
            steps = {cell.budget: cell for cell in cells}
            row = [
                f"{steps[b].steps:,} ({steps[b].tokens_per_parameter:.3g})" if b in steps else "–"
                for b in config.all_budgets
            ]
            per_token = f"{cells[0].report.training / cells[0].report.seq:,.0f}" if cells else ""
            rates = ", ".join(f"{lr:g}" for lr in config.rates(family))
            table.add_row(f"{family} {size}", rates, per_token, *row)
    return table
