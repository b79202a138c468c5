"""Measure the data room: batches from page cache, and opening 1,000 shards.

    python scripts/bench_data.py [--json]

Batches are delivered by one process on one thread, with `tokens` and `targets` made, in the order
of training (windows at random). Shards are real files, made in a temporary folder by the room's
own writer; those of the opening test are sparse, so that a thousand fit on any disk.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np

from data import Batches, open_shards
from data.manifest import FORMAT, MANIFEST, SPLITS, write_sealed
from data.shards import HEADER_BYTES, FileEntry, ShardEntry, ShardWriter, Vocabulary, header
from launch.provenance import provenance

VOCABULARY = Vocabulary("ab" * 32, "uint16", 50256)
SHAPES = [(128, 32), (128, 4096), (1024, 16), (1024, 512)]  # (context, batch)
SECONDS = 2.0


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


def measure_batches(folder: Path) -> list[dict[str, float]]:
    import torch

    torch.set_num_threads(1)
    split = open_shards(folder).train
    rows = []
    for seq_len, batch in SHAPES:
        for _ in islice(Batches(split, seq_len, batch), split.n_tokens // (seq_len * batch)):
            pass  # one epoch: every page in the cache and mapped
        count, begin = 0, time.perf_counter()
        for delivered in Batches(split, seq_len, batch):
            count += delivered.tokens.numel()
            assert delivered.targets.shape == delivered.tokens.shape
            if (spent := time.perf_counter() - begin) > SECONDS:
                break
        rows.append(
            {
                "seq_len": seq_len,
                "batch": batch,
                "batches_per_second": count / (seq_len * batch) / spent,
                "tokens_per_second": count / spent,
            }
        )
    return rows


# VmRSS, not ru_maxrss: that of a new process starts at its parent's.
OPEN = """
import sys, time
from data import open_shards
def resident():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
before, begin = resident(), time.perf_counter()
dataset = open_shards(sys.argv[1])
print((time.perf_counter() - begin) * 1e3, (resident() - before) / 1024, dataset.train.n_tokens)
"""


def measure_open(folder: Path) -> dict[str, float]:
    """In a fresh process, the best of five: ms and growth of resident memory."""
    runs = []
    for _ in range(5):
        command = [sys.executable, "-c", OPEN, str(folder)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append([float(number) for number in done.stdout.split()])
    milliseconds, megabytes, tokens = min(runs)
    return {"tokens": tokens, "milliseconds": milliseconds, "rss_growth_mib": megabytes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = {name: Path(scratch) / name for name in ("batches", "small", "large")}
        for folder in folders.values():
            folder.mkdir()
        make_batches_folder(folders["batches"])
        batches = measure_batches(folders["batches"])
        opening = []
        for name, tokens in (("small", 1_000_000), ("large", 100_000_000)):
            make_sparse_folder(folders[name], 1000, tokens)
            opening.append({"shards": 1000, **measure_open(folders[name])})
    if arguments.json:
        print(json.dumps({**provenance(), "batches": batches, "open": opening}, indent=1))
        return
    print("context  batch   batches/s   tokens/s (one process, page cache)")
    for row in batches:
        print(
            f"{row['seq_len']:7}  {row['batch']:5}  {row['batches_per_second']:10,.0f}"
            f"  {row['tokens_per_second'] / 1e6:8,.0f}M"
        )
    print("shards       tokens   open ms   RSS growth")
    for row in opening:
        print(
            f"{row['shards']:6}  {row['tokens'] / 1e9:10.0f}G  {row['milliseconds']:8.1f}"
            f"  {row['rss_growth_mib']:6.1f} MiB"
        )


if __name__ == "__main__":
    main()
