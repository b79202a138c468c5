"""The `sparse-gpt` command: thin, each command calls the room that does the work.

Exit codes: 0 done, 2 bad input (one clear line), 1 failure, 75 stopped by a signal after a
checkpoint. What takes seconds to import is imported inside the command that needs it.
"""

import errno
import io
import os
import shlex
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from shutil import get_terminal_size
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from sparse_gpt.cli.config_commands import config_app
from sparse_gpt.cli.data_commands import prepare, vocab_app
from sparse_gpt.cli.evaluate_commands import evaluate, export, generate, inspect
from sparse_gpt.cli.init_command import init
from sparse_gpt.cli.plan_commands import flops, plan
from sparse_gpt.cli.shards_commands import shards_app
from sparse_gpt.cli.sweep_commands import sweep_app
from sparse_gpt.cli.terminal import Config, Json, Overrides, print_json, show
from sparse_gpt.errors import told
from sparse_gpt.files import real

if TYPE_CHECKING:
    from sparse_gpt.cluster.launcher import Launch
    from sparse_gpt.config.schema import RunConfig

app = typer.Typer(
    name="sparse-gpt",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Pretrain GPT-2-family models with sparse feed-forward networks.",
    epilog="Start with: ./scripts/quickstart",
)
app.add_typer(shards_app, name="shards")
app.add_typer(vocab_app, name="vocab")
app.add_typer(sweep_app, name="sweep")
app.add_typer(config_app, name="config")


def _print_version(asked: bool) -> None:
    if asked:
        print(f"sparse-gpt {version('sparse-gpt')}")
        raise typer.Exit


_OF_OUTPUT = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EPIPE)
Version = Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True)]


@app.callback()
def _root(asked: Version = False) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run the command line; bad input, and a file that the system refuses, end in one line and
    exit code 2."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding without a letter shows its code
        sys.stdout.reconfigure(errors="backslashreplace")
    if get_terminal_size().columns < 80:
        app.rich_markup_mode = None  # its panels cut words
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _OF_OUTPUT and error.filename is None:
            error.filename = "the output"
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # it is flushed once more at the end
        if isinstance(error, BrokenPipeError):  # who reads it has enough
            sys.exit(1)
        if (line := told(error)) is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


app.command(epilog="Example: sparse-gpt init run.yaml --data books --size d64")(init)
app.command(epilog="Example: sparse-gpt prepare books/*.txt corpus.jsonl --out shards/books")(
    prepare
)


