#!/usr/bin/env python3
"""Training speed of several run files, interleaved in one run: tokens/s of each and the ratios.

    python scripts/bench_train.py configs/tiny-dense.yaml configs/tiny-sparse.yaml
    deepspeed --num_gpus 8 scripts/bench_train.py configs/124m.yaml --json

Takes real optimizer steps (forward, backward, ZeRO, AdamW) on random tokens, one config after the
other in every round, so that a machine whose speed drifts slows all of them alike. Ratios are
taken round by round, to the first config; the median is printed with the range.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

import torch

from launch.config import load_config
from launch.engine import Engine
from launch.world import World, join_world
from sparse_gpt import GPT, count_flops


class Contestant:
    """A config's engine with a batch of random tokens."""

    def __init__(self, path: Path, overrides: list[str], world: World) -> None:
        self.name, self.config, self.world = path.stem, load_config(path, overrides), world
        torch.manual_seed(0)
        model = GPT(self.config.model)
        report = count_flops(model, batch=1, seq=self.config.model.max_seq_len)
        self.flops_per_token = report.training / report.seq
        self.engine = Engine(self.config, model, world, total_steps=10**9)
        shape = (self.config.global_batch // world.size, self.config.model.max_seq_len)
        self.tokens = torch.randint(self.config.model.vocab_size, shape, device=world.device)

    def tokens_per_second(self, steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            loss, *_ = self.engine.step(self.tokens, self.tokens, 0)
        loss.item()  # waits for the device
        return steps * self.config.batch.global_tokens / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("configs", nargs="+", help="run files, or key=value for all of them")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--steps", type=int, default=2, help="optimizer steps a config a round")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    overrides = [text for text in args.configs if "=" in text]
    world = join_world()
    contestants = [Contestant(Path(p), overrides, world) for p in args.configs if "=" not in p]
    for contestant in contestants:
        contestant.tokens_per_second(1)  # warm-up
    rounds = [[c.tokens_per_second(args.steps) for c in contestants] for _ in range(args.rounds)]

    results = []
    for index, contestant in enumerate(contestants):
        speeds = [speeds[index] for speeds in rounds]
        ratios = [speeds[index] / speeds[0] for speeds in rounds]
        speed = statistics.median(speeds)
        results.append(
            {
                "config": contestant.name,
                "tokens_per_second": speed,
                "tflops": speed * contestant.flops_per_token / 1e12,
                "ratio": statistics.median(ratios),
                "ratio_range": [min(ratios), max(ratios)],
            }
        )
    if world.rank == 0:
        cuda = world.device.type == "cuda"
        setting = {
            "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
            "ranks": world.size,
            "torch": torch.__version__,
            "rounds": args.rounds,
        }
        if args.json:
            print(json.dumps({**setting, "results": results}, indent=1))
        else:
            print(", ".join(f"{key} {value}" for key, value in setting.items()))
            for r in results:
                low, high = r["ratio_range"]
                print(
                    f"{r['config']:>20}  {r['tokens_per_second']:>12,.0f} tokens/s"
                    f"  {r['tflops']:>9.4f} TFLOP/s  {r['ratio']:.2f}x ({low:.2f} to {high:.2f})"
                )
    torch.distributed.barrier()
    os._exit(0)  # as in launch/train.py


if __name__ == "__main__":
    main()
