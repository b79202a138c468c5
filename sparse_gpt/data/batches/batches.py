"""(position, rank) to tensors: the global batches of a run, and one pass over held-out text.

The state of a run's data is one number, `start`: the samples consumed so far. Step s takes the
global samples [start + s·B, start + (s+1)·B); rank r takes every world-size-th of them, from the
r-th on. order.py says which window of which source a sample reads. So the global batches are the
same at any world size, and a run resumed at start = s·B goes on as if never stopped.
"""

from collections.abc import Iterator
from functools import cached_property

import numpy as np
import torch

from sparse_gpt.data.batches import order
from sparse_gpt.data.batches.blend import Blend
from sparse_gpt.data.shards.reader import Split
from sparse_gpt.errors import DataError

IGNORED = -100  # the target that a loss leaves out
_LOOKAHEAD = 4096  # samples whose places are computed at once: the arithmetic costs per call


class Batch:
    """One rank's part of a global batch. It owns its memory: keeping it is safe.

    windows  (rows, seq_len + 1), uint16 or uint32 as in the shards
    tokens   (rows, seq_len) int64, the first seq_len of each window
    targets  (rows, seq_len) int64, the last seq_len; -100 in the rows that are padding
    samples  (rows,) int64, always on the CPU: global sample numbers, or the windows' numbers in
             an evaluation; -1 in padding rows, which come last
    documents  (rows, seq_len) int32, numbered from 0 in each row, or None if not asked for: which
             document each of the tokens is of

    tokens and targets are views of one cast, made when first asked for on the device that holds
    the windows.
    """

    def __init__(
        self,
        windows: torch.Tensor,
        samples: torch.Tensor,
        documents: torch.Tensor | None = None,
        padding: int = 0,
    ) -> None:
        self.windows = windows
        self.samples = samples
        self.documents = documents
        self._padding = padding  # rows

    @cached_property
    def _ids(self) -> torch.Tensor:
        return self.windows.to(torch.int64)

    @cached_property
    def tokens(self) -> torch.Tensor:
        return self._ids[:, :-1]

    @cached_property
    def targets(self) -> torch.Tensor:
        if not self._padding:
            return self._ids[:, 1:]
        targets = self._ids[:, 1:].clone()
        targets[-self._padding :] = IGNORED
        return targets

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """This batch on a device; 2 (or 4) bytes a token travel, the cast happens there."""
        windows = self.windows.to(device, non_blocking=non_blocking)
        documents = self.documents
        if documents is not None:
            documents = documents.to(device, non_blocking=non_blocking)
        return Batch(windows, self.samples, documents, self._padding)


