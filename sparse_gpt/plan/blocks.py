"""Blocks of dictionaries over how many ranks: what each number needs and costs, which to take."""

import math
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

import psutil
import torch
from rich.table import Table

from sparse_gpt.config.schema import ParallelConfig, RunConfig, some
from sparse_gpt.errors import ConfigError
from sparse_gpt.plan.memory import DeviceType, Memory, estimate
from sparse_gpt.plan.stage import RESERVED, fits, step_of
from sparse_gpt.plan.step import Cluster, StepCost
from sparse_gpt.train.checks import check_settings
from sparse_gpt.train.deepspeed_config import deepspeed_config
from sparse_gpt.train.gpus import known_gpu

GLOO, GLOO_LATENCY = 0.5e9, 1e-3
"""Bytes/s that a rank on a CPU sends to others of its machine, and seconds of an exchange of
nothing: 0.4e9 to 1.1e9 and 0.6e-3 to 4e-3 were measured (2 and 4 ranks, 8 and 32 MiB, 2 cores of an
AMD EPYC that were busy, 2026-11-27)."""

_MOST_GPUS = 2**14


@dataclass(frozen=True)
class Sharing:
    """Blocks over so many ranks: the memory of one, whether that fits, and a step."""

    memory: Memory
    fits: bool
    step: StepCost

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        return {"memory": memory, "fits": self.fits, "step": asdict(self.step)}


def with_blocks(config: RunConfig, ranks: int) -> RunConfig:
    """The run with its blocks over `ranks`."""
    return config.model_copy(update={"parallel": ParallelConfig(blocks=ranks)})


def stage_and_numbers(config: RunConfig, gpus: int) -> tuple[int, list[int]]:
    """The run's ZeRO stage, and over how many ranks blocks can be: 1 alone where nothing can be
    shared. Raises ConfigError for a run that cannot be on so many."""
    check_settings(with_blocks(config, 1), gpus)
    stage: int = deepspeed_config(config, gpus)["zero_optimization"]["stage"]
    numbers = config.shareable(gpus)
    try:
        check_settings(with_blocks(config, numbers[-1]), gpus)
    except ConfigError:  # what goes without sharing does not go with it
        numbers = [1]
    return stage, numbers


def sharings(
    config: RunConfig,
    memory: int,
    cluster: Cluster,
    products_seconds: float = 0.0,
    device: DeviceType = "cuda",
) -> dict[int, Sharing]:
    """By the number of ranks. `memory`: bytes of a device. Raises ConfigError."""
    stage, numbers = stage_and_numbers(config, cluster.gpus)
    found = {}
    for ranks in numbers:
        run = with_blocks(config, ranks)
        needed = estimate(run, cluster.gpus, stage, device)
        step = step_of(run, stage, cluster, products_seconds)
        found[ranks] = Sharing(needed, fits(needed, memory), step)
    return found


def fastest(found: dict[int, Sharing]) -> int | None:
    """Of those that fit, where no link is hidden; None if none fits."""
    fitting = [ranks for ranks, sharing in found.items() if sharing.fits]
    return min(fitting, key=lambda ranks: found[ranks].step.seconds[1], default=None)


def best_by_gpus(config: RunConfig, memory: int, cluster: Cluster) -> dict[int, int | None]:
    """The fastest number that fits, None if none does, on each power of two of GPUs from 2 on that
    can share the batch. A micro-batch is the run's, or what is left for it."""
    best, gpus = {}, 2
    while gpus <= _MOST_GPUS and config.global_batch % gpus == 0:
        micro_batch = math.gcd(config.batch.micro_batch, config.global_batch // gpus)
        batch = config.batch.model_copy(update={"micro_batch": micro_batch})
        run = config.model_copy(update={"batch": batch})
        best[gpus] = fastest(sharings(run, memory, replace(cluster, gpus=gpus)))
        gpus *= 2
    return best


def choose(config: RunConfig, ranks: int, per_node: int) -> tuple[int, str]:
    """What `parallel.blocks: auto` is for `ranks` ranks on machines like this one, `per_node` on
    each, and a line that says why.

    A GPU has the memory that torch tells and the links of its data sheet. Ranks on a CPU have an
    equal part of the machine's memory each, and gloo. Raises ConfigError where the GPU's links are
    not known, and where no number fits.
    """
    what = "parallel.blocks: auto"
    _, numbers = stage_and_numbers(config, ranks)
    if numbers == [1]:
        return 1, f"{what} is 1: this run has nothing that {ranks} ranks could share"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        gpu = known_gpu(name)
        if gpu is None:
            raise ConfigError(
                f"{what}: how fast {name} is linked is not known; give the number that sparse-gpt "
                f"plan --gpus {ranks} --peak-tflops T --memory-gb G finds: {some(numbers)}"
            )
        memory, device = torch.cuda.get_device_properties(0).total_memory, "GPU"
        cluster = Cluster(ranks, per_node, gpu.link)
        found = sharings(config, memory, cluster)
    else:
        memory, device = psutil.virtual_memory().total // per_node, "rank"
        found = sharings(
            config, memory, Cluster(ranks, per_node, GLOO, GLOO, GLOO_LATENCY), device="cpu"
        )
    best = fastest(found)
    if best is None:
        least = min(found, key=lambda number: found[number].memory.total)
        raise ConfigError(
            f"{what}: no number fits: {least} needs least, "
            f"{_gib(found[least].memory.total + RESERVED)} of a {device}'s {_gib(memory)}; set a "
            "smaller batch.micro_batch, or the number itself to try it"
        )
    one, own = found[1], found[best]
    why = f"{_gib(own.memory.total)} and {own.step.links_seconds:.3g} s of links a step"
    if best > 1:
        without = f"{_gib(one.memory.total)} and {one.step.links_seconds:.3g} s"
        why += f"; without, {without}{'' if one.fits else ', which does not fit'}"
    return best, f"{what} is {best} of {some(numbers)}: a {device} has {why}"


def _gib(size: int) -> str:
    return f"{size / 2**30:.3g} GiB"


def blocks_table(found: dict[int, Sharing], stage: int, by_gpus: dict[int, int | None]) -> Table:
    """A row a number of ranks; below it the best, and what it is on more or fewer GPUs."""
    best = fastest(found)
    runs = []
    for number, counts in groupby(by_gpus, by_gpus.__getitem__):
        first, *others = counts
        span = f"{first:,} to {others[-1]:,}" if others else f"{first:,}"
        runs.append(f"{span} GPUs: {number or 'none'}")
    table = Table(
        title=f"Blocks over ranks in ZeRO-{stage}; a step without and with gathers and reductions "
        "that nothing hides",
        caption=f"Fastest of what fits: parallel.blocks={best or 'none'}. On {'; '.join(runs)}.",
    )
    for column in ("ranks", "GiB", "fits", "exchange, ms", "links, ms", "step, s"):
        table.add_column(column.replace(" ", "\n"), justify="right", no_wrap=True)
    for ranks, sharing in found.items():
        step = sharing.step
        table.add_row(
            str(ranks),
            f"{sharing.memory.total / 2**30:.2f}",
            "yes" if sharing.fits else "no",
            *(f"{1e3 * part:.3g}" for part in (step.exchange_seconds, step.links_seconds)),
            "–".join(f"{end:.3g}" for end in step.seconds),
            style="bold" if ranks == best else "",
        )
    return table
