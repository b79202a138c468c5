#!/usr/bin/env python3
"""Blocks over ranks beside ZeRO alone: a step's time, what a rank holds and what it sends.

    torchrun --nproc-per-node 4 scripts/bench/blocks.py configs/tiny-sparse.yaml
    deepspeed --num_gpus 8 scripts/bench/blocks.py configs/1558m.yaml model.ffn=default \\
        --ranks 1 2 4 8 --json blocks.json

A contestant is a ZeRO stage and the number of ranks that share the blocks of each dictionary (1 in
ZeRO-3). Every round times one after the other; ratios are taken round by round, to the first. Steps
are real, on random tokens. Held: bytes of weights, gradient sums and optimizer state on the mean
rank, between steps: on a GPU what is allocated, on a CPU the growth of resident memory, which is
rough. Sent: bytes of a step on the mean rank: by collectives, as a ring moves them, 2 (n - 1)/n of
what is all-reduced and (n - 1)/n of what is gathered or scattered; and by the exchange of rows
(`perf/exchange_bytes`). `--skew` adds twins whose tokens all want the same blocks, of one rank.
"""

import argparse
import ctypes
import gc
import inspect
import itertools
import json
import os
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any, ClassVar

import psutil
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from sparse_gpt import GPT
from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.provenance import provenance
from sparse_gpt.train.checks import check_settings
from sparse_gpt.train.distributed import World, join_world
from sparse_gpt.train.engine import Engine


class Counter:
    """Adds up what collectives of torch.distributed send: the bytes of this tensor, so often."""

    SENT: ClassVar = {
        "all_reduce": ("tensor", 2),
        "reduce": ("tensor", 1),
        "all_gather": ("tensor_list", 1),
        "all_gather_into_tensor": ("output_tensor", 1),
        "reduce_scatter_tensor": ("input", 1),
    }

    def __init__(self) -> None:
        self.bytes = 0.0
        for name, (argument, passes) in self.SENT.items():
            setattr(dist, name, self._counting(getattr(dist, name), argument, passes))

    def _counting(self, call: Any, argument: str, passes: int) -> Any:
        signature = inspect.signature(call)

        def counted(*arguments: Any, **keywords: Any) -> Any:
            given = signature.bind(*arguments, **keywords).arguments
            tensors, ranks = given[argument], dist.get_world_size(given.get("group"))
            for tensor in tensors if isinstance(tensors, list) else [tensors]:
                self.bytes += passes * tensor.numel() * tensor.itemsize * (ranks - 1) / ranks
            return call(*arguments, **keywords)

        return counted


