#!/usr/bin/env python3
"""Do the order's promises hold at 10T tokens on 16,384 ranks?

    python scripts/studies/simulate_order.py
    python scripts/studies/simulate_order.py --seed 7 --json order.json

The code of data/order.py that training runs, on data sets that exist on paper only: sizes, shares
and keys. What is too much to enumerate is sampled, and undone: the script has the inverses of the
permutation and of the blend, so that what comes back unchanged was one to one, and what is found
by going back was covered. See docs/order.md for what is promised.

Exit status 1: a promise is broken.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from sparse_gpt.data.batches import order
from sparse_gpt.data.batches.order import Int64s, UInt64s

CONTEXT = 4096
RANKS = 16_384
BATCH = 32_768  # samples; 134M tokens
PROBES = 100_000  # random samples or windows of a check
TRIES = 300  # random cycles, prefixes or resumes of a check
STRETCH = 6 * BATCH  # samples in a row that are compared between ranks, batches and resumes
BATCHES = [  # (ranks, samples a step)
    *((ranks, BATCH) for ranks in (1, 2, 8, 64, 1024, RANKS)),
    *((RANKS, 2 * BATCH), (RANKS // 2, 3 * BATCH // 2), (48, 9_600), (1, 1)),
]


@dataclass(frozen=True)
class Source:
    """A data set on paper."""

    name: str
    tokens: int
    weight: float
    key: int

    @property
    def windows(self) -> int:
        return self.tokens // CONTEXT


# 10T tokens, in which web is read 0.9 times and the encyclopedia 11 times.
SOURCES = [
    Source("web", 7_111_111_111_111, 0.64, 0x9E37_79B9_7F4A_7C15),
    Source("code", 1_500_000_000_001, 0.2, 0xBF58_476D_1CE4_E5B9),
    Source("papers", 1_204_888_888_887, 0.1, 0x94D0_49BB_1331_11EB),
    Source("books", 180_000_000_000, 0.055, 0x2545_F491_4F6C_DD1D),
    Source("encyclopedia", 4_000_000_001, 0.0045, 0xD6E8_FEB8_6659_FD93),
    Source("lectures", 499_999_999, 0.0005, 1),
]
TOTAL = sum(source.tokens for source in SOURCES)
SAMPLES = TOTAL // CONTEXT  # of a run over as many tokens as there are


@dataclass
class Finding:
    """What one check looked at, and how far from its promise it found the order to be."""

    promise: str
    looked_at: str
    broken: int  # cases
    seconds: float = 0.0


class Order:
    """The blend of SOURCES under one seed, and the way back."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.quotas = order.cycle_quotas([source.weight for source in SOURCES])
        self.length = int(self.quotas.sum())
        self.sizes = [source.tokens for source in SOURCES]
        self.keys = [source.key for source in SOURCES]

    def blend(self, samples: Int64s) -> tuple[Int64s, Int64s]:
        return order.blend(samples, self.quotas, self.seed)

    def places(self, samples: Int64s) -> Int64s:
        """(samples, 2): source, and the token where the window starts."""
        found = order.places(samples, self.quotas, self.sizes, self.keys, CONTEXT, self.seed)
        return np.stack(found, axis=-1)

    def unblend(self, sources: Int64s, ordinals: Int64s) -> Int64s:
        """The inverse of `blend`: global sample numbers."""
        firsts = np.cumsum(self.quotas) - self.quotas
        cycles, within = np.divmod(ordinals, self.quotas[sources])
        keys = order.epoch_keys(self.seed, order._CYCLES, cycles.astype(np.uint64))
        slots = (firsts[sources] + within).astype(np.uint64)
        return cycles * self.length + unpermute(slots, self.length, keys).astype(np.int64)

    def unlocate(self, source: Source, epochs: Int64s, windows: Int64s) -> Int64s:
        """The inverse of `order.locate`: which of its source's samples reads a window."""
        keys = order.epoch_keys(self.seed, source.key, epochs.astype(np.uint64))
        within = unpermute(windows.astype(np.uint64), source.windows, keys)
        return epochs * source.windows + within.astype(np.int64)


def unpermute(places: UInt64s, size: int, keys: UInt64s) -> UInt64s:
    """The inverse of `order.permute`: each network's rounds backwards, walking the other way."""
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    rounds = [
        keys + np.uint64(r * order._GOLDEN & order._MASK64) for r in range(order.ROUNDS, 0, -1)
    ]
    out = places.copy()
    walking = np.arange(len(places))
    while len(walking):
        left, right = out[walking] >> half, out[walking] & mask
        for round_keys in rounds:
            left, right = right ^ (order._mix(left + round_keys[walking]) & mask), left
        out[walking] = (left << half) | right
        walking = walking[out[walking] >= np.uint64(size)]
    return out


