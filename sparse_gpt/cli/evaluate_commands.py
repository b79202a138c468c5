"""The commands about trained models, thin over the room `evaluate`."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.table import Table

from sparse_gpt.cli.terminal import Json, print_json, show, unescaped
from sparse_gpt.errors import ConfigError

if TYPE_CHECKING:
    from sparse_gpt.evaluate.generate import Continuation

_NAMES = "a run (its newest whole checkpoint), RUN@STEP, or an exported folder."
Checkpoint = Annotated[str, typer.Argument(help=f"{_NAMES[0].upper()}{_NAMES[1:]}")]


def evaluate(
    checkpoints: Annotated[list[str], typer.Argument(help=f"Each {_NAMES}")],
    data: Annotated[
        list[str] | None,
        typer.Option(
            help="A folder of shards; give it again for more.", show_default="the run's own"
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Tokens of each data set at most.",
            show_default="the run's, or all of --data",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="Tasks of lm-eval, with commas between: hellaswag,lambada_openai.",
            show_default="none",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="A folder of task files of your own.", show_default="none"),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(min=0, help="Examples before each question.", show_default="the task's"),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Documents of each task at most.", show_default="all"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Held-out loss, perplexity and bits a byte of checkpoints, by data set; or scores of tasks.

    They are kept in the run, and drawn in TensorBoard.
    """
    from sparse_gpt.evaluate.checkpoint import load_trained
    from sparse_gpt.evaluate.held_out import evaluate, evaluation_json, evaluation_table
    from sparse_gpt.evaluate.record import check_kept, record

    held_out, scores = [], {}
    for name in checkpoints:
        trained = load_trained(name)
        check_kept(trained)
        if data or not tasks:
            found = evaluate(trained, data or [], max_tokens)
            held_out += found
            record(trained, {one.data: one.scores for one in found})
        if tasks:
            try:
                from sparse_gpt.evaluate.benchmarks import run_tasks
            except ImportError:
                raise ConfigError("--tasks needs: pip install 'sparse-gpt[eval]'") from None

            wanted = [task for task in tasks.split(",") if task]
            scores[trained.name] = run_tasks(trained, wanted, include_path, num_fewshot, limit)
            record(trained, scores[trained.name])
    if as_json:
        print_json({"held_out": evaluation_json(held_out), "tasks": scores})
        return
    if held_out:
        show(evaluation_table(held_out))
    if scores:
        show(_score_table(scores))


def _score_table(scores: "dict[str, dict[str, dict[str, float]]]") -> Table:
    """A row a task and metric, a column a checkpoint."""
    table = Table("task", "metric", *scores, box=None)
    rows = {(task, metric) for of in scores.values() for task in of for metric in of[task]}
    for task, metric in sorted(rows):
        values = [of.get(task, {}).get(metric) for of in scores.values()]
        table.add_row(task, metric, *("" if value is None else f"{value:.4f}" for value in values))
    return table


