#!/usr/bin/env python3
"""Speed of whole models, interleaved in one run: training or decoding tokens/s and the ratios.

    python scripts/bench/train.py configs/tiny-dense.yaml configs/tiny-sparse.yaml
    python scripts/bench/train.py configs/124m.yaml --against default compile=true --json 124m.json
    deepspeed --num_gpus 8 scripts/bench/train.py configs/124m.yaml --against default
    python scripts/bench/train.py configs/124m.yaml --against default --decode

Each run file is a contestant; `--against X` adds its twin with `model.ffn=X` (or any `key=value`),
to every run file; a bare `key=value` changes all of them. Every round times one contestant after
the other, so that a machine whose speed drifts slows all of them alike. Ratios are taken round by
round, to the first contestant; the median is printed with the range.

Training takes real optimizer steps (forward, backward, ZeRO, AdamW) on random tokens. Where
DeepSpeed is not installed, one device trains in plain torch: weights in the run's precision,
float32 master weights and gradient sums, the same optimizer. Decoding generates greedily with a KV
cache, eager, at several batch sizes; tokens/s count the new tokens, the time includes reading the
prompt. `by bytes` is the ratio that the weights read at a new token would give by themselves: of a
dictionary the blocks that some token of the batch chose.
"""

import argparse
import importlib.util
import json
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from sparse_gpt import GPT, count_flops
from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.model.width import transfer_width
from sparse_gpt.provenance import provenance
from sparse_gpt.train.checks import check_compiler
from sparse_gpt.train.distributed import World, join_world
from sparse_gpt.train.engine import Engine, parameter_groups
from sparse_gpt.train.precision import DTYPES
from sparse_gpt.train.schedule import learning_rate


class TorchEngine:
    """The part of `train.engine.Engine` that takes steps, in plain torch on one device."""

    def __init__(self, config: RunConfig, model: GPT, world: World, total_steps: int) -> None:
        self.config, self.world, self.total_steps = config, world, total_steps
        if config.optimizer.width_transfer:
            transfer_width(model)
        self.model = model.to(world.device, DTYPES[config.precision])
        if config.compile:
            for block in self.model.blocks:
                block.compile(dynamic=False)
        self.weights = list(model.parameters())
        masters = {p: p.detach().float().clone() for p in self.weights}
        self.masters = list(masters.values())
        for master in self.masters:
            master.grad = torch.zeros_like(master)
        groups = parameter_groups(model, config.optimizer)
        for group in groups:
            group["params"] = [masters[p] for p in group["params"]]
        settings = config.optimizer
        self.optimizer = torch.optim.AdamW(
            groups, lr=settings.lr, betas=settings.betas, eps=settings.eps, fused=True
        )

    def step(
        self,
        tokens: Tensor,
        targets: Tensor,
        step: int,
        documents: Tensor | None = None,
    ) -> tuple[Tensor, float, Tensor]:
        lr = learning_rate(step, self.total_steps, self.config.optimizer.lr, self.config.schedule)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group["lr_multiplier"]
        size = self.config.batch.micro_batch
        parts = [tokens, targets] if documents is None else [tokens, targets, documents]
        micro_batches = list(zip(*(part.split(size) for part in parts), strict=True))
        sums = [master.grad for master in self.masters]
        torch._foreach_zero_(sums)
        total = torch.zeros((), device=self.world.device)
        for micro_batch in micro_batches:
            loss = self.model(*micro_batch)
            (loss / len(micro_batches)).backward()
            torch._foreach_add_(sums, [p.grad.float() for p in self.weights])
            self.model.zero_grad()
            total += loss.detach()
        norm = torch.nn.utils.get_total_norm(sums)
        if clip := self.config.optimizer.grad_clip:
            torch.nn.utils.clip_grads_with_norm_(self.masters, clip, norm)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_copy_(self.weights, self.masters)
        return total / len(micro_batches), lr, norm