class Contestant:
    """An engine with a batch of random tokens."""

    def __init__(
        self, config: RunConfig, ranks: int, stage: int, skewed: bool, world: World
    ) -> None:
        self.ranks, self.stage, self.config, self.world = ranks, stage, config, world
        self.name = f"ZeRO-{stage}" + (f", blocks over {ranks}" if ranks > 1 else "")
        self.name += ", skewed" if skewed else ""
        before = self._allocated()
        torch.manual_seed(0)
        self.engine = Engine(config, GPT(config.model), world, total_steps=10**9)
        if skewed:
            for dictionary in self.engine.statistics.dictionaries.values():
                dictionary.moves[: dictionary.config.top_k] = 10**6
        shape = (config.global_batch // world.size, config.model.max_seq_len)
        self.tokens = torch.randint(config.model.vocab_size, shape, device=world.device)
        self.milliseconds(1)  # warm-up; the optimizer's state is there afterwards
        self.held = self._allocated() - before

    def _allocated(self) -> int:
        gc.collect()
        if self.world.device.type == "cuda":
            torch.cuda.synchronize()
            return torch.cuda.memory_allocated()
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is not None:
            malloc_trim(0)
        return psutil.Process().memory_info().rss

    def milliseconds(self, steps: int) -> float:
        """Of a step, the mean of so many."""
        dist.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            loss, *_ = self.engine.step(self.tokens, self.tokens, 0)
        loss.item()  # waits for the device
        return (time.perf_counter() - start) / steps * 1e3


def race(
    contestants: list[Contestant], rounds: int, steps: int, counter: Counter, world: World
) -> list[dict[str, Any]]:
    """A result each, means over the ranks."""
    times: list[list[float]] = []
    collectives, exchanged = [], []
    for _ in range(rounds):
        row = []
        collectives.clear()
        exchanged.clear()
        for contestant in contestants:
            counter.bytes = 0.0
            row.append(contestant.milliseconds(steps))
            collectives.append(counter.bytes / steps)
            exchanged.append(contestant.engine.exchanged())
        times.append(world.mean(torch.tensor(row, device=world.device)).tolist())
    held = [float(contestant.held) for contestant in contestants]
    means = torch.tensor([held, collectives], dtype=torch.float64, device=world.device)
    held, collectives = world.mean(means).tolist()
    results = []
    for index, contestant in enumerate(contestants):
        ratios = [row[index] / row[0] for row in times]
        results.append(
            {
                "contestant": contestant.name,
                "zero_stage": contestant.stage,
                "blocks_over": contestant.ranks,
                "ms": statistics.median(row[index] for row in times),
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "held_bytes": held[index],
                "collective_bytes": collectives[index],
                "exchange_bytes": exchanged[index].get("perf/exchange_bytes", 0.0),
                "exchange_ms": exchanged[index].get("perf/exchange_ms", 0.0),
                "rounds": rounds,
            }
        )
    return results


def table(results: list[dict[str, Any]], title: str) -> Table:
    """A row a contestant."""
    shown = Table(title=title)
    shown.add_column("", no_wrap=True)
    for column in ("step, ms", "times the first", "held, MB", "sent, MB", "exchanged, MB", "in ms"):
        shown.add_column(column, justify="right")
    for r in results:
        low, high = r["ratio_range"]
        shown.add_row(
            r["contestant"],
            f"{r['ms']:,.1f}",
            f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})",
            *(f"{r[key] / 1e6:,.2f}" for key in ("held_bytes", "collective_bytes")),
            f"{r['exchange_bytes'] / 1e6:,.2f}",
            f"{r['exchange_ms']:,.1f}",
        )
    return shown


def entrants(
    arguments: list[str], ranks: list[int], stages: list[int], skew: bool, size: int
) -> Any:
    """(config, ranks, stage, skewed) of each contestant that can be."""
    overrides = [text for text in arguments if "=" in text]
    [path] = [Path(text) for text in arguments if "=" not in text]
    for stage, over in itertools.product(stages, ranks):
        if stage == 3 and over > 1:
            continue
        own = [f"deepspeed={{zero_optimization: {{stage: {stage}}}}}", f"parallel.blocks={over}"]
        config = load_config(path, [*overrides, *own])
        check_settings(config, size)
        yield from ((config, over, stage, skewed) for skewed in (False, True)[: 1 + skew])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", nargs="+", help="a run file, and key=value for it")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="that share blocks")
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="of ZeRO")
    parser.add_argument("--skew", action="store_true", help="and each with its twin, see above")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2, help="steps a contestant a round")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    warnings.simplefilter("ignore", FutureWarning)  # of torch, about DeepSpeed's calls
    world, counter = join_world(), Counter()
    try:
        found = list(entrants(args.config, args.ranks, args.stages, args.skew, world.size))
    except ConfigError as error:
        parser.error(str(error))
    contestants = [Contestant(*entry, world) for entry in found]
    results = race(contestants, args.rounds, args.steps, counter, world)
    if world.rank == 0:
        report = {
            "command": " ".join(sys.argv),
            **provenance(world.device),
            "ranks": world.size,
            "config": found[0][0].model_dump(mode="json"),
            "results": results,
        }
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        title = f"{report['hardware']['device']}, ranks: {world.size}"
        Console(width=None if sys.stdout.isatty() else 120).print(table(results, title))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # as in train/rank.py


if __name__ == "__main__":
    main()
