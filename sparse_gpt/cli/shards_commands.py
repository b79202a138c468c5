"""The commands about made data, `shards`, thin over the room `data`."""

import sys
from pathlib import Path
from random import randrange
from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.table import Table

from sparse_gpt.cli.terminal import Json, print_json, printable, show, unescaped

shards_app = typer.Typer(no_args_is_help=True, help="Look at tokenized data, check and convert it.")

MOST_FOUND = 20  # documents that `shards show --grep` names
MOST_SOURCES = 10  # that `shards stats` names
_MEANING = {"bytes": "bytes of text", "ids": "ids that occur"}
Folder = Annotated[str, typer.Argument(help="A folder of shards, or its URL (s3://, gs://).")]
Format = Annotated[Literal["megatron", "llmc", "nanogpt"], typer.Option(help="Whose files.")]


@shards_app.command(epilog="Example: sparse-gpt shards info shards/novels")
def info(folder: Folder, as_json: Json = False) -> None:
    """Documents, tokens and vocabulary of a folder of shards."""
    from sparse_gpt.data import open_shards
    from sparse_gpt.data.preparation.options import held_out_below
    from sparse_gpt.data.tokenizer import END_OF_TEXT

    dataset = open_shards(folder)
    manifest = dataset.manifest
    found = {
        split.name: {
            "documents": split.n_documents,
            "tokens": split.n_tokens,
            "shards": len(manifest.splits[split.name]),
        }
        for split in (dataset.train, dataset.held_out)
    }
    if as_json:
        print_json(
            {
                **found,
                "rejected": manifest.rejected,
                "tokenizer": manifest.tokenizer,
                "hash": manifest.hash,
            },
            None,
        )
        return
    vocabulary = f"{manifest.tokenizer['name']} ({manifest.tokenizer['vocab_size']:,} ids)"
    table = Table("split", title=f"{escape(folder)}: {escape(vocabulary)}, {manifest.dtype}")
    for column in ("documents", "tokens", "shards"):
        table.add_column(column, justify="right")
    for split, counts in found.items():
        table.add_row(split, *(f"{count:,}" for count in counts.values()))
    show(table)
    if manifest.options.get("cut_last"):
        share = f"{manifest.options['held_out']:g}"
        print(f"the corpus is one document: about the last {share} of it is held out")
    if moved := manifest.options.get("moved"):
        share, side = manifest.options["held_out"], "trained on"
        if int(moved, 16) >= held_out_below(share):
            side = "held out"
        print(
            f"a share of {share:g} left no document to be {side}: one is, by its hash the nearest"
        )
    if manifest.markers:
        print(
            f"documents with a literal {END_OF_TEXT} in their text: {manifest.markers:,}; it is "
            "trained on as text. Where it stands between documents: --separator with it, and "
            "--drop-separator"
        )
    if manifest.rejected:
        named_in = f"{folder.rstrip('/')}/rejected.jsonl"  # of a URL there: it is not copied
        print(f"broken documents set aside: {manifest.rejected:,}, named in {named_in}")


