"""Checkpoints that are whole or not there, written while training goes on.

    checkpoints/step-00000100/   rank-0.pt … one a rank, manifest.json
    checkpoints/latest           names the newest

A save copies this rank's fragments and goes on; a thread writes the copy into a hidden folder,
hashes it and fsyncs. When every rank's is there, rank 0 writes the manifest and renames the folder.
What has no valid manifest is not loaded: the one before it is. Files hold tensors and numbers only,
and are read as such (`weights_only`). A run of another world size, ZeRO stage or micro-batch reads
them too.
"""

import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch

from sparse_gpt.errors import ConfigError
from sparse_gpt.files import LOST, TEMPORARY, publish, publish_text, sync, temporary
from sparse_gpt.train.checkpoint.manifest import (
    TrainState,
    damage,
    file_hash,
    read_manifest,
    step_of,
    tag_of,
    tags,
    write_manifest,
)
from sparse_gpt.train.checkpoint.random_state import rng_state, set_rng_state
from sparse_gpt.train.checkpoint.zero_state import restore, snapshot
from sparse_gpt.train.engine import Engine
from sparse_gpt.train.votes import Votes


class CheckpointError(RuntimeError):
    """A checkpoint that had to be written was not; the message is one line for the user."""


class Checkpoints:
    """The `checkpoints/` folder of a run. What is said to be collective is called by every rank.

    origin: what the manifest says of where a checkpoint came from, besides its position.
    """

    def __init__(self, root: Path, engine: Engine, origin: Mapping[str, Any]) -> None:
        self.root, self.engine, self.origin = root, engine, origin
        self.config, self.world = engine.config.checkpoint, engine.world
        self.votes = Votes(self.world)
        self.retry_at: int | None = None  # the step of the next try after a failed one
        self._threads = ThreadPoolExecutor(1, "checkpoint")
        self._writing: tuple[TrainState, Future[None]] | None = None

    @property
    def writing(self) -> bool:
        """Whether this rank's part of a checkpoint is still being written."""
        return self._writing is not None and not self._writing[1].done()

    def after_step(
        self, state: TrainState, last: bool, stop: bool, lost: str | None = None
    ) -> bool:
        """Publish what has been written and save what is due. Collective, after every step.

        stop: whether this rank was told to. lost: why nothing can be kept in the run's folder, as
        far as this rank knows. Returns whether the run stops here, before its end,
        on all ranks alike, its checkpoint published. Raises CheckpointError if the checkpoint of
        the last step, or of a stop, could not be written, and ConfigError if none can be any more.
        """
        # The answer is to the votes of the step before; none where a save began since.
        flags = self.votes.cast(stop, self.writing, lost is not None)
        anyone_stops, anyone_writes, is_lost = flags or (False, True, False)
        if is_lost:
            self._end_lost(lost)
        if not anyone_writes:
            self.publish()
        if anyone_stops or last or self._due(state.step):
            self.save(state)
        if anyone_stops or last:
            self.finish()
        return anyone_stops and not last

    def _due(self, step: int) -> bool:
        return step % self.config.every == 0 or step in self.config.at or step == self.retry_at

    def save(self, state: TrainState) -> None:
        """Copy the state and begin to write it, once the save before is done. Collective."""
        self.publish()
        self.retry_at = None
        copy = {
            **snapshot(self.engine.deepspeed, self.world.rank, self.world.size),
            "rng": rng_state(self.world.device),
            "engine": self.engine.statistics_and_scale(),
        }
        writing: Future[None] = Future()
        if self.world.rank == 0:
            try:
                self.root.mkdir(exist_ok=True)  # in the run's folder, if that is still there
                for leftover in self.root.glob(f"{TEMPORARY}step-*"):
                    shutil.rmtree(leftover)
            except OSError as error:
                writing.set_exception(error)
        (failed,) = self.votes.now(writing.done())
        if not failed:
            path = self._aside(state) / f"rank-{self.world.rank}.pt"
            writing = self._threads.submit(_write_file, path, copy)
        elif not writing.done():
            writing.set_result(None)
        self._writing = state, writing

    def publish(self) -> None:
        """Wait for what is being written and make it the newest checkpoint. Collective.

        Where a rank could not write, the try is dropped, said loudly, and made again later; the
        checkpoints before stay. Raises ConfigError where waiting does not help.
        """
        if self._writing is None:
            return
        state, writing = self._writing
        self._writing = None
        error = writing.exception()
        (failed,) = self.votes.now(error is not None)
        if not failed and self.world.rank == 0:
            try:
                self._publish(state)
            except OSError as problem:
                error = problem
        (failed,) = self.votes.now(failed or error is not None)
        if not failed:
            return
        lost = error if isinstance(error, OSError) and error.errno in LOST else None
        if self.votes.now(lost is not None) == [True]:
            self._end_lost(f"{lost.filename}: {lost.strerror}" if lost else None)
        if error is not None:
            reason = str(error).splitlines()[0]
            print(
                f"warning: {self.root / tag_of(state.step)} could not be written by rank "
                f"{self.world.rank} ({reason}); training goes on, the checkpoints before are kept. "
                "Free some disk space",
                file=sys.stderr,
                flush=True,
            )
        if self.world.rank == 0:
            shutil.rmtree(self._aside(state), ignore_errors=True)
        self.retry_at = state.step + max(1, self.config.every // 10)

    def finish(self) -> None:
        """Publish the save that must not be lost. Collective. Raises CheckpointError."""
        if self._writing is None:
            return
        state = self._writing[0]
        self.publish()
        self._threads.submit(int).result()  # what is removed is gone when the process ends
        if self.retry_at is not None:
            raise CheckpointError(
                f"{self.root / tag_of(state.step)}: the last checkpoint could not be written; free "
                "some disk space and start the run again: it goes on from the one before"
            )

    def load_newest(self) -> TrainState:
        """Restore the newest whole checkpoint; TrainState() where there was never one. Collective.

        Raises ConfigError for a checkpoint of another model, for one that cannot be read now, and
        where there were checkpoints and none of them is whole.
        """
        while (tag := self.world.from_rank_0(self._newest)) is not None:
            folder = self.root / tag
            manifest = self.world.from_rank_0(partial(read_manifest, folder))
            found = self._damage(folder, manifest)
            if self.votes.now(found is not None) == [False]:
                return self._load(folder, manifest)
            if found and (manifest or self.world.rank == 0):
                said = f"{folder}: {found}; set aside, trying the one before"
                print(said, file=sys.stderr, flush=True)
            if self.world.rank == 0:
                aside = self.root / f"damaged-{tag}"
                shutil.rmtree(aside, ignore_errors=True)  # an earlier one of the same step
                folder.rename(aside)
        if self.world.from_rank_0(self._had_any):
            raise ConfigError(
                f"{self.root}: there were checkpoints, and none of them is whole; put one back, or "
                "choose another run_dir to begin anew"
            )
        return TrainState()

    def _damage(self, folder: Path, manifest: Mapping[str, Any] | None) -> str | None:
        """What is wrong with this rank's share of a checkpoint. Collective: where a rank cannot
        read its own, all raise its ConfigError."""
        if manifest is None:
            return "has no valid manifest"
        found = unreadable = None
        try:
            found = damage(folder, manifest, self._own(manifest))
        except ConfigError as error:
            unreadable = str(error)
        for problem in self.votes.gather(unreadable):
            if problem is not None:
                raise ConfigError(problem)
        return found

    def _had_any(self) -> bool:
        return (self.root / "latest").exists() or any(self.root.glob("damaged-step-*"))

    def _load(self, folder: Path, manifest: Mapping[str, Any]) -> TrainState:
        files = [
            torch.load(folder / name, map_location="cpu", weights_only=True, mmap=True)
            for name in manifest["files"]
        ]
        try:
            restore(self.engine.deepspeed, files)
            self.engine.set_statistics_and_scale(files[0]["engine"])
        except (KeyError, ValueError) as error:
            raise ConfigError(f"{folder}: is not of this model: {error}") from None
        if len(files) == self.world.size:
            set_rng_state(files[self.world.rank]["rng"], self.world.device)
        else:  # no rank's numbers can go on: new ones, the same whenever this is done
            torch.manual_seed(torch.initial_seed() * 1_000_003 + manifest["step"])
        return TrainState(manifest["step"], manifest["samples"], manifest["guard"])

    def _end_lost(self, lost: str | None) -> NoReturn:
        """Collective, where a rank has lost the run's folder. Raises ConfigError."""
        found = {line for line in self.votes.gather(lost) if line is not None}
        raise ConfigError(
            f"{'; '.join(sorted(found))}; nothing more can be kept there, so the run ends: mend "
            "that and start it again"
        )

    def _aside(self, state: TrainState) -> Path:
        return temporary(self.root / tag_of(state.step))

    def _publish(self, state: TrainState) -> None:
        aside = self._aside(state)
        names = [f"rank-{rank}.pt" for rank in range(self.world.size)]
        manifest = {
            **asdict(state),
            **self.origin,
            "world_size": self.world.size,
            "zero_stage": self.engine.deepspeed.zero_optimization_stage(),
            "files": {name: (aside / f"{name}.xxh3").read_text() for name in names},
        }
        for name in names:
            (aside / f"{name}.xxh3").unlink()
        write_manifest(aside, manifest)
        publish(self.root / tag_of(state.step))
        publish_text(self.root / "latest", tag_of(state.step))
        for old in tags(self.root)[self.config.keep_last :]:
            if not self._kept(step_of(old)):
                self._threads.submit(shutil.rmtree, self.root / old, ignore_errors=True)

    def _kept(self, step: int) -> bool:
        every = self.config.keep_every
        return step in self.config.at or (every is not None and step % every == 0)

    def _newest(self) -> str | None:
        return next(iter(tags(self.root)), None)

    def _own(self, manifest: Mapping[str, Any]) -> list[str]:
        """This rank's share of a checkpoint's files."""
        return list(manifest["files"])[self.world.rank :: self.world.size]


def _write_file(path: Path, content: Any) -> None:
    """Write a rank's file and its hash, both on the disk when this returns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    sync(path)
    publish_text(path.with_name(f"{path.name}.xxh3"), file_hash(path))
