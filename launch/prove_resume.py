"""Does a run that was killed go on as if nothing had happened? Trains it both ways and compares.

    whole     2N steps on w ranks, undisturbed
    cut       killed after the checkpoint of step N, started again on w ranks: equal to the bit
    elastic   killed likewise, started again on w′ ranks: equal but for the order of additions

Compared are losses, gradient norms and a hash of the token ids, step by step, and the last weights.
"""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from launch.checkpoint import load_weights, tag_of
from launch.config import ConfigError, load_config
from launch.run_dir import read_metrics

_CURVES = ("train/loss", "train/grad_norm", "val/loss")
# Relative difference that another order of additions may make over the steps of a proof.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """How a resumed run differs from the whole one.

    step: the checkpoint that it went on from. first_difference: the first step at which a curve
    differs at all, None if none does. loss, weights: largest relative differences, of the losses
    after `step`, and of the last weights (the norm of the difference over the norm).
    """

    name: str
    ranks: tuple[int, int]
    step: int
    same_tokens: bool
    first_difference: int | None
    loss: float
    weights: float

    @property
    def holds(self) -> bool:
        """Whether this is a proof: exact on equal ranks, within TOLERANCE on others."""
        if self.ranks[0] == self.ranks[1]:
            return self.same_tokens and self.first_difference is None and self.weights == 0
        return self.same_tokens and self.loss <= TOLERANCE and self.weights <= TOLERANCE


def prove_resume(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    steps: int,
    ranks: int,
    other_ranks: int,
    between: Callable[[Path], None] = lambda run_dir: None,
) -> list[Comparison]:
    """Train the run of `config` three times for 2 × `steps` steps, in folders below `out`.

    between: called with a run's folder while it is dead. Raises ConfigError where a run fails, or
    ends before it could be killed.
    """
    if any(out.glob("*")):
        raise ConfigError(f"{out}: is not empty; give a new folder with --out, or remove it")
    settings = [
        *overrides,
        f"duration={{steps: {2 * steps}}}",
        f"checkpoint={{every: {steps}}}",
        "log={every: 1, batch_hash: true}",
    ]
    folders = {name: out / name for name in ("whole", "cut", "elastic")}

    def start(name: str, devices: int) -> subprocess.Popen[str]:
        log = (out / f"{name}.log").open("a")
        command = [sys.executable, "-m", "launch", "train", str(config), "--devices", str(devices)]
        command += [*settings, f"run_dir={folders[name]}"]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, text=True)

    def finish(name: str, devices: int) -> None:
        if code := start(name, devices).wait():
            raise ConfigError(f"{name}: ended with exit code {code}; see {out / f'{name}.log'}")

    load_config(config, settings)
    out.mkdir(parents=True, exist_ok=True)
    finish("whole", ranks)
    for name, devices in (("cut", ranks), ("elastic", other_ranks)):
        _kill_after(start(name, ranks), folders[name] / "checkpoints" / tag_of(steps), out)
        between(folders[name])
        finish(name, devices)
    return [
        _compare(name, (ranks, devices), steps, folders["whole"], folders[name])
        for name, devices in (("cut", ranks), ("elastic", other_ranks))
    ]


def _kill_after(process: subprocess.Popen[str], checkpoint: Path, out: Path) -> None:
    """SIGKILL the launcher and every rank as soon as `checkpoint` is there."""
    while not checkpoint.exists():
        if process.poll() is not None:
            raise ConfigError(f"a run ended before {checkpoint.name}; see the logs in {out}")
        time.sleep(0.005)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in family:
        member.kill()
    process.wait()
    psutil.wait_procs(family, timeout=30)
    last = sorted(checkpoint.parent.glob("step-*"))[-1]
    if last != checkpoint:
        raise ConfigError(f"the run reached {last.name} before it could be killed; give more steps")


def _compare(
    name: str, ranks: tuple[int, int], step: int, whole: Path, resumed: Path
) -> Comparison:
    a, b = ({row["step"]: row for row in read_metrics(folder)} for folder in (whole, resumed))
    curves = {at: [row.get(tag) for tag in _CURVES] for at, row in a.items()}
    others = {at: [row.get(tag) for tag in _CURVES] for at, row in b.items()}
    different = [at for at in sorted({*a, *b}) if curves.get(at) != others.get(at)]
    losses = [(a[at]["train/loss"], b[at]["train/loss"]) for at in a if at > step and at in b]
    one, other = (
        load_weights(folder / "checkpoints" / tag_of(2 * step)) for folder in (whole, resumed)
    )
    gap = sum(float((one[key] - other[key]).double().square().sum()) for key in one)
    size = sum(float(value.double().square().sum()) for value in one.values())
    return Comparison(
        name=name,
        ranks=ranks,
        step=step,
        same_tokens=_hashes(a) == _hashes(b) and len(a) == 2 * step + 1,
        first_difference=different[0] if different else None,
        loss=max((abs(x - y) / abs(x) for x, y in losses), default=torch.inf),
        weights=(gap / size) ** 0.5,
    )


def _hashes(rows: dict[int, dict[str, object]]) -> dict[int, object]:
    return {at: row.get("data/batch_hash") for at, row in rows.items()}
