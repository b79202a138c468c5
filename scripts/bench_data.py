"""Measure the data room: batches from page cache beside nanoGPT's way, and start-up.

    python scripts/bench_data.py [--json]

Batches are delivered by one process on one thread, with `tokens` and `targets` made as int64, in
the order of training (windows at random; a permutation here, independent draws in nanoGPT). The
two take turns over the same 100M tokens. Start-up is the time to the first batch of a fresh
process, imports not counted. Shards are real files, made in a temporary folder by the room's own
writer; those of the start-up test are sparse, so that they fit on any disk.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from data import Batches, open_shards
from data.manifest import FORMAT, MANIFEST, SPLITS, write_sealed
from data.shards import HEADER_BYTES, FileEntry, ShardEntry, ShardWriter, Vocabulary, header
from launch.provenance import provenance
from launch.terminal import show

VOCABULARY = Vocabulary("ab" * 32, "uint16", 50256)
SHAPES = [(128, 32), (128, 4096), (1024, 16), (1024, 512)]  # (context, batch)
ROUNDS, SECONDS = 7, 0.7
STARTS = [  # name, shards, tokens each
    ("1M", 1, 1_000_000),
    ("100M", 1, 100_000_000),
    ("10G", 100, 100_000_000),
    ("100G", 1000, 100_000_000),
]


def write_manifest(folder: Path, shards: list[ShardEntry]) -> None:
    fields = {
        "format": FORMAT,
        "tokenizer": {"vocab_hash": VOCABULARY.hash},
        "dtype": VOCABULARY.dtype,
        "eot": {"id": VOCABULARY.eot},
        "options": {},
        "sources": [],
        "splits": dict(zip(SPLITS, ([asdict(shard) for shard in shards], []), strict=True)),
    }
    write_sealed(folder / MANIFEST, fields)


def make_batches_folder(folder: Path, shards: int = 4, tokens: int = 25_000_000) -> None:
    random = np.random.default_rng(0)
    entries = []
    for number in range(shards):
        writer = ShardWriter(folder, f"train-{number}", VOCABULARY)
        writer.add(random.integers(0, 50257, tokens, dtype=np.uint16), number)
        entries.append(writer.finish())
    write_manifest(folder, entries)


def make_sparse_folder(folder: Path, shards: int, tokens: int) -> None:
    size = HEADER_BYTES + 2 * tokens
    blocks = "0" * 16 * -(-size // (4 << 20))  # hashes of the real length; opening reads none
    entries = []
    for number in range(shards):
        name = f"train-{number:05d}"
        with open(folder / f"{name}.bin", "wb") as file:
            file.write(header(tokens, 1, VOCABULARY))
            file.truncate(size)
        (folder / f"{name}.idx").write_bytes(bytes(16))
        entry = FileEntry(size, "0" * 64, blocks)
        entries.append(ShardEntry(name, tokens, 1, entry, FileEntry(16, "0" * 64, "0" * 16)))
    write_manifest(folder, entries)


def nanogpt(path: Path, seq_len: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(tokens, targets) as nanoGPT's train.py makes them: a row at a time, in int64, the file
    mapped anew for each batch."""
    while True:
        stream = np.memmap(path, np.uint16, "r")
        starts = torch.randint(len(stream) - seq_len, (batch,)).tolist()
        rows = [stream[start : start + seq_len + 1].astype(np.int64) for start in starts]
        yield (
            torch.stack([torch.from_numpy(row[:-1]) for row in rows]),
            torch.stack([torch.from_numpy(row[1:]) for row in rows]),
        )


def ours(folder: Path, seq_len: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for delivered in Batches(open_shards(folder).train, seq_len, batch):
        yield delivered.tokens, delivered.targets


def measure_batches(folder: Path, flat: Path) -> list[dict[str, object]]:
    torch.set_num_threads(1)
    split = open_shards(folder).train
    with flat.open("wb") as file:
        for path in sorted(folder.glob("*.bin")):
            np.memmap(path, np.uint16, "r", HEADER_BYTES).tofile(file)
    rows = []
    for seq_len, batch in SHAPES:
        loaders = {"ours": ours(folder, seq_len, batch), "nanogpt": nanogpt(flat, seq_len, batch)}
        for loader in loaders.values():  # one epoch: every page in the cache, ours mapped
            for _ in islice(loader, split.n_tokens // (seq_len * batch)):
                pass
        rates: dict[str, list[float]] = {name: [] for name in loaders}
        for _ in range(ROUNDS):
            for name, loader in loaders.items():
                count, begin = 0, time.perf_counter()
                while (spent := time.perf_counter() - begin) < SECONDS:
                    count += next(loader)[0].numel()
                rates[name].append(count / spent)
        ratios = [a / b for a, b in zip(*rates.values(), strict=True)]
        medians = {name: statistics.median(found) for name, found in rates.items()}
        row = {"seq_len": seq_len, "batch": batch, "tokens_per_second": medians}
        rows.append({**row, "ratio": [statistics.median(ratios), min(ratios), max(ratios)]})
    return rows


# VmRSS, not ru_maxrss: that of a new process starts at its parent's.
START = """
import sys, time
from data import Batches, open_shards
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
before, begin = resident(), time.perf_counter()
split = open_shards(sys.argv[1]).train
opened = time.perf_counter()
next(iter(Batches(split, 1024, 16))).tokens
first = time.perf_counter()
print((first - begin) * 1e3, (opened - begin) * 1e3, (resident() - before) / 1024, split.n_tokens)
"""


def measure_start(folder: Path) -> dict[str, float]:
    """In a fresh process, the best of five: ms and growth of resident memory."""
    runs = []
    for _ in range(5):
        command = [sys.executable, "-c", START, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append([float(number) for number in done.stdout.split()])
    first, opened, megabytes, tokens = min(runs)
    return {
        "tokens": tokens,
        "open_ms": opened,
        "first_batch_ms": first,
        "rss_growth_mib": megabytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("batches", *(n for n, *_ in STARTS))}
        for folder in folders.values():
            folder.mkdir()
        make_batches_folder(folders["batches"])
        batches = measure_batches(folders["batches"], Path(scratch) / "flat.bin")
        starts = []
        for name, shards, tokens in STARTS:
            make_sparse_folder(folders[name], shards, tokens)
            starts.append({"shards": shards, **measure_start(folders[name])})
    if arguments.json:
        print(json.dumps({**provenance(), "batches": batches, "start": starts}, indent=1))
        return
    table = Table("context", "batch", "M tokens/s", "nanoGPT's way", "ratio (range)")
    for row in batches:
        rates = (f"{rate / 1e6:,.0f}" for rate in row["tokens_per_second"].values())
        ratio = "{:.1f} ({:.1f} to {:.1f})".format(*row["ratio"])
        table.add_row(f"{row['seq_len']:,}", f"{row['batch']:,}", *rates, ratio)
    show(table)
    table = Table("tokens", "shards", "open, ms", "first batch, ms", "memory, MiB")
    for row in starts:
        numbers = (f"{row[key]:.1f}" for key in ("open_ms", "first_batch_ms", "rss_growth_mib"))
        table.add_row(f"{row['tokens']:,.0f}", f"{row['shards']:,}", *numbers)
    show(table)


if __name__ == "__main__":
    main()
