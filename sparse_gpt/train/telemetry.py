"""What a run says, on rank 0: rows for the record and TensorBoard, and one line a step."""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from textwrap import indent
from types import TracebackType
from typing import Any

import psutil
import torch
from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from sparse_gpt.config.load import to_yaml
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.model.costs import flops_scalars, model_summary
from sparse_gpt.model.flops import FlopReport
from sparse_gpt.train.distributed import World
from sparse_gpt.train.metrics_file import MetricsFile, Row
from sparse_gpt.train.trackers.follow import Trackers
from sparse_gpt.train.trackers.stores import flat

# A loss curve against steps says little between models of other costs: against compute it does.
_AGAINST_COMPUTE = {"train/loss": "compute/train_loss", "val/loss": "compute/val_loss"}

_HYPERPARAMETERS = {"model", "optimizer", "schedule", "batch", "precision", "seed"}

_LAYOUT = {
    "Loss": {
        "loss by step": ["Multiline", ["train/loss", "val/loss"]],
        "loss by training GFLOPs": ["Multiline", ["compute/train_loss", "compute/val_loss"]],
    },
    "Routing": {
        "fullest block over the mean": ["Multiline", [r"routing/block_\d+/load_max_over_mean"]],
        "blocks without a token": ["Multiline", [r"routing/block_\d+/dead_blocks"]],
        "entropy of the energies, nats": ["Multiline", [r"routing/block_\d+/energy_entropy"]],
    },
    "Cost": {
        "forward FLOPs a token, first block": ["Multiline", [r"flops/block_00/(?!vs_dense).*"]],
        "forward ms, first block": ["Multiline", [r"time/block_00/.*"]],
        "share computed, first block": ["Multiline", [r"sparsity/block_00/.*"]],
        "tokens a second": ["Multiline", ["perf/tokens_per_second"]],
    },
}

_BLEND_LAYOUT = {
    "Loss by source": {"validation loss of each source": ["Multiline", [r"val/loss/.*"]]},
}


