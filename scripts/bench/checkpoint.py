#!/usr/bin/env python3
"""How long training stands still for a checkpoint: written in the background, or waited for.

    python scripts/bench/checkpoint.py configs/124m.yaml
    python scripts/bench/checkpoint.py configs/124m.yaml --rounds 7 --json checkpoint.json

One process; rounds of both kinds take turns. In the background a save stops the loop twice: to copy
the state, and to publish what has been written. Steps during the writing share the machine with it:
their slowdown is shown too. The folder is made where --out says: take the disk that you train on.
"""

import argparse
import json
import os
import shutil
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")

import torch
from rich.console import Console
from rich.table import Table

from sparse_gpt import GPT
from sparse_gpt.config.load import load_config
from sparse_gpt.provenance import provenance
from sparse_gpt.train.checkpoint.checkpoints import Checkpoints
from sparse_gpt.train.checkpoint.manifest import TrainState
from sparse_gpt.train.distributed import join_world
from sparse_gpt.train.engine import Engine


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("config", help="a run file, as in configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seq", type=int, default=128, help="tokens of the steps between")
    parser.add_argument("--out", type=Path, help="a folder on the disk to measure")
    parser.add_argument("--json", type=Path, help="also write the numbers here")
    options = parser.parse_intermixed_args()
    one = ["batch.micro_batch=1", "checkpoint.keep_last=1"]
    config = load_config(options.config, [*options.overrides, *one])
    config = load_config(
        options.config,
        [*options.overrides, *one, f"batch.global_tokens={config.model.max_seq_len}"],
    )
    world = join_world()
    engine = Engine(config, GPT(config.model), world, total_steps=10**6)
    tokens = torch.randint(config.model.vocab_size, (1, options.seq + 1), device=world.device)

    def step() -> float:
        start = time.perf_counter()
        engine.step(tokens[:, :-1], tokens[:, 1:], 10)
        if world.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - start

    step()  # AdamW's moments are there after the first
    rows: dict[str, list[float]] = {
        name: [] for name in ("waited for", "in the background", "step", "step while writing")
    }
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="bench-", dir=options.out) as folder:
        checkpoints = Checkpoints(Path(folder) / "checkpoints", engine, {})
        number = 0
        for _ in range(options.rounds):
            number += 1
            start = time.perf_counter()
            checkpoints.save(TrainState(number))
            checkpoints.finish()
            rows["waited for"].append(time.perf_counter() - start)
            rows["step"] += [step() for _ in range(3)]
            number += 1
            start = time.perf_counter()
            checkpoints.save(TrainState(number))
            stall = time.perf_counter() - start
            while checkpoints.writing:
                rows["step while writing"].append(step())
            start = time.perf_counter()
            checkpoints.finish()
            rows["in the background"].append(stall + time.perf_counter() - start)
            rows["step"] += [step() for _ in range(3)]
        size = sum(path.stat().st_size for path in Path(folder).rglob("*.pt"))
        disk = shutil.disk_usage(folder).total

    shares = [b / w for b, w in zip(rows["in the background"], rows["waited for"], strict=True)]
    table = Table("", "seconds: median (range)", title=f"{options.config}: {size / 1e9:.2f} GB")
    for name, seconds in rows.items():
        low, high = min(seconds), max(seconds)
        table.add_row(name, f"{statistics.median(seconds):.3f} ({low:.3f} to {high:.3f})")
    Console().print(table)
    low, high = min(shares), max(shares)
    print(f"stall: {statistics.median(shares):.1%} of a save waited for ({low:.1%} to {high:.1%})")
    if options.json:
        found = {
            "config": options.config,
            "overrides": options.overrides,
            "checkpoint_bytes": size,
            "disk_bytes": disk,
            "seconds": rows,
            "stall_share": shares,
            "provenance": provenance(world.device),
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