def generate(
    checkpoint: Checkpoint,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PROMPT]...", help="None: asked for, or all of standard input."),
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help="More prompts, one a line.", show_default="none")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens at most.")] = 256,
    temperature: Annotated[
        float, typer.Option(help="Divides logits; 0 takes the likeliest token.")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(help="Of so many likeliest tokens.", show_default="all")
    ] = None,
    top_p: Annotated[
        float, typer.Option(help="Of the likeliest tokens that reach this probability together.")
    ] = 0.95,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1: tokens that came before are less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None,
        typer.Option(help="Text that ends it; give it again for more.", show_default="none"),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Continuations of each prompt.")] = 1,
    seed: Annotated[
        int | None,
        typer.Option(help="The same text for the same seed.", show_default="another each time"),
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue prompts with a trained model; without one, ask for them in turn.

    Text comes as it is made. Past the context the model goes on from its latter half.
    """
    from dataclasses import asdict

    from sparse_gpt.evaluate.checkpoint import load_trained
    from sparse_gpt.evaluate.generate import generate
    from sparse_gpt.model.sampling import Sampling

    try:
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    except ValueError as error:
        raise ConfigError(f"--{str(error).replace('_', '-', 1)}") from None
    wanted = [*(prompts or []), *_lines(file)]
    ends = [text for one in stop or [] if (text := unescaped(one))]
    asked = not wanted and sys.stdin.isatty()
    if not wanted and not asked:
        wanted = [sys.stdin.read().removesuffix("\n")]
    trained = load_trained(checkpoint)

    def write(prompts: list[str]) -> "list[Continuation]":
        live = len(prompts) == samples == 1 and not as_json
        if live:
            print(prompts[0], end="", flush=True)
        every = [prompt for prompt in prompts for _ in range(samples)]
        tell = (lambda text: print(text, end="", flush=True)) if live else None
        found = generate(trained, every, max_new_tokens, sampling, ends, seed, tell)
        if live:
            print()
        return found

    if asked:
        print("Type the beginning of a text; an empty line ends.", file=sys.stderr)
        while prompt := _ask():
            write([prompt])
        return
    found = write(wanted)
    if as_json:
        print_json([asdict(one) for one in found])
    elif len(found) > 1:
        print("\n---\n".join(one.prompt + one.text for one in found))


def export(
    checkpoint: Checkpoint,
    out: Annotated[Path, typer.Option(help="A new folder.")],
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="Type of the weights.")] = "fp32",
    shard_size: Annotated[str, typer.Option(help="Size of a file of weights at most.")] = "5GB",
) -> None:
    """Write a trained model as transformers reads it: safetensors, tokenizer, model card.

    Dense models are plain GPT-2s; the code of sparse ones travels with them.
    """
    from sparse_gpt.evaluate.checkpoint import load_trained
    from sparse_gpt.evaluate.export import export
    from sparse_gpt.train.precision import DTYPES

    if not re.fullmatch(r"[1-9]\d*(\.\d+)?[KMG]i?B", shard_size):
        raise ConfigError(f"--shard-size is {shard_size!r}; it is a size as 500MB or 5GB")
    trained = load_trained(checkpoint, DTYPES["fp32"])
    export(trained, out, DTYPES[dtype], shard_size)
    print(f"{out}: {trained.name} in {dtype}; see its README.md")


def inspect(
    checkpoint: Checkpoint,
    out: Annotated[
        Path | None,
        typer.Option(help="File of the page.", show_default="inspect-STEP.html in the run"),
    ] = None,
    data: Annotated[
        str | None, typer.Option(help="A folder of shards.", show_default="the run's first")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Held-out tokens to look at.")] = 65_536,
    as_json: Json = False,
) -> None:
    """What each block of a sparse model's dictionaries does, as one HTML page.

    For every block: the tokens and contexts that use it, what it writes, what goes with it. In
    TensorBoard, too: loads and a table of blocks for each layer.
    """
    from dataclasses import asdict

    from sparse_gpt.data import open_shards
    from sparse_gpt.evaluate.checkpoint import load_trained
    from sparse_gpt.evaluate.inspect import inspect
    from sparse_gpt.evaluate.inspect_page import page
    from sparse_gpt.evaluate.record import check_kept, record_inspection
    from sparse_gpt.files import new_file
    from sparse_gpt.train.feed import open_data

    trained = load_trained(checkpoint)
    if data is None:
        source = open_data(trained.config.data).sources[0]
        folder, dataset = source.folder, source.dataset
    else:
        folder, dataset = data, open_shards(data)
    check_kept(trained)
    found = inspect(trained, folder, dataset.held_out, max_tokens)
    record_inspection(trained, found)
    if as_json:
        print_json(asdict(found))
        return
    out = out or trained.run / f"inspect-{trained.step}.html"
    with new_file(out) as aside:
        aside.write_text(page(found), encoding="utf-8")
    print(f"{out}: open it in a browser")


def _ask() -> str:
    try:
        return input("> ")
    except EOFError:
        return ""


def _lines(file: Path | None) -> list[str]:
    if file is None:
        return []
    try:
        return [line for line in file.read_text().splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read as prompts: {error}") from None
