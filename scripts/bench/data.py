"""Measure the data room beside nanoGPT's way and Megatron's GPTDataset: batches, and start-up.

    python scripts/bench/data.py [--json FILE]

Batches are delivered by one process on one thread from the page cache, with tokens and targets made
as int64, in the order of training (windows at random). All read the same 100M tokens, and take
turns. Start-up is the time to the first batch of a fresh process, imports not counted; Megatron's
first without, then with the index files that it keeps. Shards are real files, made in a temporary
folder by the room's own writer; those of the start-up test are sparse, with a document every 1,000
tokens, so that they fit on any disk. Megatron is left out where megatron-core is not installed.
"""

import argparse
import importlib.util
import itertools
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from rich.table import Table

from sparse_gpt.cli.terminal import show
from sparse_gpt.data import Batches, open_shards
from sparse_gpt.data.shards.format import HEADER_BYTES, FileEntry, ShardEntry, header
from sparse_gpt.data.shards.manifest import write_manifest
from sparse_gpt.data.shards.writer import ShardWriter
from sparse_gpt.data.vocabulary import Vocabulary
from sparse_gpt.provenance import provenance

VOCABULARY = Vocabulary("ab" * 32, "uint16", 50256)
DOCUMENT = 1000  # tokens
SHAPES = [(128, 32), (128, 4096), (1024, 16), (1024, 512)]  # (context, batch)
STARTS = [(1, 1_000_000), (1, 100_000_000), (100, 100_000_000)]  # (shards, tokens of each)
ROUNDS, SECONDS = 7, 0.7

Loader = Iterator[tuple[torch.Tensor, torch.Tensor]]


def ours(folder: Path, seq_len: int, batch: int) -> Loader:
    for delivered in Batches(open_shards(folder / "shards").train, seq_len, batch):
        yield delivered.tokens, delivered.targets


def nanogpt(folder: Path, seq_len: int, batch: int) -> Loader:
    """As nanoGPT's train.py makes them: a row at a time, the file mapped anew for each batch."""
    while True:
        stream = np.memmap(folder / "flat.bin", np.uint16, "r")
        starts = torch.randint(len(stream) - seq_len, (batch,)).tolist()
        rows = [stream[start : start + seq_len + 1].astype(np.int64) for start in starts]
        yield (
            torch.stack([torch.from_numpy(row[:-1]) for row in rows]),
            torch.stack([torch.from_numpy(row[1:]) for row in rows]),
        )


def megatron(folder: Path, seq_len: int, batch: int) -> Loader:
    """A sample at a time, stacked, as a DataLoader without workers does it; epoch by epoch."""
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    prefix = str(folder / "flat")
    tokenizer = SimpleNamespace(eod=50256, pad=50256, vocab_size=50257, unique_identifiers={})
    config = GPTDatasetConfig(
        random_seed=0,
        sequence_length=seq_len,
        blend=([prefix], None),
        split="1,0,0",
        path_to_cache=f"{prefix}-cache",
        tokenizer=tokenizer,
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=False,
    )
    indexed = IndexedDataset(prefix)
    documents = np.arange(len(indexed), dtype=np.int32)
    samples = len(indexed) * DOCUMENT // seq_len
    dataset = GPTDataset(indexed, prefix, documents, samples, Split.train, config)
    for first in itertools.cycle(range(0, len(dataset) - batch, batch)):
        rows = [dataset[number] for number in range(first, first + batch)]
        yield torch.stack([r["tokens"] for r in rows]), torch.stack([r["labels"] for r in rows])


LOADERS: dict[str, Callable[[Path, int, int], Loader]] = {"ours": ours, "nanogpt": nanogpt}
if importlib.util.find_spec("megatron"):
    LOADERS["megatron"] = megatron


def publish(folder: Path, shards: list[ShardEntry]) -> None:
    splits = {"train": shards, "held_out": []}
    write_manifest(folder, {"vocab_hash": VOCABULARY.hash}, VOCABULARY, {}, [], splits)


