#!/usr/bin/env python
"""Is `sparse-gpt plan` right? Takes real steps here and compares its memory with the measured peak.

    python scripts/studies/check_plan.py configs/tiny-dense.yaml batch.micro_batch=16
    python scripts/studies/check_plan.py --json FILE A.yaml model.n_layer=2 + B.yaml + C.yaml
    python scripts/studies/check_plan.py --ranks 4 A.yaml parallel.blocks=2

New processes for each run (separated by `+`), one a rank; shown is the rank with most. On a CPU
what is measured is the growth of resident memory over a process that has trained a minute model, so
that libraries do not count, with freed memory handed back (training keeps it, for speed, and so has
holes); on a GPU torch's own peak of allocated memory.
"""

import argparse
import ctypes
import json
import os
import resource
import socket
import subprocess
import sys
import tempfile
from itertools import groupby
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.table import Table

from sparse_gpt import GPT
from sparse_gpt.cli.terminal import show
from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.plan.memory import estimate
from sparse_gpt.provenance import provenance
from sparse_gpt.train.checks import check_settings
from sparse_gpt.train.distributed import World, join_world
from sparse_gpt.train.engine import Engine

GIB = 2**30


def hand_back_freed_memory() -> None:
    """Undo `train.distributed.keep_freed_memory`."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_threshold, m_mmap_max = -1, -3, -4  # malloc.h
        mallopt(m_mmap_max, 65_536)
        mallopt(m_mmap_threshold, 2**17)
        mallopt(m_trim_threshold, 2**17)


def steps(config: RunConfig, world: World, count: int) -> None:
    """Real optimizer steps on random tokens, others on each rank."""
    torch.manual_seed(0)
    engine = Engine(config, GPT(config.model), world, total_steps=10)
    torch.manual_seed(world.rank)
    shape = (config.global_batch // world.size, config.model.max_seq_len)
    tokens = torch.randint(config.model.vocab_size, shape, device=world.device)
    documents = torch.zeros_like(tokens) if config.model.document_mask else None
    for step in range(count):
        loss, *_ = engine.step(tokens, tokens, step, documents)
        loss.item()


def minute(config: RunConfig, ranks: int) -> RunConfig:
    """The same kind of run at a size that weighs nothing: it imports what the other will."""
    sizes = {"d_model": 64, "n_head": 2, "n_layer": 1, "max_seq_len": 64, "vocab_size": 512}
    model = config.model.model_copy(update=sizes)
    batch = config.batch.model_copy(update={"global_tokens": 64 * ranks, "micro_batch": 1})
    return config.model_copy(update={"model": model, "batch": batch})


def measure(arguments: list[str]) -> dict[str, Any]:
    """One rank of a run, in this process."""
    config = load_config(arguments[0], arguments[1:])
    world = join_world()
    hand_back_freed_memory()
    steps(minute(config, world.size), world, 1)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        steps(config, world, 2)
        measured = torch.cuda.max_memory_allocated() - before
    else:
        before = psutil.Process().memory_info().rss
        steps(config, world, 2)
        measured = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
    stage = config.deepspeed.get("zero_optimization", {}).get("stage", 1)
    device = "cpu" if world.device.type == "cpu" else "cuda"
    predicted = estimate(config, world.size, stage, device)
    return {
        "config": " ".join([Path(arguments[0]).name, *arguments[1:]]),
        "ranks": world.size,
        "stage": stage,
        "parts": vars(predicted),
        "predicted": predicted.total,
        "measured": measured,
        "error": predicted.total / measured - 1,
        **provenance(world.device),
    }


def on_ranks(arguments: list[str], ranks: int) -> dict[str, Any]:
    """One run, in `ranks` new processes; what the rank with most says, and all they measured."""
    with tempfile.TemporaryDirectory() as folder, socket.create_server(("127.0.0.1", 0)) as probe:
        port = str(probe.getsockname()[1])
        probe.close()
        outs = [Path(folder) / f"{rank}.json" for rank in range(ranks)]
        processes = []
        for rank, out in enumerate(outs):
            world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            quiet = {"PYTHONWARNINGS": "ignore::FutureWarning"}  # of torch, about DeepSpeed's calls
            environment = {**os.environ, **quiet, **world, **meet}
            command = [sys.executable, __file__, "--child", str(out), *arguments]
            processes.append(subprocess.Popen(command, env=environment))
        codes = [process.wait() for process in processes]
        if any(codes):
            sys.exit(f"{' '.join(arguments)}: a rank failed")
        results = [json.loads(out.read_text()) for out in outs]
    most: dict[str, Any] = max(results, key=lambda result: result["measured"])
    return {**most, "measured_by_rank": [result["measured"] for result in results]}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", help="run file, key=value..., + before the next run")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="of each run, here")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.child:
        args.child.write_text(json.dumps(measure(args.runs)))
        sys.stdout.flush()
        os._exit(0)  # as in train/rank.py
    runs = [list(run) for plus, run in groupby(args.runs, key="+".__eq__) if not plus]
    for path, *overrides in runs:
        try:
            check_settings(load_config(path, overrides), args.ranks)
        except ConfigError as error:
            parser.error(str(error))
    results = []
    for run in runs:
        results.append(on_ranks(run, args.ranks))
        if args.json:
            args.json.write_text(json.dumps({"results": results}, indent=1) + "\n")
    table = Table("run", title="Memory of one rank in GiB")
    for column in ("predicted", "measured", "error"):
        table.add_column(column, justify="right")
    for r in results:
        sizes = (f"{r[key] / GIB:.3f}" for key in ("predicted", "measured"))
        table.add_row(r["config"], *sizes, f"{r['error']:+.1%}")
    show(table)


if __name__ == "__main__":
    main()
