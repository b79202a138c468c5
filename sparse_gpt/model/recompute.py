"""Activation checkpointing (Chen et al. 2016): memory for the time of a second forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def running_statistics(module: nn.Module) -> Iterator[Tensor]:
    """The buffers that training moves: scalars, and whole numbers of any shape."""
    return (b for b in module.buffers() if b.numel() == 1 or not b.is_floating_point())


def recomputed(module: nn.Module, *args: Any) -> Tensor:
    """`module(*args)`, of which the backward gets the inputs alone and computes the rest again.

    The second forward sees what the first saw, dropout's draws and the module's buffers too, and
    changes no buffer: a running statistic takes one step, a token is counted once. Without
    gradients it is a plain call.
    """
    if not torch.is_grad_enabled():
        plain: Tensor = module(*args)
        return plain
    first = [buffer.clone() for buffer in running_statistics(module)]

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _restored(module, first)

    again: Tensor = checkpoint(module, *args, use_reentrant=False, context_fn=contexts)
    return again


@contextmanager
def _restored(module: nn.Module, first: list[Tensor]) -> Iterator[None]:
    """The running statistics of `module` are those of its first forward in here."""
    buffers = list(running_statistics(module))
    now = [buffer.clone() for buffer in buffers]
    with torch.no_grad():
        for buffer, value in zip(buffers, first, strict=True):
            buffer.copy_(value)
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in zip(buffers, now, strict=True):
                buffer.copy_(value)
