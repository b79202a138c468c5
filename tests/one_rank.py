"""This process as the only rank of a job, so that engines and runs need no launch: fixtures of the
tests of `train` and of `cluster`."""

import os
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch

from sparse_gpt.config.load import load_config
from sparse_gpt.data import Batch
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train import loop
from sparse_gpt.train.distributed import World, join_world
from sparse_gpt.train.engine import Engine
from sparse_gpt.train.preemption import stop_signals

ALONE = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}


@cache
def joined() -> World:
    """A process group of one, once a process: DeepSpeed keeps groups of its own of it."""
    with mock.patch.dict(os.environ), mock.patch("torch.cuda.is_available", return_value=False):
        for name in (*ALONE, "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID", "TORCHELASTIC_RUN_ID"):
            os.environ.pop(name, None)
        return join_world()


@pytest.fixture
def world(no_gpu: None, monkeypatch: pytest.MonkeyPatch) -> World:
    """This process, among the ranks of a job of one."""
    for name, value in ALONE.items():
        monkeypatch.setenv(name, value)
    return joined()


@pytest.fixture
def engine(world: World, run_file: Path) -> Callable[..., Engine]:
    """Makes a new engine of `run_file` with overrides, for 16 steps."""

    def make(*overrides: str) -> Engine:
        config = load_config(run_file, overrides)
        torch.manual_seed(config.seed)
        return Engine(config, GPT(config.model), world, config.total_steps)

    return make


@pytest.fixture
def train_here(
    world: World, run_file: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., None]]:
    """Trains `run_file` with overrides in this process: the loop itself, on a group that is there,
    in a folder that other starts in this process may train in too."""
    handlers = {number: signal.getsignal(number) for number in stop_signals()}
    monkeypatch.setattr(loop, "join_world", lambda timeout: world)
    monkeypatch.setattr(loop, "hold", lambda folder: None)

    def train(*overrides: str) -> None:
        loop.train(load_config(run_file, overrides))

    yield train
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def batch() -> Callable[[int], Batch]:
    """Makes a step's batch of random ids, the same each time: 16 sequences of 32."""

    def make(step: int) -> Batch:
        windows = torch.randint(1024, (16, 33), generator=torch.Generator().manual_seed(step))
        return Batch(windows.to(torch.uint16), 16 * step + torch.arange(16))

    return make
