"""What forward passes move without a gradient, kept the same on all ranks: once an update."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.train.distributed import World


class RunningStatistics:
    """The saved buffers of a model: running scalars, and how the blocks of dictionaries are used.

    Each rank sees other tokens, and a checkpoint holds one copy. After an update scalars are the
    ranks' mean, loads their sum, and the balance moves by it; an update that was not made leaves
    all as it was.
    """

    def __init__(self, module: nn.Module, saved: Iterable[str], world: World) -> None:
        names = set(saved)
        self.world = world
        self.buffers = {name: b for name, b in module.named_buffers() if name in names}
        self.dictionaries = {
            name: part for name, part in module.named_modules() if isinstance(part, BlockDictionary)
        }
        self._scalars = [b for b in self.buffers.values() if b.is_floating_point()]
        self._loads = [part.loads for part in self.dictionaries.values()]
        self._before: list[Tensor] = []

    def begin(self) -> None:
        """Before the micro-batches of a step."""
        self._before = [buffer.clone() for buffer in self.buffers.values()]
        for loads in self._loads:
            loads.zero_()

    @torch.no_grad()
    def end(self, applied: bool) -> None:
        """After its update. Collective."""
        if not applied:
            _copy(self.buffers.values(), self._before)
            return
        if self._scalars:
            _copy(self._scalars, self.world.mean(torch.stack(self._scalars)))
        if self._loads:
            _copy(self._loads, self.world.sum(torch.stack(self._loads)))
            for dictionary in self.dictionaries.values():
                dictionary.balance()

    def copies(self) -> dict[str, Tensor]:
        """All of them by name, on the CPU."""
        return {name: b.to("cpu", copy=True) for name, b in self.buffers.items()}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Take over what `copies` gave. Raises KeyError for another model's."""
        _copy(self.buffers.values(), [saved[name] for name in self.buffers])

    def routing(self) -> dict[str, float]:
        """`routing/block_NN/...` of the last step, over all ranks and micro-batches: the load of
        the fullest block over the mean, and how many got nothing. Waits for the device."""
        found = {}
        if self._loads:
            for number, loads in enumerate(torch.stack(self._loads).double().cpu()):
                prefix = f"routing/block_{number:02}"
                found[f"{prefix}/load_max_over_mean"] = (loads.max() / loads.mean()).item()
                found[f"{prefix}/dead_blocks"] = float((loads == 0).sum())
        return found


def _copy(buffers: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for buffer, value in zip(buffers, values, strict=True):
        buffer.copy_(value)
