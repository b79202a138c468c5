"""The commands that make data, `prepare` and `vocab`, thin over the room `data`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from sparse_gpt.cli.shards_commands import info
from sparse_gpt.cli.terminal import Json, print_json, unescaped

vocab_app = typer.Typer(no_args_is_help=True, help="Learn a vocabulary from a corpus.")

SOURCES = (
    "Text, JSON, JSON Lines, CSV (also .gz, .zst, .bz2, .xz) or parquet files, folders, globs, "
    "URLs of these (https://, s3://, gs://), hf:NAME[:SUBSET][:SPLIT]."
)
Pattern = Annotated[
    str, typer.Option(help="How text is split before merging: r50k, cl100k or o200k.")
]


def _conditions(texts: list[str]) -> dict[str, str]:
    from sparse_gpt.errors import DataError

    pairs = [text.partition("=") for text in texts]
    for text, (key, equals, _) in zip(texts, pairs, strict=True):
        if not (key and equals):
            raise DataError(f"--where {text}: must be KEY=VALUE")
    return {key: value for key, _, value in pairs}


def prepare(
    sources: Annotated[list[str], typer.Argument(help=SOURCES)],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    held_out: Annotated[
        float | None,
        typer.Option(
            help="Fraction of documents for validation, at least one.", show_default="0.01"
        ),
    ] = None,
    held_out_from: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Instead, all of these are for validation; repeatable.",
            show_default="none",
        ),
    ] = None,
    separator: Annotated[
        str | None,
        typer.Option(
            help=r"Split text files into documents before this text; \n is a line end.",
            show_default="a file is a document",
        ),
    ] = None,
    drop_separator: Annotated[
        bool, typer.Option("--drop-separator", help="Leave the separator out of the text.")
    ] = False,
    text_field: Annotated[
        str | None,
        typer.Option(
            help="Key of the text in JSON, or its column; a.b is b within a.", show_default="text"
        ),
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(
            metavar="FIELD",
            help="Instead, of chat turns {role, content} or {from, value}: a conversation a "
            "document, a turn as 'role: content', an empty line between.",
            show_default="text, not chats",
        ),
    ] = None,
    min_chars: Annotated[int, typer.Option(help="Characters; leave out shorter documents.")] = 0,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Leave out rows without this value; repeatable.",
            show_default="all rows",
        ),
    ] = None,
    dedup: Annotated[
        bool, typer.Option("--dedup", help="Leave out documents whose text came before.")
    ] = False,
    vocab: Annotated[
        Path | None,
        typer.Option(help="Rank file of `vocab train` or tiktoken.", show_default="GPT-2's"),
    ] = None,
    pattern: Pattern = "r50k",
    engine: Annotated[
        str, typer.Option(help="tiktoken, gigatoken (the same ids, faster), or auto.")
    ] = "auto",
    shard_tokens: Annotated[int, typer.Option(help="Tokens a shard at most.")] = 100_000_000,
    workers: Annotated[int, typer.Option(min=1, help="Processes that tokenize.")] = 1,
    max_rejected: Annotated[
        float, typer.Option(help="Fraction of documents that may be broken: they are set aside.")
    ] = 0.01,
    strict: Annotated[
        bool, typer.Option("--strict", help="Stop at the first broken document.")
    ] = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Do the I-th of N parts, on one of N machines that share --out.",
            show_default="as a Slurm array's task or RANK and WORLD_SIZE say",
        ),
    ] = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="Add to a finished corpus what is not in it; same options."),
    ] = False,
    as_json: Json = False,
) -> None:
    """Tokenize documents into shards; run again to resume."""
    from sparse_gpt import data

    part = part or data.part_of_environment()
    made = data.prepare(
        sources,
        out,
        workers=workers,
        held_out=held_out,
        held_out_from=held_out_from or [],
        shard_tokens=shard_tokens,
        separator=unescaped(separator),
        keep_separator=not drop_separator,
        text_field=text_field,
        messages=messages,
        min_chars=min_chars,
        where=_conditions(where or []),
        dedup=dedup,
        vocab=vocab,
        pattern=pattern,
        engine=engine,
        max_rejected=0 if strict else max_rejected,
        part=part,
        append=append,
        progress=not as_json,
    )
    if made is not None:
        info(str(out), as_json)
    elif as_json:
        print_json({"part": part, "finished": False}, None)
    else:
        print(f"{out}: part {part} is done; the last part to end writes the manifest")


@vocab_app.command(
    "train", epilog="Example: sparse-gpt vocab train corpus.jsonl --out bpe-4096.tiktoken"
)
def train_vocab(
    sources: Annotated[list[str], typer.Argument(help=SOURCES)],
    out: Annotated[Path, typer.Option(help="Rank file, for `prepare --vocab`, same --pattern.")],
    size: Annotated[int, typer.Option(help="Ids, end of text included.")] = 4096,
    held_out: Annotated[float, typer.Option(help="As given to prepare: not learned from.")] = 0.01,
    separator: Annotated[
        str | None, typer.Option(help="As given to prepare.", show_default="a file is a document")
    ] = None,
    drop_separator: Annotated[
        bool, typer.Option("--drop-separator", help="As given to prepare.")
    ] = False,
    text_field: Annotated[
        str | None, typer.Option(help="As given to prepare.", show_default="text")
    ] = None,
    messages: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="As given to prepare.", show_default="text, not chats"),
    ] = None,
    min_chars: Annotated[int, typer.Option(help="As given to prepare.")] = 0,
    where: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE", help="As given to prepare; repeatable.", show_default="all rows"
        ),
    ] = None,
    pattern: Pattern = "r50k",
) -> None:
    """Learn a byte-level BPE vocabulary from the training documents."""
    from sparse_gpt import data

    data.train_vocab(
        sources,
        out,
        size=size,
        held_out=held_out,
        separator=unescaped(separator),
        keep_separator=not drop_separator,
        text_field=text_field,
        messages=messages,
        min_chars=min_chars,
        where=_conditions(where or []),
        pattern=pattern,
        progress=sys.stderr.isatty(),
    )
    print(f"{out}: {size} ids, sha256 {data.load_tokenizer(out).vocab_hash}")
