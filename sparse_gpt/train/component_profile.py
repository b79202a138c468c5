"""What a step does inside: time and measured sparsity of every component, on sampled steps only.

Hooks are attached for one step and removed, so that other steps pay nothing. Compiled blocks have
no components any more: a sampled step runs them as they are written.
"""

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.model.flops import FlopReport


def moment(device: torch.device) -> Any:
    """A point in the work of a device, to measure from. Waits for nothing."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def milliseconds(spans: Iterable[tuple[Any, Any]], device: torch.device) -> float:
    """From one moment to the other, summed over pairs of them. Waits for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return float(sum(start.elapsed_time(end) for start, end in spans))
    return float(sum((end - start) * 1e3 for start, end in spans))


class ComponentProfile:
    """Measures the components of a model's blocks, those that its FLOP report names."""

    def __init__(self, model: nn.Module, report: FlopReport, device: torch.device) -> None:
        self.device = device
        self.blocks = list(model.get_submodule("blocks").children())
        self.components = {
            f"block_{number:02}/{name}": model.get_submodule(f"blocks.{number}.{name}")
            for number, block in enumerate(report.blocks())
            for name in block
        }
        self._begun: dict[str, Any] = {}
        self._spans: dict[str, list[tuple[Any, Any]]] = defaultdict(list)
        self._measured: dict[str, list[torch.Tensor]] = defaultdict(list)

    @contextmanager
    def attached(self, sampled: bool) -> Iterator[None]:
        """On a sampled step, measure every forward pass inside the `with`."""
        self._begun.clear()
        self._spans.clear()
        self._measured.clear()
        if not sampled:
            yield
            return
        hooks = []
        for name, module in self.components.items():
            hooks.append(module.register_forward_pre_hook(self._begin(name)))
            hooks.append(module.register_forward_hook(self._end(name)))
            if hasattr(module, "sparsity"):
                hooks.append(
                    module.register_forward_hook(self._measure("sparsity", name, module.sparsity))
                )
            if isinstance(module, BlockDictionary):
                name = f"{name.split('/')[0]}/energy_entropy"
                hooks.append(
                    module.register_forward_hook(
                        self._measure("routing", name, module.energy_entropy)
                    )
                )
        # Compiled code is set aside and kept: the next step compiles nothing anew. (The stance
        # `force_eager` would set FlexAttention's aside too, which without it makes all scores.)
        compiled = [block._compiled_call_impl for block in self.blocks]
        for block in self.blocks:
            block._compiled_call_impl = None
        try:
            yield
        finally:
            for block, code in zip(self.blocks, compiled, strict=True):
                block._compiled_call_impl = code
            for hook in hooks:
                hook.remove()

    def metrics(self) -> dict[str, float]:
        """`time/...`: forward milliseconds of the step; `sparsity/...`: share that was used;
        `routing/block_NN/energy_entropy`: mean over its tokens, in nats.

        Empty after a step that was not sampled.
        """
        result = {}
        for name, spans in self._spans.items():
            result[f"time/{name}"] = milliseconds(spans, self.device)
        for name, shares in self._measured.items():
            result[name] = torch.stack(shares).float().mean().item()
        return result

    def _begin(self, name: str) -> Any:
        def hook(*_: object) -> None:
            self._begun[name] = moment(self.device)

        return hook

    def _end(self, name: str) -> Any:
        """A second forward, for the backward, ends where all is there that it needs: its last
        component may have begun only."""

        def hook(*_: object) -> None:
            self._spans[name].append((self._begun.pop(name), moment(self.device)))

        return hook

    def _measure(self, group: str, name: str, measure: Any) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], __: torch.Tensor) -> None:
            with torch.no_grad():
                self._measured[f"{group}/{name}"].append(measure(inputs[0]))

        return hook
