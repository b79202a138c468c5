#!/usr/bin/env python3
"""How fast documents become shards, against plain tiktoken and what else people use for it.

    python scripts/bench/prepare.py corpora/*.jsonl
    python scripts/bench/prepare.py corpora/*.jsonl --rounds 5 --workers 8 --json prepare.json

Every round does all of the ways once, and compares their ids with plain tiktoken's. Needs the
extras `fast` and `vocab`. From JSON Lines to:

    plain tiktoken   a file of uint16 tokens: json.loads, encode_ordinary, one thread
    prepare          shards, held out 0, each checked by `verify`: one process, both engines; then
                     with --workers, in shards of 10M tokens, so that there is a unit for each
    tokenizers       a file of uint16 tokens: Hugging Face's encode_batch, on its threads
    datasets.map     an Arrow file: load_dataset and map with tiktoken, one process
    gigatoken        ids in memory: encode_files, on its threads; writes nothing, so a ceiling
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import tiktoken
import xxhash
from tiktoken.load import load_tiktoken_bpe

from sparse_gpt.data import prepare, verify
from sparse_gpt.data.shards.format import HEADER_BYTES
from sparse_gpt.data.vocabulary import PATTERNS, VOCABULARY

# The rest is imported where it is used: prepare's workers import this file too.

EOT = 50256
Way = Callable[
    [list[str], Path], Iterator[bytes]
]  # does it; then yields the tokens it made, uint16


@lru_cache(maxsize=1)
def reference() -> tiktoken.Encoding:
    return tiktoken.Encoding(
        "gpt2",
        pat_str=PATTERNS["r50k"],
        mergeable_ranks=load_tiktoken_bpe(str(VOCABULARY)),
        special_tokens={"<|endoftext|>": EOT},
    )


def texts(files: list[str]) -> Iterator[str]:
    for path in files:
        with open(path, encoding="utf-8") as file:
            for line in file:
                yield json.loads(line)["text"]


def write(documents: Iterable[list[int]], folder: Path) -> Iterator[bytes]:
    with open(folder / "tokens.bin", "wb") as out:
        for ids in documents:
            out.write(np.array([EOT, *ids], np.uint16).tobytes())
    return read(folder / "tokens.bin")


def read(path: Path, start: int = 0) -> Iterator[bytes]:
    yield path.read_bytes()[start:]


def opened(documents: Iterable[np.ndarray]) -> Iterator[bytes]:
    for ids in documents:
        yield np.concatenate(([EOT], ids)).astype(np.uint16).tobytes()


def plain_tiktoken(files: list[str], folder: Path) -> Iterator[bytes]:
    return write(map(reference().encode_ordinary, texts(files)), folder)


def ours(engine: str, workers: int) -> Way:
    def way(files: list[str], folder: Path) -> Iterator[bytes]:
        shard_tokens = 100_000_000 if workers == 1 else 10_000_000
        manifest = prepare(
            files,
            folder / "out",
            held_out=0,
            engine=engine,
            workers=workers,
            shard_tokens=shard_tokens,
        )
        assert manifest is not None
        assert verify(folder / "out") == []
        shards = [folder / "out" / f"{shard.name}.bin" for shard in manifest.splits["train"]]
        return (block for path in shards for block in read(path, HEADER_BYTES))

    return way


def hugging_face_tokenizers() -> Way:
    import gigatoken
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    from sparse_gpt.data.train_vocab import byte_alphabet

    source = gigatoken.Tokenizer.from_tiktoken(VOCABULARY, "r50k", {})  # has merges for the ranks
    characters = {byte: character for character, byte in byte_alphabet().items()}

    def shown(token: bytes) -> str:
        return "".join(characters[byte] for byte in token)

    vocabulary = {shown(token): number for number, token in source.vocab.items()}
    merges = [(shown(left), shown(right)) for left, right in source.merges]
    bpe = Tokenizer(models.BPE(vocabulary, merges))
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERNS["r50k"]), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )

    def way(files: list[str], folder: Path) -> Iterator[bytes]:
        def documents() -> Iterator[list[int]]:
            batch: list[str] = []
            for text in texts(files):
                batch.append(text)
                if len(batch) == 1000:
                    yield from (encoding.ids for encoding in bpe.encode_batch_fast(batch))
                    batch = []
            yield from (encoding.ids for encoding in bpe.encode_batch_fast(batch))

        return write(documents(), folder)

    return way


def datasets_map(files: list[str], folder: Path) -> Iterator[bytes]:
    import datasets

    datasets.disable_progress_bars()
    encoding = reference()

    def tokenize(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {"ids": [encoding.encode_ordinary(text) for text in batch["text"]]}

    loaded = datasets.load_dataset(
        "json", data_files=files, split="train", cache_dir=str(folder / "cache")
    )
    mapped = loaded.map(
        tokenize, batched=True, remove_columns=loaded.column_names, new_fingerprint="bench"
    )
    return opened(ids for row in mapped.with_format("numpy").iter(1) for ids in row["ids"])


def gigatoken_files(files: list[str], folder: Path) -> Iterator[bytes]:
    import awkward
    import gigatoken

    engine = gigatoken.Tokenizer.from_tiktoken(VOCABULARY, "r50k", {})
    layout = awkward.to_layout(engine.encode_files(gigatoken.JsonlFileSource(files)))
    return opened(np.split(layout.content.data, layout.offsets.data[1:-1]))


def main() -> None:
    from rich.table import Table

    from sparse_gpt.cli.terminal import show
    from sparse_gpt.provenance import provenance

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", help='JSON Lines, {"text": ...} a line')
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2, help="of the rows with several")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_args()
    several = f"{options.workers} workers"
    ways: dict[str, Way] = {
        "plain tiktoken": plain_tiktoken,
        "prepare, tiktoken": ours("tiktoken", 1),
        "prepare, gigatoken": ours("gigatoken", 1),
        f"prepare, tiktoken, {several}": ours("tiktoken", options.workers),
        f"prepare, gigatoken, {several}": ours("gigatoken", options.workers),
        "tokenizers": hugging_face_tokenizers(),
        "datasets.map": datasets_map,
        "gigatoken, its file API": gigatoken_files,
    }
    megabytes = sum(Path(path).stat().st_size for path in options.files) / 1e6
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, tuple[str, int]] = {}
    for _ in range(options.rounds):
        for name, way in ways.items():
            with TemporaryDirectory(prefix="bench-") as folder:
                start = time.perf_counter()
                made = way(options.files, Path(folder))
                seconds[name].append(time.perf_counter() - start)
                digest, tokens = xxhash.xxh3_128(), 0
                for block in made:
                    digest.update(block)
                    tokens += len(block) // 2
                found[name] = digest.hexdigest(), tokens

    rows = []
    title = f"{megabytes:.1f} MB, {options.rounds} rounds: median (range)"
    table = Table("", "MB/s", "M tokens/s", "× plain tiktoken", "same ids", title=title)
    for name, times in seconds.items():
        ratios = [a / b for a, b in zip(seconds["plain tiktoken"], times, strict=True)]
        row = {
            "way": name,
            "seconds": times,
            "mb_per_second": megabytes / statistics.median(times),
            "tokens_per_second": found[name][1] / statistics.median(times),
            "speed_over_plain_tiktoken": ratios,
            "same_ids": found[name] == found["plain tiktoken"],
        }
        rows.append(row)
        table.add_row(
            name,
            f"{row['mb_per_second']:.1f}",
            f"{row['tokens_per_second'] / 1e6:.2f}",
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})",
            "yes" if row["same_ids"] else "NO",
        )
    show(table)
    if options.json:
        report = {"megabytes": megabytes, "rows": rows, "provenance": provenance()}
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
