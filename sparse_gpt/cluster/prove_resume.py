"""Does a run that was killed go on as if nothing had happened? Trains it both ways and compares.

    whole     2N steps on w ranks, undisturbed
    killed    N steps on w ranks: SIGKILL of every process after the checkpoint
    cut       the killed run, started again on w ranks: equal to the bit
    elastic   the killed run, started again on w′ ranks: equal but for the order of additions
    unshared  where blocks are over ranks: on w ranks that each hold all of them; equal likewise

Compared are losses, gradient norms and a hash of the token ids, step by step, and the last weights.
"""

import math
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.train.checkpoint.manifest import tag_of
from sparse_gpt.train.checkpoint.weights import load_weights
from sparse_gpt.train.metrics_file import read_metrics

_CURVES = ("train/loss", "train/grad_norm", "val/loss")
# Relative difference that another order of additions may make over the steps of a proof.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Comparison:
    """How a resumed run differs from the whole one.

    exact: whether it must not at all. step: the checkpoint that it went on from. first_difference:
    the first step at which a curve differs, None if none does. loss, weights: largest relative
    differences, of the losses after `step`, and of the last weights (the norm of the difference
    over the norm).
    """

    name: str
    ranks: tuple[int, int]
    exact: bool
    step: int
    same_tokens: bool
    first_difference: int | None
    loss: float
    weights: float

    @property
    def holds(self) -> bool:
        """Whether this is a proof: exact if the ranks share alike, else within TOLERANCE."""
        if self.exact:
            return self.same_tokens and self.first_difference is None and self.weights == 0
        return self.same_tokens and self.loss <= TOLERANCE and self.weights <= TOLERANCE


class Proof:
    """Runs of 2 × `steps` steps in folders below `out`, and how they differ from the whole one.

    Raises ConfigError for a bad configuration, where `out` is not empty, where a run fails, and
    where one ends before it could be killed.
    """

    def __init__(
        self, config: Path, overrides: Sequence[str], out: Path, steps: int, ranks: int
    ) -> None:
        self.config, self.out, self.steps, self.ranks = config, out, steps, ranks
        self.settings = [
            *overrides,
            f"duration={{steps: {2 * steps}}}",
            f"checkpoint={{every: {steps}}}",
            "log={every: 1, batch_hash: true}",
        ]
        self.blocks = load_config(config, self.settings).parallel.blocks
        if any(out.glob("*")):
            raise ConfigError(f"{out}: is not empty; give a new folder with --out, or remove it")
        out.mkdir(parents=True, exist_ok=True)

    def train(self) -> None:
        """Train the run that others are compared with, and the one that they go on from."""
        self._finish("whole", self.ranks)
        self._kill_after(self._start("killed", self.ranks), self.out / "killed" / "checkpoints")

    def resumed(
        self,
        name: str,
        ranks: int,
        between: Callable[[Path], None] = lambda run_dir: None,
        shared: bool = True,
    ) -> Comparison:
        """Go on from the killed run with `ranks` ranks, in a folder `name` of its own; compare.

        between: called with that folder before the run is started again. shared: blocks are over as
        many of these ranks as they were, or as is possible; else each rank has all.
        """
        folder = self.out / name
        shutil.copytree(self.out / "killed", folder)
        between(folder)
        own = []
        if isinstance(self.blocks, int) and (ranks, shared) != (self.ranks, True):
            own = [f"parallel.blocks={math.gcd(self.blocks, ranks) if shared else 1}"]
        self._finish(name, ranks, *own)
        exact = ranks == self.ranks and shared
        return _compare(name, (self.ranks, ranks), exact, self.steps, self.out / "whole", folder)

    def _start(self, name: str, ranks: int, *own: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "sparse_gpt", "train", str(self.config)]
        command += ["--devices", str(ranks), *self.settings, *own, f"run_dir={self.out / name}"]
        with self._log(name).open("ab") as log:
            return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def _finish(self, name: str, ranks: int, *own: str) -> None:
        if code := self._start(name, ranks, *own).wait():
            raise ConfigError(f"{name}: ended with exit code {code}; see {self._log(name)}")

    def _log(self, name: str) -> Path:
        return self.out / f"{name}.log"

    def _kill_after(self, process: subprocess.Popen[bytes], checkpoints: Path) -> None:
        """SIGKILL the launcher and every rank as soon as the checkpoint is there."""
        wanted = checkpoints / tag_of(self.steps)
        while not wanted.exists():
            if process.poll() is not None:
                raise ConfigError(f"{checkpoints}: the run ended before step {self.steps}")
            time.sleep(0.005)
        launcher = psutil.Process(process.pid)
        family = [*launcher.children(recursive=True), launcher]
        for member in family:
            member.kill()
        process.wait()
        psutil.wait_procs(family, timeout=30)
        if (checkpoints / tag_of(2 * self.steps)).exists():
            raise ConfigError(f"{checkpoints}: the run ended before its kill; give more --steps")


def _compare(
    name: str, ranks: tuple[int, int], exact: bool, step: int, whole: Path, resumed: Path
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
        exact=exact,
        step=step,
        same_tokens=_hashes(a) == _hashes(b) and len(a) == 2 * step + 1,
        first_difference=different[0] if different else None,
        loss=max((abs(x - y) / abs(x) for x, y in losses), default=torch.inf),
        weights=(gap / size) ** 0.5,
    )


def _hashes(rows: dict[int, dict[str, object]]) -> dict[int, object]:
    return {at: row.get("data/batch_hash") for at, row in rows.items()}