class Trainer:
    """A config's engine with a batch of random tokens."""

    batch = None
    bytes_read = None

    def __init__(self, name: str, config: RunConfig, world: World) -> None:
        self.name, self.config, self.world = name, config, world
        check_compiler(config)
        torch.manual_seed(0)
        with world.device:  # a GPU draws a billion weights sooner
            model = GPT(config.model)
        report = count_flops(model, batch=1, seq=config.model.max_seq_len)
        self.flops_per_token = report.training / report.seq
        make = Engine if importlib.util.find_spec("deepspeed") else TorchEngine
        self.engine = make(config, model, world, total_steps=10**9)
        shape = (config.global_batch // world.size, config.model.max_seq_len)
        self.tokens = torch.randint(config.model.vocab_size, shape, device=world.device)
        # FlexAttention takes time by what may be seen: documents of 512 tokens in the mean.
        opens = torch.rand(shape, device=world.device) < 1 / 512
        self.documents = opens.cumsum(1) if config.model.document_mask else None

    def tokens_per_second(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss, *_ = self.engine.step(self.tokens, self.tokens, 0, self.documents)
        loss.item()  # waits for the device
        return steps * self.config.batch.global_tokens / (time.perf_counter() - start)


class Decoder:
    """A config's model continuing `batch` random prompts."""

    def __init__(
        self, name: str, model: GPT, world: World, batch: int, prompt: int, new: int
    ) -> None:
        self.name, self.model, self.batch, self.new = name, model, batch, new
        report = count_flops(model, batch=1, seq=1)
        self.flops_per_token = report.forward
        shape = (batch, prompt)
        self.prompt = torch.randint(model.config.vocab_size, shape, device=world.device)
        self.bytes_read = self._bytes_read()

    def _bytes_read(self) -> float:
        """Of weights at a new token, in the mean of a few."""
        dictionaries = [m for m in self.model.modules() if isinstance(m, BlockDictionary)]
        blocks: list[int] = []  # of a dictionary, used by a batch at once

        def count(part: nn.Module, inputs: tuple[Tensor]) -> None:
            if inputs[0].shape[1] == 1:
                blocks.append(len(part.route(inputs[0].flatten(0, 1))[1].unique()))

        hooks = [part.register_forward_pre_hook(count) for part in dictionaries]
        self.model.generate(self.prompt, 5)
        for hook in hooks:
            hook.remove()
        read = sum(p.numel() for p in self.model.parameters()) - self.model.wpe.weight.numel()
        for part in dictionaries:
            size = 2 * part.analysis[0].numel()
            read -= size * (part.config.blocks - statistics.mean(blocks))
        return read * self.model.wte.weight.element_size()

    def tokens_per_second(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            tokens = self.model.generate(self.prompt, self.new)
        tokens[0, -1].item()  # waits for the device
        return steps * self.batch * self.new / (time.perf_counter() - start)


Contestant = Trainer | Decoder


def race(
    contestants: list[Contestant], rounds: int, steps: int, seconds: float | None, world: World
) -> list[dict[str, Any]]:
    """Every contestant's speed, with its ratio to the first."""
    begin = time.monotonic()
    for contestant in contestants:
        contestant.tokens_per_second(1)  # warm-up
    times: list[list[float]] = []
    for _ in range(rounds):
        late = seconds is not None and time.monotonic() - begin > seconds
        if len(times) >= 3 and world.from_rank_0(lambda late=late: late):
            break
        times.append([c.tokens_per_second(steps) for c in contestants])
    results = []
    peak = world.peak_flops
    for index, contestant in enumerate(contestants):
        speeds = [speeds[index] for speeds in times]
        ratios = [speeds[index] / speeds[0] for speeds in times]
        speed = statistics.median(speeds)
        flops = speed * contestant.flops_per_token
        results.append(
            {
                "contestant": contestant.name,
                "batch": contestant.batch,
                "tokens_per_second": speed,
                "tokens_per_second_range": [min(speeds), max(speeds)],
                "tflops": flops / 1e12,
                "mfu": flops / (peak * world.size) if peak else None,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
                "by_bytes": contestants[0].bytes_read
                and (contestants[0].bytes_read / contestant.bytes_read),
                "rounds": len(times),
            }
        )
    return results


def table(results: list[dict[str, Any]], title: str) -> Table:
    """The results of one or more races."""
    shown = Table(title=title)
    shown.add_column("model", no_wrap=True)
    for column in ("batch", "tokens/s", "TFLOP/s", "MFU", "ratio", "by bytes"):
        shown.add_column(column, justify="right", no_wrap=True)
    for r in results:
        low, high = r["ratio_range"]
        shown.add_row(
            r["contestant"],
            str(r["batch"] or ""),
            f"{r['tokens_per_second']:,.0f}",
            f"{r['tflops']:.4g}",
            "" if r["mfu"] is None else f"{r['mfu']:.1%}",
            f"{r['ratio']:.2f} ({low:.2f} to {high:.2f})",
            f"{r['by_bytes']:.2f}" if r["by_bytes"] else "",
        )
    return shown


def configs(arguments: list[str], against: list[str]) -> dict[str, RunConfig]:
    """Contestants' names and configurations, from the command line."""
    overrides = [text for text in arguments if "=" in text]
    found = {}
    for path in (Path(text) for text in arguments if "=" not in text):
        found[path.stem] = load_config(path, overrides)
        for change in against:
            twin = change if "=" in change else f"model.ffn={change}"
            found[f"{path.stem} {change}"] = load_config(path, [*overrides, twin])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="run files, or key=value for all of them")
    parser.add_argument(
        "--against", action="append", default=[], metavar="X", help="an FFN preset or key=value"
    )
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="steps a contestant a round")
    parser.add_argument("--seconds", type=float, help="begin no round after so long (3 at least)")
    parser.add_argument("--decode", action="store_true", help="generate instead of training")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64], help="for --decode")
    parser.add_argument("--prompt", type=int, default=16, help="tokens, for --decode")
    parser.add_argument("--new", type=int, default=64, help="tokens, for --decode")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    world = join_world()
    entrants = configs(args.configs, args.against)
    if args.decode:
        models = {}
        for name, config in entrants.items():
            torch.manual_seed(0)
            with world.device:
                models[name] = GPT(config.model).to(DTYPES[config.precision])
        results = []
        for batch in args.batch:
            decoders: list[Contestant] = [
                Decoder(name, model, world, batch, args.prompt, args.new)
                for name, model in models.items()
            ]
            share = args.seconds / len(args.batch) if args.seconds else None
            results += race(decoders, args.rounds, 1, share, world)
    else:
        trainers: list[Contestant] = [Trainer(*entry, world) for entry in entrants.items()]
        results = race(trainers, args.rounds, args.steps, args.seconds, world)

    if world.rank == 0:
        report = {
            "command": " ".join(sys.argv),
            **provenance(world.device),
            "ranks": world.size,
            "what": "decode" if args.decode else "train",
            "engine": "deepspeed" if importlib.util.find_spec("deepspeed") else "torch",
            "configs": {name: c.model_dump(mode="json") for name, c in entrants.items()},
            "results": results,
        }
        if args.json:
            args.json.write_text(json.dumps(report, indent=1) + "\n")
        device = report["hardware"]["device"]
        title = f"{report['what']}: {device}, ranks: {world.size}, {report['engine']}"
        Console(width=None if sys.stdout.isatty() else 120).print(table(results, title))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # as in train/rank.py


if __name__ == "__main__":
    main()
