"""The step that stopped a run, run again in one process: does it go wrong, for which samples."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from rich.markup import escape
from rich.table import Table
from torch import nn

from sparse_gpt.config.load import load_config
from sparse_gpt.config.schema import RunConfig
from sparse_gpt.data import load_tokenizer
from sparse_gpt.errors import ConfigError
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train.checkpoint.random_state import set_rng_state
from sparse_gpt.train.precision import DTYPES


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
        recorded=(_number(record["loss"]), _number(record["grad_norm"])),
        replayed=_as_the_ranks(model, weights, ranks, config.batch.micro_batch, device),
        samples=_one_by_one(model, weights, ranks, config.batch.micro_batch, device),
        config=config,
    )


def _number(found: float | None) -> float:
    """As it was before JSON had it, but that an infinity is NaN."""
    return math.nan if found is None else found


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
    return float(loss.item())


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
