"""A sweep file becomes a grid of runs: families × sizes × learning rates × seeds × budgets.

With a `wsd` schedule the budgets of one family, size, learning rate and seed share their work: the
largest budget's run is the trunk, and each smaller one forks from its checkpoint where its own
cool-down starts (Hägele et al. 2024). A fork equals the same run trained alone, bit for bit.
Budgets in several lists share work within each list: results of one trunk share its noise, too.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from pydantic import Field, ValidationError, model_validator

from sparse_gpt.config.explain import explain
from sparse_gpt.config.load import build_config, read_yaml, to_yaml
from sparse_gpt.config.schema import DataConfig, DurationConfig, RunConfig, Section
from sparse_gpt.errors import ConfigError, DataError
from sparse_gpt.files import publish_text
from sparse_gpt.model.costs import model_report, parameter_counts
from sparse_gpt.model.flops import FlopReport
from sparse_gpt.train.feed import open_data
from sparse_gpt.train.schedule import fall_start

_MOST_RUNS = 10_000


class Limits(Section):
    """Runs outside these are left out of the grid."""

    # Of the parameters that a token uses (`active_parameters`).
    tokens_per_parameter: tuple[float, float] = Field((0.0, math.inf), strict=False)
    training_flops: dict[str, float] = Field({})  # of a family's largest run
    epochs: float = Field(4.0, gt=0)  # Muennighoff et al. 2023: up to 4 are as good as new tokens


class Assumed(Section):
    """What to plan with where nothing can be measured."""

    devices: int = Field(gt=0)
    flops_per_second: float = Field(gt=0)  # that one device reaches in training


class SweepConfig(Section):
    """A sweep file. Overrides are written `section.key: value`, as on the command line."""

    run: dict[str, Any]  # what all runs share, as in a run file
    families: dict[str, dict[str, Any]] = Field(min_length=1)  # name -> overrides
    sizes: dict[str, dict[str, Any]] = Field(min_length=1)  # name -> overrides
    # Training FLOPs of a run, logits counted; budgets of one inner list share a trunk.
    budgets: list[float] | list[list[float]]
    lr: list[float] | dict[str, list[float]]  # peak learning rates, for all or by family
    seeds: list[int] = Field([0], min_length=1)
    baseline: str  # the family that the others are compared with
    limits: Limits = Limits()
    assumed: Assumed | None = None

    @model_validator(mode="after")
    def _families_are_there(self) -> "SweepConfig":
        named = {"baseline": [self.baseline], "limits.training_flops": self.limits.training_flops}
        if isinstance(self.lr, dict):
            named["lr"] = list(self.lr)
            if missing := self.families.keys() - self.lr.keys():
                raise ValueError(f"lr: names no learning rates for family {sorted(missing)[0]!r}")
        for key, names in named.items():
            for name in names:
                if name not in self.families:
                    families = ", ".join(self.families)
                    raise ValueError(f"{key}: there is no family {name!r}; there are {families}")
        if not all(self.budget_lists):
            raise ValueError(f"budgets: {self.budgets} has an empty list")
        for key, values in (("budgets", self.all_budgets), ("seeds", self.seeds)):
            if len(set(values)) < len(values):
                raise ValueError(f"{key}: {values} has a value twice")
        rates = [len(self.rates(family)) for family in self.families]
        if not all(rates):
            raise ValueError(f"lr: {self.lr} has an empty list")
        runs = sum(rates) * len(self.sizes) * len(self.seeds) * len(self.all_budgets)
        if runs > _MOST_RUNS:
            raise ValueError(f"the grid has {runs:,} runs; {_MOST_RUNS:,} are the most")
        if min(self.all_budgets) <= 0:
            raise ValueError(f"budgets: {min(self.all_budgets):g} must be above 0")
        return self

    @property
    def budget_lists(self) -> list[list[float]]:
        """The budgets that share a trunk, list by list."""
        if self.budgets and isinstance(self.budgets[0], list):
            return self.budgets
        return [cast(list[float], self.budgets)]

    @property
    def all_budgets(self) -> list[float]:
        """The budgets of all lists."""
        return [budget for budgets in self.budget_lists for budget in budgets]

    def rates(self, family: str) -> list[float]:
        """The peak learning rates to try for a family."""
        return self.lr[family] if isinstance(self.lr, dict) else self.lr


@dataclass(frozen=True)
class Cell:
    """One run of the grid."""

    chain: str
    family: str
    size: str
    lr: float
    seed: int
    budget: float  # training FLOPs asked for; whole steps make it a little more or less
    config: RunConfig
    config_path: Path
    fork_step: int | None  # of the trunk; None for the trunk itself

    @property
    def name(self) -> str:
        return self.run_dir.name

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run_dir)

    @property
    def steps(self) -> int:
        assert self.config.duration.steps is not None
        return self.config.duration.steps

    @property
    def tokens(self) -> int:
        return self.steps * self.config.batch.global_tokens

    @property
    def report(self) -> FlopReport:
        """FLOPs of one sequence."""
        return model_report(self.config.model)

    @property
    def tokens_per_parameter(self) -> float:
        """Of the parameters that a token uses."""
        return self.tokens / parameter_counts(self.config.model).active

    @property
    def training_flops(self) -> float:
        return self.report.training / self.report.seq * self.tokens

    @property
    def own_flops(self) -> float:
        """What this run computes itself, beyond what it takes over from the trunk."""
        return self.training_flops * (1 - (self.fork_step or 0) / self.steps)


@dataclass(frozen=True)
class Sweep:
    """A sweep file with its grid; `chains` hold the trunk first, then its forks."""

    path: Path
    out: Path
    config: SweepConfig
    chains: list[list[Cell]]
    left_out: list[str]  # a line a shape and budget, or a family's limit: why, how many runs

    @property
    def cells(self) -> list[Cell]:
        return [cell for chain in self.chains for cell in chain]


def read_sweep(path: Path, out: Path | None = None) -> Sweep:
    """Read a sweep file and lay out its grid under `out` (default `runs/<name of the file>`).

    Raises ConfigError naming the file and key. Writes nothing.
    """
    try:
        config = SweepConfig(**read_yaml(path))
    except ValidationError as error:
        raise ConfigError(f"{path}: {explain(error, SweepConfig)}") from None
    out = out or Path("runs") / path.stem
    grid = _Grid(path, out, config, _data_tokens(config))
    chains = [
        chain
        for family in config.families
        for size in config.sizes
        for lr in config.rates(family)
        for seed in config.seeds
        for budgets in config.budget_lists
        for chain in grid.chains(family, size, lr, seed, budgets)
    ]
    if not chains:
        raise ConfigError(f"{path}: every run is left out; the first: {next(iter(grid.left_out))}")
    left_out = [f"{line} ({count} runs)" for line, count in grid.left_out.items()]
    return Sweep(path, out, config, chains, left_out)


@dataclass
class _Grid:
    path: Path
    out: Path
    config: SweepConfig
    data_tokens: int | None
    left_out: Counter[str] = field(default_factory=Counter)

    def chains(
        self, family: str, size: str, lr: float, seed: int, budgets: list[float]
    ) -> list[list[Cell]]:
        """One chain of a trunk and its forks; a chain a run where the schedule lets none share."""
        shape = {**self.config.families[family], **self.config.sizes[size]}
        changes = {**shape, "optimizer.lr": lr, "seed": seed}
        name = f"{family}-{size}-lr{lr:g}-s{seed}"
        several = len(self.config.budget_lists) > 1
        chain = f"{name}-{short(max(budgets))}" if several else name
        cells: list[Cell] = []
        for budget in sorted(budgets, reverse=True):
            label = f"{name}-{short(budget)}"
            run = self._run({**changes, "run_dir": str(self.out / "runs" / label)})
            report = model_report(run.model)
            steps = max(1, round(budget / (report.training / report.seq) / run.batch.global_tokens))
            try:
                duration = DurationConfig(steps=steps)
            except ValidationError as error:
                said = explain(error, DurationConfig)
                raise ConfigError(f"{self.path}: budgets: {budget:g} for {size}: {said}") from None
            run = run.model_copy(update={"duration": duration})
            if budget > (most := self.config.limits.training_flops.get(family, math.inf)):
                self.left_out[f"{family} above {short(most)} FLOPs, its limit"] += 1
                continue
            if why := self._unfit(run, steps):
                self.left_out[f"{family} {size} at {short(budget)} FLOPs: {why}"] += 1
                continue
            shares = run.schedule.kind == "wsd"
            cells.append(
                Cell(
                    chain=chain if shares else label,
                    family=family,
                    size=size,
                    lr=lr,
                    seed=seed,
                    budget=budget,
                    config=run,
                    config_path=self.out / "configs" / f"{label}.yaml",
                    fork_step=fall_start(steps, run.schedule) if shares and cells else None,
                )
            )
        if not cells or cells[0].config.schedule.kind != "wsd":
            return [[cell] for cell in cells]
        trunk, *forks = cells
        at = tuple(sorted(fork.fork_step or 0 for fork in forks))
        checkpoint = trunk.config.checkpoint.model_copy(update={"at": at})
        config = trunk.config.model_copy(update={"checkpoint": checkpoint})
        return [[replace(trunk, config=config), *forks]]

    def _run(self, changes: Mapping[str, Any]) -> RunConfig:
        defaults = {"optimizer.lr": 1.0, "duration.steps": 1, "run_dir": "runs"}
        overrides = [f"{key}={json.dumps(value)}" for key, value in {**defaults, **changes}.items()]
        return build_config(self.path, self.config.run, overrides)

    def _unfit(self, run: RunConfig, steps: int) -> str | None:
        """Why a run is left out, or None."""
        parameters = parameter_counts(run.model).active
        tokens, limits = steps * run.batch.global_tokens, self.config.limits
        warmup = run.schedule.warmup_steps
        if (fall_start(steps, run.schedule) if run.schedule.kind == "wsd" else steps) <= warmup:
            return f"too large for the budget: {steps} steps, of which {warmup} are warm-up"
        low, high = limits.tokens_per_parameter
        if not low <= tokens / parameters <= high:
            return f"{tokens / parameters:.3g} tokens a parameter, outside {low:g} to {high:g}"
        if self.data_tokens is not None and tokens > limits.epochs * self.data_tokens:
            return f"{tokens / self.data_tokens:.3g} epochs of the data, above {limits.epochs:g}"
        return None


def _data_tokens(config: SweepConfig) -> int | None:
    """Tokens of training until a source has been read once; None where the data are not here."""
    try:
        return open_data(DataConfig.model_validate(config.run.get("data"))).epoch_tokens
    except (DataError, ValidationError):
        return None


def short(number: float) -> str:
    """A number as a name: 2e12."""
    return f"{number:.4g}".replace("e+", "e")


def write_configs(sweep: Sweep) -> None:
    """The run file of every cell, under `configs/` of the sweep's folder. What is there already is
    left alone: tasks of a Slurm array may be reading it."""
    (sweep.out / "configs").mkdir(parents=True, exist_ok=True)
    for cell in sweep.cells:
        path, text = cell.config_path, to_yaml(cell.config)
        if not path.exists() or path.read_text() != text:
            publish_text(path, text)
