#!/usr/bin/env python3
"""Are the losses of the quickstart's first 20 steps those that are committed?

    python scripts/compare_losses.py                            all of configs/tiny-*.yaml
    python scripts/compare_losses.py configs/tiny-dense.yaml    one of them
    python scripts/compare_losses.py --update                   trains, and writes them anew

A change of numerics shows here, and is committed with `--update` if it is meant. Each run file is
trained in fp32 by one process with one thread on the CPU, half a minute each.

Another CPU, or another torch, adds in another order, and differs in the last bits; training makes
more of them step by step. How much, `--update` measures: it trains each file twice more, with old
vector instructions and with smaller micro-batches. What is within 10 times of that is rounding.

Exit status: 0 equal to the bit or within rounding, 1 another computation.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any

from sparse_gpt.cluster.this_machine import cores
from sparse_gpt.config.load import load_config
from sparse_gpt.data import open_shards, prepare
from sparse_gpt.errors import ConfigError, InputError
from sparse_gpt.files import publish_text
from sparse_gpt.provenance import provenance
from sparse_gpt.train.metrics_file import read_metrics
from sparse_gpt.train.schedule import learning_rate

ROOT = Path(__file__).parents[1]
EXPECTED = ROOT / "tests/assets/expected-losses.json"
STEPS = 20
MARGIN = 10  # times the rounding that was measured
LEAST = 1e-6  # relative; a float32 near 10 has steps of 1e-7
OLD_CPU = {
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
}
# What computes the same in other orders: overrides, environment.
OTHER_ORDERS: tuple[tuple[list[str], dict[str, str]], ...] = (
    ([], OLD_CPU),
    (["batch.micro_batch=2"], {}),
)


def train(
    config: Path,
    data: Path,
    overrides: Sequence[str] = (),
    environment: Mapping[str, str] = MappingProxyType({}),
) -> list[float]:
    """The losses of a run file's first STEPS steps. Raises ConfigError where the run fails."""
    others = ("RANK", "SLURM_PROCID")  # of a job that this may be started in
    here = {name: value for name, value in os.environ.items() if name not in others}
    here |= {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    with TemporaryDirectory() as run_dir:
        command = [sys.executable, "-m", "sparse_gpt.train", "--config", str(config)]
        command += [f"duration={{steps: {STEPS}}}", f"data.path={data}", f"run_dir={run_dir}"]
        command += ["precision=fp32", "compile=false", "log.every=1", "eval.max_tokens=1"]
        command += overrides
        done = subprocess.run(command, env=here | environment, capture_output=True, text=True)
        if done.returncode:
            raise ConfigError(f"{config}: ended with exit code {done.returncode}\n{done.stderr}")
        return [row["train/loss"] for row in read_metrics(Path(run_dir)) if row["step"]]


def check_schedule(config: Path) -> None:
    """Raises ConfigError if the first STEPS learning rates depend on the length of the run."""
    run = load_config(config)
    for step in range(STEPS):
        rates = {
            learning_rate(step, total, run.optimizer.lr, run.schedule)
            for total in (STEPS, run.total_steps)
        }
        if len(rates) > 1:
            raise ConfigError(
                f"{config}: the learning rate of step {step + 1} depends on the run's length, so "
                f"that {STEPS} steps alone are others; let schedule.warmup_steps be {STEPS} or more"
            )


def differences(expected: Iterable[float], found: Iterable[float]) -> list[float]:
    """Relative, step by step."""
    return [abs(a - b) / abs(a) for a, b in zip(expected, found, strict=True)]


def explain(
    expected: Sequence[float], found: Sequence[float], rounding: Sequence[float]
) -> tuple[str, bool]:
    """What the losses of a run are to those expected, in words, and whether that may be.

    rounding: the relative differences that other orders made, step by step.
    """
    apart = differences(expected, found)
    if not any(apart):
        return "equal to the bit", True
    first = next(step for step, gap in enumerate(apart, 1) if gap)
    for step, gap in enumerate(apart, 1):
        allowed = max(LEAST, MARGIN * max(rounding[:step]))
        if not gap <= allowed:  # NaN is not
            return (
                f"ANOTHER COMPUTATION: from step {first} on other losses, at step {step} by "
                f"{gap:.1e} of the loss, where rounding makes {allowed:.1e} at most"
            ), False
    return f"within rounding: from step {first} on by {max(apart):.1e} of the loss at most", True


def compare(expected: Mapping[str, Any], found: Mapping[str, Sequence[float]]) -> tuple[str, bool]:
    """A line for each run file, and whether all are as expected."""
    lines, good = [], True
    for name, losses in found.items():
        line, same = "has no expected losses; commit them with --update", False
        if name in expected["losses"]:
            own, rounding = (list(expected[key][name].values()) for key in ("losses", "rounding"))
            line, same = explain(own, losses, rounding)
        lines.append(f"{name}: {line}")
        good &= same
    return "\n".join(lines), good


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("configs", nargs="*", type=Path, help="run files; all configs/tiny-*.yaml")
    parser.add_argument("--update", action="store_true", help="write the expected losses anew")
    options = parser.parse_args()
    configs = options.configs or sorted((ROOT / "configs").glob("tiny-*.yaml"))
    if options.update and options.configs:
        parser.error("--update takes no run files: all expected losses are of one commit")
    for config in configs:
        check_schedule(config)
    with TemporaryDirectory() as folder, ThreadPoolExecutor(cores()) as pool:
        data = Path(folder) / "novels"
        novels = sorted((ROOT / "data/novels").glob("*.txt"))
        prepare(novels, data, separator="\nChapter ", held_out=0.1, progress=False)
        own = {config.stem: pool.submit(train, config, data) for config in configs}
        others = {
            config.stem: [pool.submit(train, config, data, *order) for order in OTHER_ORDERS]
            for config in (configs if options.update else ())
        }
        found = {name: losses.result() for name, losses in own.items()}
        rounding = {
            name: list(map(max, *(differences(found[name], losses.result()) for losses in orders)))
            for name, orders in others.items()
        }
        tokens = open_shards(data).manifest.hash
    here = provenance()
    here["hardware"]["threads"] = 1
    if options.update:
        record = {
            "made": {"command": "scripts/compare_losses.py --update", **here},
            "data": tokens,
            "losses": {name: by_step(losses) for name, losses in found.items()},
            "rounding": {name: by_step(gaps) for name, gaps in rounding.items()},
        }
        publish_text(EXPECTED, json.dumps(record, indent=1) + "\n")
        print(f"{EXPECTED.relative_to(ROOT)}: written; look at its diff before you commit it")
        return
    expected = json.loads(EXPECTED.read_text())
    said, good = compare(expected, found)
    print(said)
    made = expected["made"]
    for place, what in (("versions", "torch"), ("hardware", "device")):
        if here[place][what] != made[place][what]:
            print(f"expected losses are of {made[place][what]}; here is {here[place][what]}")
    if tokens != expected["data"]:
        print("the tokens are others: the novels, the vocabulary or the shards' format changed")
    if not good:
        print("if the change of numerics is meant: scripts/compare_losses.py --update")
        sys.exit(1)


def by_step(values: Sequence[float]) -> dict[str, float]:
    """As JSON shows them well."""
    return {str(step): value for step, value in enumerate(values, 1)}


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
