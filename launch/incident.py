"""The step that stopped a run, kept whole so that it can be run again on one process.

    incidents/step-00000012/
      incident.json    why, the loss and gradient norm, and how many ranks there were
      config.yaml      the run's
      weights.pt       of the module before the step, in the run's precision
      rank-N.pt        tokens, targets, documents (if masked), samples (global numbers) and random
                       state before the step

The folder appears whole or not at all.
"""

import json
import math
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
import torch.distributed as dist
from rich.markup import escape
from rich.table import Table
from torch import nn

from data import Batch, load_tokenizer
from launch.checkpoint import set_rng_state, tag_of
from launch.config import DTYPES, RunConfig, load_config, to_yaml
from launch.engine import Engine
from launch.errors import ConfigError
from sparse_gpt import GPT


def write_incident(
    run_dir: Path, engine: Engine, batch: Batch, rng: dict[str, torch.Tensor], step: int
) -> str:
    """Keep the skipped step `step`, which left the weights as they were. Collective.

    rng: of before the step. Returns where it is and how large, in words; a disk that is full or
    broken is said there too, for the run stops anyway.
    """
    world, guard = engine.world, engine.guard
    folder = run_dir / "incidents" / tag_of(step)
    aside = folder.with_name(f".writing-{folder.name}")
    weights = _whole_weights(engine)
    error: OSError | RuntimeError | None = None
    try:
        if world.rank == 0:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
    except OSError as failure:
        error = failure
    dist.barrier()
    try:
        rank = {
            "tokens": batch.tokens.cpu(),
            "targets": batch.targets.cpu(),
            "documents": None if batch.documents is None else batch.documents.cpu(),
            "samples": batch.samples,
            "rng": rng,
        }
        torch.save(rank, aside / f"rank-{world.rank}.pt")
        if world.rank == 0:
            record = {
                "step": step,
                "trouble": guard.trouble,
                "loss": float(guard.loss),
                "grad_norm": float(guard.norm),
                "world_size": world.size,
            }
            torch.save(weights, aside / "weights.pt")
            (aside / "config.yaml").write_text(to_yaml(engine.config))
            (aside / "incident.json").write_text(json.dumps(record, indent=1) + "\n")
    except (OSError, RuntimeError) as failure:  # torch.save says a full disk in a RuntimeError
        error = failure
    failed = world.sum(torch.tensor(int(error is not None), device=world.device))
    if failed:
        return f"{folder} could not be written ({error or 'on another rank'})"
    if world.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)  # of the same step in an earlier start
        aside.rename(folder)
    dist.barrier()
    size = sum(path.stat().st_size for path in folder.iterdir())
    return f"{folder} ({size / 1e6:.1f} MB)"


def _whole_weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The module's saved state on the CPU of rank 0, nothing on the others."""
    from deepspeed.runtime.zero import GatheredParameters

    kept = {}
    for name in engine.module.state_dict():
        tensor = engine.statistics.get(name)
        if tensor is None:
            tensor = engine.module.get_parameter(name)
        with GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if engine.world.rank == 0:
                kept[name] = tensor.detach().cpu().clone()
    return kept


@dataclass(frozen=True)
class SampleResult:
    """One sample of the step, run alone in evaluation mode, so without dropout."""

    sample: int  # its global number
    rank: int
    micro_batch: int
    loss: float
    grad_norm: float
    tokens: list[int]

    @property
    def finite(self) -> bool:
        """Whether loss and gradient are."""
        return math.isfinite(self.loss + self.grad_norm)


_SHOWN = 20  # samples in the table


@dataclass(frozen=True)
class Replay:
    """What a step did then and does now; `samples` has the worst first."""

    step: int
    trouble: str
    recorded: tuple[float, float]  # loss, gradient norm
    replayed: tuple[float, float]
    samples: list[SampleResult]
    config: RunConfig

    @property
    def verdict(self) -> str:
        """In a few lines: then, now, and what follows."""
        then, now = (
            f"loss {loss:.4g}, gradient norm {norm:.4g}"
            for loss, norm in (self.recorded, self.replayed)
        )
        meaning = (
            "the step reproduces: the weights or the samples above are the cause"
            if self.reproduced
            else "the step does not reproduce: suspect a device, or what this process does not "
            "share with the ranks (kernels, communication)"
        )
        return f"then  {then}\nnow   {now}\n{meaning}"

    @property
    def reproduced(self) -> bool:
        """Whether what was not finite still is not, and what was finite is within 1%."""
        return all(
            math.isclose(then, now, rel_tol=1e-2) or not (math.isfinite(then) or math.isfinite(now))
            for then, now in zip(self.recorded, self.replayed, strict=True)
        )