@app.command(epilog="Example: sparse-gpt train tiny-sparse duration.steps=10")
def train(
    config: Config,
    overrides: Overrides = None,
    devices: Annotated[
        int | None,
        typer.Option(
            min=1, help="Ranks on this machine.", show_default="all GPUs, or 1 on the CPU"
        ),
    ] = None,
    hostfile: Annotated[
        Path | None,
        typer.Option(
            help="Run on the hosts of this DeepSpeed hostfile.", show_default="on this machine"
        ),
    ] = None,
    master_port: Annotated[
        int | None,
        typer.Option(
            min=1, max=65535, help="Port where the ranks meet.", show_default="a free one"
        ),
    ] = None,
    restarts: Annotated[
        int, typer.Option(min=0, help="Start again after a crash, so many times at most.")
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run; start and write nothing.")
    ] = False,
    slurm: Annotated[
        bool, typer.Option("--slurm", help="Submit a job that queues itself again until done.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=1, help="With --slurm: nodes of --devices ranks.")] = 1,
    time: Annotated[
        str | None,
        typer.Option(
            help="With --slurm: limit of one stay, hours:minutes:seconds.",
            show_default="the partition's",
        ),
    ] = None,
) -> None:
    """Train under the deepspeed launcher; run again to resume from the newest checkpoint.

    Ctrl-C, SIGTERM, SIGUSR1 or a closed terminal saves a checkpoint and ends
    with exit code 75; a second Ctrl-C ends at once.

    parallel.blocks=N leaves each rank 1/N of a sparse FFN's blocks, auto what
    sparse-gpt plan finds fastest.
    """
    from sparse_gpt.cluster.hostfile import environment_files, on_hosts
    from sparse_gpt.cluster.supervise import supervise
    from sparse_gpt.cluster.this_machine import on_this_machine
    from sparse_gpt.config.load import load_config
    from sparse_gpt.errors import ConfigError
    from sparse_gpt.plan.blocks import choose, with_blocks
    from sparse_gpt.train.checks import check
    from sparse_gpt.train.deepspeed_config import deepspeed_config
    from sparse_gpt.train.run_dir import finished

    if devices and hostfile:
        raise ConfigError("--devices is for this machine and --hostfile for several: give one")
    overrides = list(overrides or [])
    if slurm:
        if hostfile or restarts or not devices:
            raise ConfigError(
                "--slurm takes --devices, the GPUs of a node; no hostfile or restarts"
            )
        run = load_config(config, overrides)
        arguments = ["--config", str(real(config)), *overrides]
        _submit(run, nodes, devices, time, arguments, dry_run)
        return
    if nodes > 1 or time:
        raise ConfigError("--nodes and --time are for --slurm; for other clusters give --hostfile")

    def start(more: Sequence[str] = ()) -> "Launch":
        arguments = ["--config", str(real(config)), *overrides, *more]
        if hostfile:
            return on_hosts(hostfile, arguments, master_port)
        return on_this_machine(devices, arguments, master_port)

    launch = start()
    for path in environment_files() if launch.remote else []:
        print(f"{path}: its settings go to the ranks of all hosts", file=sys.stderr)
    run = load_config(config, overrides)
    if run.parallel.blocks == "auto":
        blocks, why = choose(run, launch.world_size, launch.world_size // max(1, len(launch.hosts)))
        print(why, file=sys.stderr)
        run = with_blocks(run, blocks)
        launch = start([f"parallel.blocks={blocks}"])
    check(run, launch.world_size)
    if dry_run:
        print(launch)
        print_json(deepspeed_config(run, launch.world_size))
        return
    if finished(run):
        print(f"{run.run_dir}: this run is finished; see it with sparse-gpt compare")
        return
    again = shlex.join(["sparse-gpt", *sys.argv[1:]])
    patience = run.fault.timeout_seconds
    sys.exit(supervise(launch, Path(run.run_dir), restarts, patience, again))


def _submit(
    run: "RunConfig",
    nodes: int,
    devices: int,
    time_limit: str | None,
    arguments: list[str],
    dry_run: bool,
) -> None:
    from sparse_gpt.cluster.slurm import submit, train_script
    from sparse_gpt.train.checks import check

    check(run, nodes * devices, here=False)
    run_dir = Path(run.run_dir)
    script = train_script(run_dir, nodes, devices, time_limit, arguments)
    print(script if dry_run else submit(run_dir / "train.sbatch", script))


@app.command(epilog="Example: sparse-gpt replay runs/tiny-sparse/incidents/step-00000012")
def replay(
    incident: Annotated[Path, typer.Argument(help="A folder incidents/step-N of a run.")],
    as_json: Json = False,
) -> None:
    """Run the step that stopped a run again, here: does it go wrong, and for which samples."""
    from sparse_gpt.train.replay import replay, replay_json, replay_table

    found = replay(incident)
    if as_json:
        print_json(replay_json(found))
        return
    show(replay_table(found))
    print(found.verdict)


@app.command(
    "prove-resume",
    epilog="Example: sparse-gpt prove-resume quickstart-sparse --steps 5",
)
def prove(
    config: Config,
    overrides: Overrides = None,
    steps: Annotated[
        int, typer.Option(min=2, help="N: the run is killed after N of 2N steps.")
    ] = 10,
    devices: Annotated[int, typer.Option(min=1, help="w: ranks of the run.")] = 2,
    other_devices: Annotated[int, typer.Option(min=1, help="w′: ranks that take it over.")] = 1,
    out: Annotated[
        Path | None,
        typer.Option(
            help="A new folder for the runs.",
            show_default="runs/<name of the file>-resume-proof",
        ),
    ] = None,
) -> None:
    """Kill a run and resume it, on as many ranks and on others; exit 1 unless nothing changed."""
    from sparse_gpt.cluster.prove_resume import TOLERANCE, Proof

    folder = out or Path("runs") / f"{config.stem}-resume-proof"
    proof = Proof(config, overrides or [], folder, steps, devices)
    proof.train()
    found = [proof.resumed("cut", devices), proof.resumed("elastic", other_devices)]
    if proof.blocks != 1:
        found.append(proof.resumed("unshared", devices, shared=False))
    table = Table(
        "run", "ranks", "same tokens", "first difference", "loss", "weights", "", box=None
    )
    for one in found:
        table.add_row(
            one.name,
            " → ".join(map(str, one.ranks)),
            "yes" if one.same_tokens else "NO",
            "none" if one.first_difference is None else f"step {one.first_difference}",
            f"{one.loss:.1e}",
            f"{one.weights:.1e}",
            "[green]✓[/]" if one.holds else "[red]✗[/]",
        )
    show(table)
    if all(one.holds for one in found):
        print(f"proved: exact on {devices} ranks, within {TOLERANCE:g} on {other_devices}")
    else:
        print("not proved: the resumed run is another one")
        sys.exit(1)


@app.command(epilog="Example: sparse-gpt compare runs/tiny-dense runs/tiny-sparse")
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Runs, or folders of runs, as a sweep's.")],
    sort: Annotated[
        Literal["loss", "flops", "speed"] | None,
        typer.Option(help="By what: the least first, NaN last.", show_default="as given"),
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV instead of a table.")] = False,
    as_json: Json = False,
) -> None:
    """Parameters, costs, loss and speed of runs side by side; ratios are to the first."""
    import csv

    from sparse_gpt.plan.compare import comparison, summaries

    found = summaries(runs, sort)
    if as_csv:
        rows = [{"run": run, **vars(summary)} for run, summary in found.items()]
        writer = csv.DictWriter(sys.stdout, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    elif as_json:
        print_json({run: vars(summary) for run, summary in found.items()})
    else:
        show(comparison(found))


app.command(epilog="Example: sparse-gpt evaluate runs/quickstart-dense runs/quickstart-sparse")(
    evaluate
)
app.command(epilog="Example: sparse-gpt generate runs/quickstart-sparse 'Elizabeth was'")(generate)
app.command(epilog="Example: sparse-gpt inspect runs/quickstart-sparse")(inspect)
app.command(epilog="Example: sparse-gpt export runs/quickstart-dense --out quickstart-gpt2")(export)


app.command(epilog="Example: sparse-gpt flops tiny-paper model.d_model=256")(flops)
app.command(epilog="Example: sparse-gpt plan 124m --gpus 8 --gpu H100")(plan)


@app.command(epilog="Example: sparse-gpt doctor")
def doctor(
    devices: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Ranks that talk to each other, one a GPU or all on the CPU.",
            show_default="all GPUs; on a CPU none",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """What this machine has, and what will not work, with the fix."""
    from dataclasses import asdict

    from sparse_gpt.cluster.doctor import examine

    findings = examine(devices)
    if as_json:
        print_json([asdict(finding) for finding in findings])
    else:
        table = Table("", "what", "found", "fix", box=None)
        marks = {"ok": "[green]ok[/]", "note": "[yellow]note[/]", "problem": "[red]problem[/]"}
        for finding in findings:
            fix = "" if finding.status == "ok" else finding.fix
            table.add_row(marks[finding.status], finding.what, finding.found, fix)
        show(table)
    if any(finding.status == "problem" for finding in findings):
        sys.exit(1)