def windows_come_back(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """Sample → window → sample, and window → sample → window, in several epochs."""
    broken = 0
    for source in SOURCES:
        epochs = random.integers(0, 12, PROBES)
        numbers = random.integers(0, source.windows, PROBES)
        ordinals = epochs * source.windows + numbers
        found_epochs, found = order.locate(ordinals, source.windows, it.seed, source.key)
        back = it.unlocate(source, found_epochs, found)
        broken += int(((back != ordinals) | (found < 0) | (found >= source.windows)).sum())
        read_by = it.unlocate(source, epochs, numbers)
        again_epochs, again = order.locate(read_by, source.windows, it.seed, source.key)
        broken += int(((again != numbers) | (again_epochs != epochs)).sum())
    return f"{2 * len(SOURCES) * PROBES:,} samples and windows of 12 epochs", broken


def windows_lie_apart(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """Windows of one epoch share no transition: their starts lie a context apart, on the circle."""
    broken = 0
    for source in SOURCES:
        epoch = int(random.integers(0, 12))
        first = epoch * source.windows
        ordinals = first + np.unique(random.integers(0, source.windows, PROBES))
        starts = np.sort(order.window_starts(ordinals, source.tokens, CONTEXT, it.seed, source.key))
        gaps = np.diff(starts, append=starts[0] + source.tokens)
        broken += int((gaps < CONTEXT).sum())
    return f"{len(SOURCES) * PROBES:,} windows, an epoch of each source", broken


def an_epoch_is_whole(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """The samples of the run that read one epoch of the smallest source read each window once."""
    source = min(SOURCES, key=lambda source: source.windows)
    number, epoch = SOURCES.index(source), int(random.integers(0, 3))
    ordinals = np.arange(epoch * source.windows, (epoch + 1) * source.windows)
    samples = it.unblend(np.full_like(ordinals, number), ordinals)
    sources, starts = it.places(samples).T
    offset = order.offsets(np.array([epoch]), source.tokens, it.seed, source.key)[0]
    windows, rest = np.divmod((starts - offset) % source.tokens, CONTEXT)
    broken = int((sources != number).sum() + (rest != 0).sum())
    broken += 2 * source.windows - len(np.unique(windows)) - len(np.unique(samples))
    return f"all {source.windows:,} windows of the smallest source", broken


def samples_come_back(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """Sample → (source, its sample) → sample, and the other way round."""
    samples = random.integers(0, 2 * SAMPLES, PROBES)
    broken = int((it.unblend(*it.blend(samples)) != samples).sum())
    sources = random.integers(0, len(SOURCES), PROBES)
    ordinals = random.integers(0, SAMPLES // 10**4, PROBES)
    found = it.blend(it.unblend(sources, ordinals))
    broken += int(((found[0] != sources) | (found[1] != ordinals)).sum())
    return f"{2 * PROBES:,} samples of a run and of single sources", broken


def shares_of_cycles(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """Of n cycles each source has n · quota, a quota less than one sample off its weight."""
    total = sum(source.weight for source in SOURCES)
    ideal = np.array([source.weight for source in SOURCES]) / total * it.length
    broken = int((np.abs(it.quotas - ideal) >= 1).sum())
    cycles = random.integers(0, SAMPLES // it.length, TRIES).tolist()
    for cycle in cycles:
        found = order.blend_counts(cycle * it.length, it.quotas, it.seed)
        samples = np.arange(cycle * it.length, (cycle + 1) * it.length)
        own = np.bincount(it.blend(samples)[0], minlength=len(SOURCES))
        broken += int((found != cycle * it.quotas).sum() + (own != it.quotas).sum())
    return f"{len(cycles):,} cycles of {it.length:,} slots", broken


def shares_of_prefixes(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """Of the first n samples a source's are off its share by what one cycle can be, at most."""
    bound = it.quotas * (1 - it.quotas / it.length)
    broken, worst = 0, 0.0
    prefixes = random.integers(0, SAMPLES, TRIES).tolist()
    for samples in prefixes:
        cycles, rest = divmod(samples, it.length)
        counts = order.blend_counts(samples, it.quotas, it.seed) - cycles * it.quotas
        error = np.abs(counts - rest * it.quotas / it.length)
        broken += int((error > bound + 1e-9).sum() + (counts.sum() != rest))
        worst = max(worst, float(error.max()))
        found = np.bincount(it.blend(samples - np.arange(1, rest + 1))[0], minlength=len(SOURCES))
        broken += int((found != counts).sum())
    return f"{len(prefixes):,} prefixes: {worst:.0f} samples off at most", broken


def ranks_and_batches(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """Any number of ranks and any batch take the same samples in the same order, which some ranks
    look up by themselves."""
    start = int(random.integers(0, SAMPLES))
    samples = np.arange(start, start + STRETCH)
    whole = it.places(samples)
    broken = 0
    for world_size, batch in BATCHES:
        steps = min(STRETCH // batch, 20_000)
        shares = np.stack(
            [
                order.rank_samples(start, steps, batch, rank, world_size)
                for rank in range(world_size)
            ],
            axis=-1,
        )
        broken += int((shares.reshape(-1) != samples[: steps * batch]).sum())
        for rank in {0, world_size - 1, *random.integers(0, world_size, 6).tolist()}:
            own = shares[..., rank].reshape(-1)
            broken += int((it.places(own) != whole[own - start]).any(axis=1).sum())
    return f"{len(BATCHES)} ways to share {STRETCH:,} samples, up to {RANKS:,} ranks", broken


def resumes(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """A run that goes on from any sample, on other ranks with other batches, reads what it would
    have read: no sample twice, none left out."""
    start = int(random.integers(0, SAMPLES))
    whole = it.places(np.arange(start, start + STRETCH))
    broken = 0
    for _ in range(TRIES):
        world_size, batch = BATCHES[int(random.integers(0, len(BATCHES)))]
        at = start + int(random.integers(0, STRETCH - batch))
        rank = int(random.integers(0, world_size))
        steps = min((start + STRETCH - at) // batch, 64)
        own = order.rank_samples(at, steps, batch, rank, world_size).reshape(-1)
        broken += int((it.places(own) != whole[own - start]).any(axis=1).sum())
        expected = np.arange(at + rank, at + steps * batch, world_size)
        broken += int((np.sort(own) != expected).sum())
    return f"{TRIES} resumes at any sample, on other ranks with other batches", broken


def nothing_twice(it: Order, random: np.random.Generator) -> tuple[str, int]:
    """In a stretch of a run no source's sample comes twice, and neither does a window."""
    start = int(random.integers(0, SAMPLES))
    samples = np.arange(start, start + 5 * PROBES)
    sources, ordinals = it.blend(samples)
    broken = 0
    for number, source in enumerate(SOURCES):
        own = ordinals[sources == number]
        epochs, windows = order.locate(own, source.windows, it.seed, source.key)
        broken += len(own) - len(np.unique(own))
        broken += len(own) - len(np.unique(epochs * source.windows + windows))
    return f"{len(samples):,} samples in a row", broken


CHECKS: dict[str, Callable[[Order, np.random.Generator], tuple[str, int]]] = {
    "each window has one sample an epoch": windows_come_back,
    "windows of an epoch do not overlap": windows_lie_apart,
    "an epoch covers all windows": an_epoch_is_whole,
    "each sample of a source has one of the run": samples_come_back,
    "nothing is read twice": nothing_twice,
    "shares of a cycle": shares_of_cycles,
    "shares of any prefix": shares_of_prefixes,
    "the same at any world size and batch": ranks_and_batches,
    "the same after any resume": resumes,
}


def simulate(seed: int) -> list[Finding]:
    """Every check under one seed of the order."""
    it, random = Order(seed), np.random.default_rng(seed)
    findings = []
    for promise, check in CHECKS.items():
        begin = time.perf_counter()
        looked_at, broken = check(it, random)
        findings.append(Finding(promise, looked_at, broken, time.perf_counter() - begin))
    return findings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="of the order and of the samples")
    parser.add_argument("--json", type=Path, help="also write the table here")
    options = parser.parse_args()
    findings = simulate(options.seed)

    title = f"{len(SOURCES)} sources of {TOTAL / 1e12:.2f}T tokens, context {CONTEXT}"
    table = Table("promise", "looked at", "broken", "seconds", title=title)
    for finding in findings:
        row = (finding.promise, finding.looked_at, f"{finding.broken:,}", f"{finding.seconds:.2f}")
        table.add_row(*row, style="red" if finding.broken else None)
    Console().print(table)
    if options.json:
        report = {"seed": options.seed, "tokens": TOTAL, "context": CONTEXT, "ranks": RANKS}
        rows = [asdict(finding) for finding in findings]
        options.json.write_text(json.dumps({**report, "findings": rows}, indent=1) + "\n")
    sys.exit(any(finding.broken for finding in findings))


if __name__ == "__main__":
    main()