def replay(folder: Path) -> Replay:
    """Run an incident's step again in this process: as the ranks did it, then sample by sample.

    Raises ConfigError if `folder` is no whole incident.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        record = json.loads((folder / "incident.json").read_text())
        config = load_config(folder / "config.yaml")
        weights = torch.load(folder / "weights.pt", weights_only=True)
        ranks: list[dict[str, Any]] = [
            torch.load(folder / f"rank-{rank}.pt", weights_only=True)
            for rank in range(record["world_size"])
        ]
        model = GPT(config.model).to(device, DTYPES[config.precision])
        model.load_state_dict(weights)
    except (OSError, EOFError, UnpicklingError, ValueError, KeyError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"{folder}: is no whole incident ({reason}); give a folder incidents/step-N of a run"
        ) from None
    return Replay(
        step=record["step"],
        trouble=record["trouble"],
        recorded=(record["loss"], record["grad_norm"]),
        replayed=_as_the_ranks(model, weights, ranks, config.batch.micro_batch, device),
        samples=_one_by_one(model, weights, ranks, config.batch.micro_batch, device),
        config=config,
    )


def _as_the_ranks(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    ranks: list[dict[str, Any]],
    micro_batch: int,
    device: torch.device,
) -> tuple[float, float]:
    """Mean loss and gradient norm of the step, each rank with its own random numbers."""
    parameters = list(model.parameters())
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in parameters]
    losses = []
    for rank in ranks:
        model.load_state_dict(weights)  # running statistics move within a step
        if device.type in rank["rng"]:  # else dropout, if any, drops others
            set_rng_state(rank["rng"], device)
        for first in range(0, len(rank["tokens"]), micro_batch):
            losses.append(_backward(model, rank, slice(first, first + micro_batch), device))
            torch._foreach_add_(totals, [p.grad.float() for p in parameters if p.grad is not None])
    norm = torch.nn.utils.get_total_norm(totals) / len(losses)
    return sum(losses) / len(losses), norm.item()


def _one_by_one(
    model: nn.Module,
    weights: dict[str, torch.Tensor],
    ranks: list[dict[str, Any]],
    micro_batch: int,
    device: torch.device,
) -> list[SampleResult]:
    model.load_state_dict(weights)
    model.eval()
    results = []
    for rank, part in enumerate(ranks):
        for row, sample in enumerate(part["samples"].tolist()):
            loss = _backward(model, part, slice(row, row + 1), device)
            grads = [p.grad.float() for p in model.parameters() if p.grad is not None]
            norm = torch.nn.utils.get_total_norm(grads).item()
            tokens = part["tokens"][row].tolist()
            results.append(SampleResult(sample, rank, row // micro_batch, loss, norm, tokens))
    return sorted(results, key=lambda result: (result.finite, -result.grad_norm))


def _backward(model: nn.Module, rank: dict[str, Any], rows: slice, device: torch.device) -> float:
    """The loss of some rows of a rank, whose gradient replaces the parameters' own."""
    model.zero_grad()
    parts = (rank[name] for name in ("tokens", "targets", "documents"))
    loss = model(*(None if part is None else part[rows].to(device) for part in parts))
    loss.backward()
    return loss.item()


def replay_json(found: Replay) -> dict[str, Any]:
    """A replay as `--json` prints it; every sample, without its tokens."""
    keys = ("loss", "grad_norm")
    rows = [{**asdict(result), "finite": result.finite} for result in found.samples]
    return {
        "step": found.step,
        "trouble": found.trouble,
        "reproduced": found.reproduced,
        "recorded": dict(zip(keys, found.recorded, strict=True)),
        "replayed": dict(zip(keys, found.replayed, strict=True)),
        "samples": [{k: v for k, v in row.items() if k != "tokens"} for row in rows],
    }


def replay_table(found: Replay) -> Table:
    """The worst samples, with how each begins: as text if its ids are GPT-2's."""
    tokenizer = load_tokenizer()
    more = len(found.samples) - _SHOWN
    table = Table(
        "sample",
        "rank",
        "micro-batch",
        "loss",
        "gradient norm",
        "begins",
        title=f"step {found.step}: {found.trouble}",
        caption=f"and {more} more, less suspect" if more > 0 else None,
        box=None,
    )
    for result in found.samples[:_SHOWN]:
        first = result.tokens[:16]
        is_gpt2 = found.config.model.vocab_size == tokenizer.vocab_size
        text = repr(tokenizer.decode(first)) if is_gpt2 else " ".join(map(str, first))
        numbers = (result.sample, result.rank, result.micro_batch)
        table.add_row(
            *map(str, numbers),
            f"{result.loss:.4g}",
            f"{result.grad_norm:.4g}",
            escape(text),
            style=None if result.finite else "red",
        )
    return table