class Telemetry:
    """The log of a run; use as a context manager. On ranks other than 0 it does nothing."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        world: World,
        report: FlopReport,
        total_steps: int,
        resume_step: int,
    ) -> None:
        self.world, self.total_steps = world, total_steps
        self.tokens_per_step = config.batch.global_tokens
        self.flops_per_step = report.training / report.seq * self.tokens_per_step
        self._flops = flops_scalars(report, config.model)
        self._mark = time.perf_counter()
        self._marked_step = resume_step
        self._data_wait = 0.0
        self.config, self._summary = config, model_summary(config.model)
        self._layout = {**_LAYOUT, **(_BLEND_LAYOUT if config.data.blend else {})}
        if config.dictionary is None:
            del self._layout["Routing"]
        world.from_rank_0(partial(self._open, run_dir, resume_step))

    def _open(self, run_dir: Path, resume_step: int) -> None:
        self._metrics_file = MetricsFile(run_dir, resume_step, self._begin, self._draw)
        settings = {**self.config.model_dump(mode="json"), **self._summary}
        self._trackers = Trackers(self.config.log.trackers, run_dir, settings, self._points)

    def __enter__(self) -> "Telemetry":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.world.rank == 0:
            self._metrics_file.close()
            self._trackers.close(finished=kind is None)

    @property
    def lost(self) -> str | None:
        """Why nothing more can be kept in the run's folder, once that is so."""
        return self._metrics_file.lost if self.world.rank == 0 else None

    @contextmanager
    def data_wait(self) -> Iterator[None]:
        """Time spent waiting for the next batch."""
        start = time.perf_counter()
        yield
        self._data_wait += time.perf_counter() - start

    @contextmanager
    def untimed(self) -> Iterator[None]:
        """Validation and checkpoints: not part of the time of a step."""
        start = time.perf_counter()
        yield
        self._mark += time.perf_counter() - start

    def rewind(self, step: int) -> None:
        """The run goes on from the state after `step`: what came later is dropped."""
        self._mark, self._marked_step, self._data_wait = time.perf_counter(), step, 0.0
        if self.world.rank == 0:
            self._metrics_file.rewind(step)

    def speed(self, step: int) -> dict[str, float]:
        """`perf/...` since the last call. The device must have finished: read a value from it."""
        now = time.perf_counter()
        steps, seconds = step - self._marked_step, now - self._mark
        flops = steps * self.flops_per_step / seconds
        speed = {
            "perf/step_ms": seconds / steps * 1e3,
            "perf/data_wait_ms": self._data_wait / steps * 1e3,
            "perf/tokens_per_second": steps * self.tokens_per_step / seconds,
            "perf/tflops": flops / 1e12,
        }
        if self.world.peak_flops:
            speed["perf/mfu"] = flops / (self.world.peak_flops * self.world.size)
        self._mark, self._marked_step, self._data_wait = now, step, 0.0
        return speed

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Record `metrics`, which are of the state after `step` completed steps."""
        if self.world.rank == 0:
            row: dict[str, Any] = {
                "step": step,
                "tokens": step * self.tokens_per_step,
                "gflops": step * self.flops_per_step / 1e9,
                "time": time.time(),
                **metrics,
                **_memory(self.world.device),
            }
            self._metrics_file.add(row)
            print(self._line(row), flush=True)

    def _begin(self, board: SummaryWriter) -> None:
        board.add_custom_scalars(self._layout)
        settings = flat(self.config.model_dump(mode="json", include=_HYPERPARAMETERS))
        for summary in hparams(settings, {"val/loss": 0, "train/loss": 0})[:2]:
            board._get_file_writer().add_summary(summary)  # add_hparams adds points
        board.add_text("config", indent(to_yaml(self.config), "    "))  # Markdown's for code
        lines = [f"|{name}|{number:,.0f}|" for name, number in flat(self._summary).items()]
        board.add_text("model", "\n".join(["|parameters, FLOPs a token||", "|:--|--:|", *lines]))

    def _draw(self, board: SummaryWriter, row: Row) -> None:
        for tag, value, place in self._points(row):
            board.add_scalar(tag, value, place, row["time"])

    def _points(self, row: Row) -> Iterator[tuple[str, float, int]]:
        """What is drawn of a row: tags, their values, and where: at its step or its GFLOPs."""
        for tag, value in row.items():
            if "/" in tag:
                yield tag, value, row["step"]
        for tag, against_compute in _AGAINST_COMPUTE.items():
            if tag in row:
                yield against_compute, row[tag], round(row["gflops"])
        if any(tag.startswith("time/") for tag in row):
            for tag, flops in self._flops.items():
                yield tag, flops, row["step"]

    def _line(self, row: Mapping[str, Any]) -> str:
        width = len(str(self.total_steps))
        parts = [f"step {row['step']:>{width}}/{self.total_steps}"]
        for tag, form in _CONSOLE.items():
            if tag in row:
                parts.append(form.format(row[tag]))
        if "perf/step_ms" in row:
            seconds = int((self.total_steps - row["step"]) * row["perf/step_ms"] / 1e3)
            parts.append(f"ETA {seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}")
        if "val/loss" in row:
            parts.append(f"| validation loss {row['val/loss']:.4f}")
        return "  ".join(parts)


_CONSOLE = {
    "train/loss": "loss {:.4f}",
    "train/learning_rate": "lr {:.2e}",
    "train/grad_norm": "grad {:.2f}",
    "perf/tokens_per_second": "{:,.0f} tok/s",
    "perf/tflops": "{:.3f} TFLOP/s",
    "perf/mfu": "MFU {:.1%}",
}


def _memory(device: torch.device) -> dict[str, float]:
    memory = {"memory/rss_gb": psutil.Process().memory_info().rss / 1e9}
    if device.type == "cuda":
        memory["memory/device_allocated_gb"] = torch.cuda.memory_allocated(device) / 1e9
        memory["memory/device_peak_gb"] = torch.cuda.max_memory_allocated(device) / 1e9
        memory["memory/device_reserved_gb"] = torch.cuda.memory_reserved(device) / 1e9
    return memory