class Batches:
    """Iterate over one rank's batches, without end; every `iter` begins at `start`.

    split         what `open_shards` gave: dataset.train; or the blend of `open_blend`
    seq_len       T, tokens of context; a window is T + 1 tokens
    global_batch  samples a step over all ranks; each rank gets global_batch / world_size
    seed          of the order
    start         samples consumed so far
    documents     whether batches say which document each token is of
    pin           page-locked windows, so that `to(device, non_blocking=True)` overlaps (needs CUDA)

    Raises DataError if a split is shorter than a window, holds fewer windows than its share of a
    global batch, or the batch does not divide over the ranks.
    """

    def __init__(
        self,
        split: Split | Blend,
        seq_len: int,
        global_batch: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        start: int = 0,
        *,
        documents: bool = False,
        pin: bool = False,
    ) -> None:
        _check_ranks(rank, world_size)
        if isinstance(split, Split):
            self.splits, self.keys, self.quotas = [split], [0], np.ones(1, np.int64)
        else:
            self.splits = [source.dataset.train for source in split.sources]
            self.keys = [source.key for source in split.sources]
            self.quotas = split.quotas
        if global_batch < 1 or global_batch % world_size:
            raise DataError(_indivisible(global_batch, world_size))
        for part, quota in zip(self.splits, self.quotas.tolist(), strict=True):
            windows = count_windows(part, seq_len)
            share = global_batch * quota // int(self.quotas.sum())
            if share > windows:
                of = "" if share == global_batch else f"its share, {share}, of "
                raise DataError(
                    f"{part.folder} ({part.name}): {of}a global batch of {global_batch} over "
                    f"{world_size} rank(s) is more than its {windows} samples of {seq_len} tokens; "
                    "use a smaller batch, fewer ranks, a shorter context or more text"
                )
        if start < 0:
            raise DataError(f"start is {start}; it counts samples consumed and cannot be negative")
        self.seq_len, self.global_batch, self.seed = seq_len, global_batch, seed
        self.rank, self.world_size, self.start = rank, world_size, start
        self.documents, self.pin = documents, pin

    def __iter__(self) -> Iterator[Batch]:
        steps = max(1, _LOOKAHEAD * self.world_size // self.global_batch)
        sizes = [split.n_tokens for split in self.splits]
        start = self.start
        while True:
            samples = order.rank_samples(
                start, steps, self.global_batch, self.rank, self.world_size
            )
            places = order.places(
                samples.reshape(-1), self.quotas, sizes, self.keys, self.seq_len, self.seed
            )
            sources, starts = (part.reshape(samples.shape) for part in places)
            for step in range(steps):
                windows = self._read(sources[step], starts[step])
                documents = None
                if self.documents:
                    documents = self._read_documents(sources[step], starts[step])
                yield Batch(windows, torch.from_numpy(samples[step]), documents)
            start += steps * self.global_batch

    def _read(self, sources: order.Int64s, starts: order.Int64s) -> torch.Tensor:
        windows = _empty_windows(self.splits[0], len(starts), self.seq_len, self.pin)
        out = windows.numpy()
        if len(self.splits) == 1:
            self.splits[0].read(starts, out)
            return windows
        for split, own in self._by_source(sources):
            split.read(starts[own], [out[row] for row in own])
        return windows

    def _read_documents(self, sources: order.Int64s, starts: order.Int64s) -> torch.Tensor:
        shape = len(starts), self.seq_len
        documents = torch.empty(shape, dtype=torch.int32, pin_memory=self.pin)
        for split, own in self._by_source(sources):
            documents.numpy()[own] = split.documents(starts[own], self.seq_len)
        return documents

    def _by_source(self, sources: order.Int64s) -> Iterator[tuple[Split, order.Int64s]]:
        """Each source's split, and the rows that read it."""
        for number in np.unique(sources).tolist():
            yield self.splits[number], np.flatnonzero(sources == number)


def evaluation(
    split: Split,
    seq_len: int,
    global_batch: int,
    rank: int = 0,
    world_size: int = 1,
    *,
    max_tokens: int | None = None,
    documents: bool = False,
    pin: bool = False,
) -> Iterator[Batch]:
    """One pass over the windows of a split, in order: window w reads the seq_len + 1 tokens from
    w · seq_len on; the fewer than seq_len transitions left at the end are not read. With
    `max_tokens` only as many windows (one at least) as predict no more than so many, spread evenly
    over the split, for neighbours are alike. documents, pin: as `Batches` has them.

    Every rank gets the same number of batches of the same shape, for ranks may have to meet in
    every forward pass. Where windows run out, rows repeat window 0 with targets -100: weight a
    batch's loss by its targets ≥ 0, and leave out a batch that has none.

    Raises DataError as `Batches` does, except that a batch may be larger than the split.
    """
    _check_ranks(rank, world_size)
    in_split = n_windows = count_windows(split, seq_len)
    if max_tokens is not None:
        n_windows = min(n_windows, max(1, max_tokens // seq_len))
    if global_batch < 1 or global_batch % world_size:
        raise DataError(_indivisible(global_batch, world_size))

    def read(first: int) -> Batch:
        samples = np.arange(first + rank, first + global_batch, world_size)
        samples[samples >= n_windows] = -1
        starts = np.maximum(samples, 0) * in_split // n_windows * seq_len
        windows = _empty_windows(split, len(starts), seq_len, pin)
        split.read(starts, windows.numpy())
        of = torch.from_numpy(split.documents(starts, seq_len)) if documents else None
        return Batch(windows, torch.from_numpy(samples), of, int((samples < 0).sum()))

    return map(read, range(0, n_windows, global_batch))


def count_windows(split: Split, seq_len: int) -> int:
    """Windows of seq_len + 1 tokens at stride seq_len in a split: the samples of an epoch.

    Raises DataError if there is not one.
    """
    where = f"{split.folder} ({split.name})"
    if seq_len < 1:
        raise DataError(f"seq_len is {seq_len}; it must be at least 1")
    if split.n_tokens == 0:
        raise DataError(f"{where}: the split is empty; prepare the text with held_out above 0")
    if split.n_tokens < seq_len + 1:
        raise DataError(
            f"{where}: context longer than the corpus: seq_len {seq_len} needs {seq_len + 1} "
            f"tokens, there are {split.n_tokens}; use a shorter context or more text"
        )
    return split.n_tokens // seq_len


def _empty_windows(split: Split, rows: int, seq_len: int, pin: bool) -> torch.Tensor:
    dtype = torch.uint16 if split.dtype.itemsize == 2 else torch.uint32
    return torch.empty((rows, seq_len + 1), dtype=dtype, pin_memory=pin)


def _check_ranks(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise DataError(f"rank {rank} of {world_size}: ranks are 0 … world size - 1")


def _indivisible(global_batch: int, world_size: int) -> str:
    below = global_batch - global_batch % world_size
    near = [n for n in (below, below + world_size) if n > 0]
    worlds = [n for n in range(1, world_size) if global_batch % n == 0 and global_batch > 0]
    message = f"global batch {global_batch} does not divide over {world_size} ranks; possible: "
    message += f"a global batch of {' or '.join(map(str, near))}"
    return message + (f", or {', '.join(map(str, worlds))} ranks" if worlds else "")