@shards_app.command(
    "stats", epilog="Example: sparse-gpt shards stats shards/novels --plot lengths.png"
)
def show_stats(
    folder: Folder,
    plot: Annotated[
        Path | None,
        typer.Option(
            help="Draw the documents' lengths, in tokens, into this .png, .svg or .pdf.",
            show_default="no plot",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Lengths of documents in tokens, bytes a token, and the sources."""
    from sparse_gpt.data.shards.stats import PERCENTILES, plot_lengths, statistics

    splits, sources, on_both_sides = statistics(folder, progress=not as_json)
    if plot is not None:
        plot_lengths(splits, plot)
    if as_json:
        numbers = {split.name: split.fields() for split in splits}
        print_json({**numbers, "sources": sources, "on_both_sides": on_both_sides}, None)
        return
    table = Table("", *(split.name for split in splits), title=escape(folder))
    for column in table.columns[1:]:
        column.justify = "right"
    rows = [split.fields() for split in splits]
    for name in ("documents", "tokens", "bytes", "ids"):
        table.add_row(_MEANING.get(name, name), *(f"{row[name]:,}" for row in rows))
    per_token = [row["bytes_per_token"] for row in rows]
    table.add_row("bytes a token", *("" if n is None else f"{n:.3f}" for n in per_token))
    for name in ("mean", "min", *(f"p{share}" for share in PERCENTILES), "max"):
        lengths = [row["length"].get(name) for row in rows]
        table.add_row(f"length, {name}", *("" if n is None else f"{n:,.0f}" for n in lengths))
    show(table)
    sources = sorted(sources, key=lambda row: -row.get("bytes", 0))
    print(f"{len(sources):,} source(s), the largest first:")
    files = Table("source", "side")
    files.add_column("bytes", justify="right")
    for row in sources[:MOST_SOURCES]:
        size = row.get("bytes")
        name = escape(printable(row["name"]))
        files.add_row(name, row.get("split", ""), "" if size is None else f"{size:,}")
    show(files)
    if len(sources) > MOST_SOURCES:
        rest = sum(row.get("bytes", 0) for row in sources[MOST_SOURCES:])
        print(f"and {len(sources) - MOST_SOURCES:,} more, of {rest:,} bytes; --json names them")
    if on_both_sides:
        print(
            f"held-out documents whose text is trained on too: {on_both_sides:,}; prepare with "
            "--dedup leaves them out"
        )


@shards_app.command("show", epilog="Example: sparse-gpt shards show shards/novels --grep Bennet")
def show_documents(
    folder: Folder,
    document: Annotated[
        int | None, typer.Option(metavar="N", help="This one, counted from 1.", show_default="1")
    ] = None,
    grep: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT", help=r"Where this text is; \n is a line end.", show_default="none"
        ),
    ] = None,
    random: Annotated[bool, typer.Option("--random", help="Any one.")] = False,
    split: Annotated[
        Literal["train", "held_out"], typer.Option(help="Which split's documents.")
    ] = "train",
) -> None:
    """Decode a document of a folder of shards, or find a text in them."""
    from sparse_gpt.data import open_shards, tokenizer_beside
    from sparse_gpt.errors import DataError

    if (document is not None) + (grep is not None) + random > 1:
        raise DataError("--document, --grep and --random: give one of them")
    dataset = open_shards(folder)
    source = dataset.train if split == "train" else dataset.held_out
    tokenizer = tokenizer_beside(source.folder, dataset.manifest.tokenizer)
    count = source.n_documents
    if not count:
        raise DataError(f"{folder}: has no documents in {split}")
    if grep is not None:
        found = 0
        for number in range(count):
            text = tokenizer.decode(source.document(number))
            if (at := text.find(str(unescaped(grep)))) < 0:
                continue
            around = text[max(0, at - 30) : at + len(grep) + 30]
            print(f"document {number + 1:,}: {printable(' '.join(around.split()))}")
            found += 1
            if found == MOST_FOUND:
                print(f"these are the first {found}")
                return
        if not found:
            raise DataError(f"{folder}: {grep!r} is in none of the {count:,} documents of {split}")
        return
    number = randrange(count) + 1 if random else (document or 1)
    if document is not None and not 1 <= document <= count:
        raise DataError(f"--document {document}: {split} has the documents 1 to {count}")
    ids = source.document(number - 1)
    print(f"document {number:,} of {count:,} in {split}, {len(ids):,} tokens\n")
    print(printable(tokenizer.decode(ids)))


@shards_app.command(epilog="Example: sparse-gpt shards verify shards/novels")
def verify(folder: Folder) -> None:
    """Check every hash; names the file and block of each damage, and exits 1."""
    from sparse_gpt import data

    damages = data.verify(folder, progress=True)
    for damage in damages:
        print(damage)
    if damages:
        sys.exit(1)
    print(f"{folder}: whole")


@shards_app.command(
    "export", epilog="Example: sparse-gpt shards export shards/novels --format nanogpt --out novels"
)
def export_shards(
    folder: Folder,
    format: Format,
    out: Annotated[Path, typer.Option(help="A new folder for the files.")],
    shard_tokens: Annotated[
        int, typer.Option(help="With llmc: tokens a file at most.")
    ] = 100_000_000,
) -> None:
    """Write shards as files of Megatron-LM, llm.c (modded-nanogpt's too) or nanoGPT."""
    from sparse_gpt import data

    paths = data.export_shards(folder, format, out, shard_tokens=shard_tokens, progress=True)
    for path in paths:
        print(path)


@shards_app.command(
    "import",
    epilog="Example: sparse-gpt shards import 'fineweb10B/fineweb_train_*.bin' --held-out "
    "'fineweb10B/fineweb_val_*.bin' --format llmc --out shards/fineweb",
)
def import_shards(
    sources: Annotated[
        list[str], typer.Argument(help="Token files to train on, globs, or Megatron's prefixes.")
    ],
    format: Format,
    out: Annotated[Path, typer.Option(help="A new folder for the shards.")],
    held_out: Annotated[
        list[str] | None,
        typer.Option(help="The same for validation; give it again for more.", show_default="none"),
    ] = None,
    vocab: Annotated[
        Path | None, typer.Option(help="Rank file that the ids belong to.", show_default="GPT-2's")
    ] = None,
    shard_tokens: Annotated[int, typer.Option(help="Tokens a shard at most.")] = 100_000_000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that decode and hash.")] = 1,
    as_json: Json = False,
) -> None:
    """Make shards of the files of Megatron-LM, llm.c (modded-nanogpt's too) or nanoGPT."""
    from sparse_gpt import data

    data.import_shards(
        sources,
        format,
        out,
        held_out=held_out or [],
        vocab=vocab,
        shard_tokens=shard_tokens,
        workers=workers,
        progress=not as_json,
    )
    info(str(out), as_json)
