"""How long a sweep will take, from a few steps of each family and size on this very machine."""

import json
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass

from pydantic import TypeAdapter

from sparse_gpt.config.load import to_yaml
from sparse_gpt.config.schema import DurationConfig, LogConfig
from sparse_gpt.errors import ConfigError
from sparse_gpt.files import publish_text, to_json
from sparse_gpt.provenance import provenance
from sparse_gpt.schema import checked
from sparse_gpt.sweep.execute import Trainer
from sparse_gpt.sweep.grid import Cell, Sweep
from sparse_gpt.train.metrics_file import read_metrics

_STEPS = 6


@dataclass(frozen=True)
class Pace:
    """Seconds that a run of one family and size takes: to start and validate, and for a step."""

    start: float
    step: float


_FORM = TypeAdapter(dict[str, Pace])


def calibrate(sweep: Sweep, trainer: Trainer) -> None:
    """Train a few steps of each family and size, as many at a time as the sweep will.

    Writes `calibration.json` into the sweep's folder. What fails is left out.
    """
    shapes = {(cell.family, cell.size): cell for cell in sweep.cells}
    with ThreadPoolExecutor(trainer.jobs) as pool:
        paces = list(pool.map(lambda cell: _measure(sweep, cell, trainer), shapes.values()))
    found = {
        f"{family} {size}": asdict(pace)
        for (family, size), pace in zip(shapes, paces, strict=True)
        if pace
    }
    record = {"jobs": trainer.jobs, "seconds": found, **provenance()}
    publish_text(sweep.out / "calibration.json", to_json(record) + "\n")


def _measure(sweep: Sweep, cell: Cell, trainer: Trainer) -> Pace | None:
    folder = sweep.out / "calibration"
    folder.mkdir(parents=True, exist_ok=True)
    name = f"{cell.family}-{cell.size}-{time.time_ns()}"
    config = cell.config.model_copy(
        update={
            "run_dir": str(folder / name),
            "duration": DurationConfig(steps=_STEPS),
            "log": LogConfig(every=1, profile_every=_STEPS),
        }
    )
    path = folder / f"{name}.yaml"
    publish_text(path, to_yaml(config))
    started = time.monotonic()
    if trainer.train(path, folder / f"{name}.log"):
        return None
    wall = time.monotonic() - started
    rows = [row for row in read_metrics(folder / name) if "perf/step_ms" in row]
    steps = [row["perf/step_ms"] / 1e3 for row in rows]
    # The first steps also warm up, so what they take longer is part of the start.
    step = statistics.median(steps[1:])
    return Pace(wall - step * _STEPS, step)


def estimate(sweep: Sweep) -> dict[str, float] | None:
    """Seconds of each run by name, from the file or the sweep's assumptions; None without either.

    A shape that could not be measured counts as the slowest that could.
    """
    assumed = sweep.config.assumed
    if assumed is not None:
        rate = assumed.devices * assumed.flops_per_second
        return {cell.name: cell.own_flops / rate for cell in sweep.cells}
    path = sweep.out / "calibration.json"
    if not path.exists():
        return None
    try:
        paces = checked(_FORM, json.loads(path.read_text())["seconds"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: is damaged ({error}); measure again with --calibrate") from None
    if not paces:
        return None
    seconds = {}
    for cell in sweep.cells:
        pace = paces.get(f"{cell.family} {cell.size}") or max(paces.values(), key=lambda p: p.step)
        own_steps = cell.steps - (cell.fork_step or 0)
        seconds[cell.name] = pace.start + own_steps * pace.step
    return seconds