def make_tokens(folder: Path, shards: int = 4, tokens: int = 25_000_000) -> None:
    """The same random tokens as `shards/` for us and `flat` for the others."""
    random = np.random.default_rng(0)
    (folder / "shards").mkdir(parents=True)
    entries = []
    with open(folder / "flat.bin", "wb") as flat:
        for number in range(shards):
            ids = random.integers(0, 50257, tokens, dtype=np.uint16)
            flat.write(ids.data)
            writer = ShardWriter(folder / "shards", f"train-{number}", VOCABULARY)
            writer.extend(
                ids, np.full(tokens // DOCUMENT, DOCUMENT), np.zeros(tokens // DOCUMENT, np.uint64)
            )
            entries.append(writer.finish())
    publish(folder / "shards", entries)
    make_index(folder, shards * tokens)


def make_sparse(folder: Path, shards: int, tokens: int) -> None:
    """As many tokens and documents, none of which is on the disk."""
    (folder / "shards").mkdir(parents=True)
    sizes = {"bin": HEADER_BYTES + 2 * tokens, "idx": 16 * tokens // DOCUMENT}
    files = {  # hashes of the real length; opening reads none
        suffix: FileEntry(size, "0" * 64, "0" * 16 * -(-size // (4 << 20)))
        for suffix, size in sizes.items()
    }
    entries = []
    for number in range(shards):
        name = f"train-{number:05d}"
        for suffix, size in sizes.items():
            with open(folder / f"shards/{name}.{suffix}", "wb") as file:
                if suffix == "bin":
                    file.write(header(tokens, tokens // DOCUMENT, VOCABULARY))
                file.truncate(size)
        entries.append(ShardEntry(name, tokens, tokens // DOCUMENT, **files))
    publish(folder / "shards", entries)
    with open(folder / "flat.bin", "wb") as file:
        file.truncate(2 * shards * tokens)
    make_index(folder, shards * tokens)


def make_index(folder: Path, tokens: int) -> None:
    """Megatron's index of flat.bin."""
    if "megatron" not in LOADERS:
        return
    from megatron.core.datasets.indexed_dataset import _IndexWriter

    lengths = np.full(tokens // DOCUMENT, DOCUMENT, np.int32)
    with _IndexWriter(str(folder / "flat.idx"), np.uint16) as writer:
        writer.write(lengths, None, np.arange(len(lengths) + 1))


def measure_batches(folder: Path) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    rows = []
    for seq_len, batch in SHAPES:
        loaders = {name: make(folder, seq_len, batch) for name, make in LOADERS.items()}
        for loader in loaders.values():  # once over all pages, as a permutation goes
            for _ in islice(loader, 100_000_000 // (seq_len * batch)):
                pass
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(ROUNDS):
            for name, loader in loaders.items():
                count, begin = 0, time.perf_counter()
                while (spent := time.perf_counter() - begin) < SECONDS:
                    count += next(loader)[0].numel()
                rates[name].append(count / spent)
        row: dict[str, Any] = {"seq_len": seq_len, "batch": batch}
        row["tokens_per_second"] = {name: statistics.median(r) for name, r in rates.items()}
        row["ours_over"] = {}
        for name in [name for name in rates if name != "ours"]:
            ratios = [a / b for a, b in zip(rates["ours"], rates[name], strict=True)]
            row["ours_over"][name] = [statistics.median(ratios), min(ratios), max(ratios)]
        rows.append(row)
    return rows


def first_batch(name: str, folder: Path) -> dict[str, float]:
    """In this process: milliseconds, and the growth of resident memory in MiB."""
    if name == "megatron":
        import megatron.core.datasets.gpt_dataset  # noqa: F401 - before the clock starts
    before, begin = _resident(), time.perf_counter()
    next(LOADERS[name](folder, 1024, 16))
    milliseconds = (time.perf_counter() - begin) * 1e3
    return {"first_batch_ms": milliseconds, "memory_mib": (_resident() - before) / 2**20}


def _resident() -> int:
    """VmRSS, not ru_maxrss: that of a new process starts at its parent's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmRSS"))


def measure_start(folder: Path) -> dict[str, Any]:
    """Each loader in processes of its own, the best of five; Megatron's first by itself too."""
    found: dict[str, Any] = {}
    for name in LOADERS:
        command = [sys.executable, __file__, "--first-batch", name, str(folder)]
        runs = [
            json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
            for _ in range(5)
        ]
        if name == "megatron":
            found["megatron, first"] = runs.pop(0)
        found[name] = min(runs, key=lambda run: float(run["first_batch_ms"]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the numbers there")
    parser.add_argument("--first-batch", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.simplefilter("ignore")  # of Megatron, about what it does not find
    if options.first_batch:
        name, place = options.first_batch
        print(json.dumps(first_batch(name, Path(place))))
        return
    with tempfile.TemporaryDirectory() as scratch:
        make_tokens(Path(scratch) / "tokens")
        batches = measure_batches(Path(scratch) / "tokens")
        starts = []
        for shards, tokens in STARTS:
            folder = Path(scratch) / f"{shards}x{tokens}"
            make_sparse(folder, shards, tokens)
            starts.append({"tokens": shards * tokens, "shards": shards, **measure_start(folder)})
            shutil.rmtree(folder)
    others = list(batches[0]["ours_over"])
    table = Table("context", "batch", "M tokens/s", *(f"over {name}'s" for name in others))
    for row in batches:
        ratios = ("{:.1f} ({:.1f} to {:.1f})".format(*row["ours_over"][name]) for name in others)
        rate = f"{row['tokens_per_second']['ours'] / 1e6:,.0f}"
        table.add_row(f"{row['seq_len']:,}", f"{row['batch']:,}", rate, *ratios)
    show(table)
    names = [name for name in starts[0] if name not in ("tokens", "shards")]
    table = Table("tokens", *names, title="first batch: ms, MiB")
    for row in starts:
        cells = ("{first_batch_ms:,.1f}, {memory_mib:,.1f}".format(**row[name]) for name in names)
        table.add_row(f"{row['tokens']:,}", *cells)
    show(table)
    if options.json:
        found = {**provenance(), "batches": batches, "start": starts}
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
