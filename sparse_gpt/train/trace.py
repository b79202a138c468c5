"""`log.trace`: what some steps of rank 0 do, for TensorBoard's profile plugin and Perfetto.

The parts of the model and DeepSpeed's phases have names in it: hooks that are there in those steps
only, so that others pay nothing. Compiled blocks keep their code and have torch's own names.
"""

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from sparse_gpt.errors import DataError
from sparse_gpt.files import new_file
from sparse_gpt.train.checkpoint.manifest import tag_of
from sparse_gpt.train.engine import Engine

_PHASES = {"forward": "forward", "backward": "backward", "step": "optimizer"}
_ALLOCATIONS = 100_000  # of the newest that a memory snapshot has


class Trace:
    """Traces the steps of `config.log.trace`, once a start of the run.

    components: parts of the model by the names that they get.
    """

    def __init__(self, engine: Engine, components: Mapping[str, nn.Module], run_dir: Path) -> None:
        self.settings = engine.config.log.trace if engine.world.rank == 0 else None
        self.engine, self.components = engine, {} if engine.config.compile else components
        self.cuda = engine.world.device.type == "cuda"
        if self.settings:
            tag = tag_of(self.settings.at)
            self.folder = run_dir / "tensorboard" / "plugins" / "profile" / tag
        self._profiler: profile | None = None  # while it traces
        self._left = 0  # steps that it has still to see
        self._begun = False

    @contextmanager
    def around(self, step: int) -> Iterator[None]:
        """Of the step after `step` completed ones: what is in the `with` is traced, if it is to
        be. The step before the first one warms the profiler up, where there is one."""
        before = self.settings.at - 1 - step if self.settings else -1
        if self.settings and not self._begun and before in (0, 1):
            self._begun, self._left = True, before + self.settings.steps
            self._profiler = self._started(before, self.settings.steps)
        if not self._profiler:
            yield
            return
        with self._named():
            yield

    def after_step(self) -> None:
        """Publish the trace after its last step. A disk that does not take it stops nothing."""
        if not self._profiler:
            return
        self._left -= 1
        self._profiler.step()
        if self._left:
            return
        self._profiler.stop()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with new_file(self.folder / "rank-0.pt.trace.json.gz") as aside:
                self._profiler.export_chrome_trace(str(aside))
            if self.cuda:
                with new_file(self.folder / "rank-0.memory.pickle") as aside:
                    torch.cuda.memory._dump_snapshot(str(aside))
            print(f"traced: {self.folder}", flush=True)
        except (OSError, RuntimeError, DataError) as error:
            said = f"warning: log.trace: nothing is kept of it: {error}"
            print(said, file=sys.stderr, flush=True)
        self._profiler = None  # it holds all that it saw
        if self.cuda:
            torch.cuda.memory._record_memory_history(enabled=None)

    def _started(self, warmup: int, steps: int) -> profile:
        os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # else it tells when it begins and ends
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of a first step without one before it
            when = schedule(wait=0, warmup=warmup, active=steps, repeat=1)
        profiler = profile(activities=activities, schedule=when, record_shapes=True)
        profiler.start()
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        return profiler

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Give everything its name inside the `with`."""
        deepspeed = self.engine.deepspeed
        with ExitStack() as undo:
            for method, phase in _PHASES.items():
                setattr(deepspeed, method, _in_range(f"deepspeed {phase}", deepspeed, method))
                undo.callback(delattr, deepspeed, method)
            for name, module in self.components.items():
                for hook in _hooks(name, module):
                    undo.callback(hook.remove)
            yield


def _in_range(name: str, owner: Any, method: str) -> Callable[..., Any]:
    own = getattr(owner, method)

    def named(*arguments: Any, **keywords: Any) -> Any:
        with record_function(name):
            return own(*arguments, **keywords)

    return named


def _hooks(name: str, module: nn.Module) -> Iterator[Any]:
    """Ranges around a module's forward and backward pass."""
    open_ranges: list[record_function] = []

    def enter(name: str) -> Callable[..., None]:
        def hook(*_: object) -> None:
            open_ranges.append(record_function(name))
            open_ranges[-1].__enter__()

        return hook

    def leave(*_: object) -> None:
        open_ranges.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(enter(name))
    yield module.register_forward_hook(leave)
    yield module.register_full_backward_pre_hook(enter(f"{name} backward"))
    yield module.register_full_backward_hook(leave)
