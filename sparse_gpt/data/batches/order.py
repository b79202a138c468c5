"""Which tokens the n-th sample reads: pure integer functions, no state and no tables.

A split of N tokens is a circular stream. With context T an epoch has W = N // T windows; window w
of epoch e reads the T + 1 tokens that start at (offset(e) + w·T) mod N, so the T transitions of
each window are its own and none is trained twice in an epoch (the N mod T transitions left over
are elsewhere in the next epoch, whose offset differs). Every document starts with end of text, so
the step from the last document back to the first is an ordinary one.

Sample i is in epoch e = i // W and reads window P_e(i mod W). P_e is a Feistel network on the
smallest even number of bits that holds W, walked along its cycle until it lands below W: a
permutation of [0, W) for any W, keyed by (seed, source, epoch), O(1) in memory and start-up.

A blend deals its samples out in cycles of C slots, of which source k has a fixed quota q_k. Sample
i is in cycle c = i // C and gets slot P_c(i mod C), P_c as above but keyed by (seed, c); source k's
slots are q_k in a row, and the j-th of them is the source's sample c·q_k + j, to which the rules
above apply. So (source, its sample) ↔ i is one to one, and among the first n samples source k has
n·q_k/C but for what the last cycle, begun and not ended, can be off: q_k·(1 − q_k/C) at most.

All arrays are 1-D; uint64 arithmetic wraps modulo 2^64 by intention.
"""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

UInt64s = npt.NDArray[np.uint64]
Int64s = npt.NDArray[np.int64]

ROUNDS = 6  # 4 suffice on large domains; the small ones of tests and tiny corpora want a few more
_GOLDEN = 0x9E3779B97F4A7C15
_MASK64 = 0xFFFFFFFFFFFFFFFF
LONGEST_CYCLE = 100_000  # slots; shares of whole thousandths of a percent are exact
_CYCLES = -1  # stands for the source in the keys of a blend's cycles


def _mix(x: UInt64s) -> UInt64s:
    """The finaliser of splitmix64: a bijection on 64 bits that spreads every bit."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: UInt64s = x ^ (x >> np.uint64(31))
    return mixed


def epoch_keys(seed: int, source: int, epochs: UInt64s) -> UInt64s:
    """A 64-bit key for each epoch of one source under one seed."""
    keys = np.zeros_like(epochs)
    for part in (seed, source):
        keys = _mix(keys + np.uint64((part + _GOLDEN) & _MASK64))
    return _mix(keys + epochs + np.uint64(_GOLDEN))


def permute(index: UInt64s, size: int, keys: UInt64s) -> UInt64s:
    """Where each index in [0, size) goes under the permutation of [0, size) with its own key."""
    half = np.uint64(((size - 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << int(half)) - 1)
    round_keys = [keys + np.uint64(r * _GOLDEN & _MASK64) for r in range(1, ROUNDS + 1)]
    out: UInt64s = index.copy()
    walking = np.arange(len(index))  # positions whose cycle is not yet back below size
    while len(walking):
        left, right = out[walking] >> half, out[walking] & mask
        for round_key in round_keys:
            left, right = right, left ^ (_mix(right + round_key[walking]) & mask)
        out[walking] = (left << half) | right
        walking = walking[out[walking] >= np.uint64(size)]
    return out


def locate(samples: Int64s, n_windows: int, seed: int, source: int = 0) -> tuple[Int64s, Int64s]:
    """(epoch, window) of each global sample number (≥ 0)."""
    epochs, ordinals = np.divmod(samples.astype(np.uint64), np.uint64(n_windows))
    windows = permute(ordinals, n_windows, epoch_keys(seed, source, epochs))
    return epochs.astype(np.int64), windows.astype(np.int64)


def offsets(epochs: Int64s, n_tokens: int, seed: int, source: int = 0) -> Int64s:
    """The token at which each epoch's window 0 starts."""
    keys = epoch_keys(seed, source, epochs.astype(np.uint64))
    starts: Int64s = (_mix(keys) % np.uint64(n_tokens)).astype(np.int64)
    return starts


def window_starts(
    samples: Int64s, n_tokens: int, seq_len: int, seed: int, source: int = 0
) -> Int64s:
    """The token in [0, n_tokens) at which the window of each of a source's samples starts."""
    epochs, windows = locate(samples, n_tokens // seq_len, seed, source)
    return (offsets(epochs, n_tokens, seed, source) + windows * seq_len) % n_tokens


def cycle_quotas(weights: Sequence[float]) -> Int64s:
    """Each source's slots in a blend's cycle, for weights above 0 that need not add up to 1.

    The cycle is the shortest in which all shares are exact, taking 0.7 for 7/10. Where that needs
    more than LONGEST_CYCLE slots it has so many, and the largest remainders are rounded up, of
    equal ones the first: every quota is less than 1 off, and may be 0.
    """
    exact = [Fraction(str(float(weight))) for weight in weights]
    shares = [weight / sum(exact) for weight in exact]
    length = min(math.lcm(*(share.denominator for share in shares)), LONGEST_CYCLE)
    quotas = [math.floor(share * length) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: quotas[k] - shares[k] * length)
    for k in by_remainder[: length - sum(quotas)]:
        quotas[k] += 1
    return np.array(quotas, np.int64)


def blend(samples: Int64s, quotas: Int64s, seed: int) -> tuple[Int64s, Int64s]:
    """(source, which of the source's samples) of each global sample number (≥ 0).

    quotas  (sources,), from `cycle_quotas`
    """
    if len(quotas) == 1:
        return np.zeros_like(samples), samples
    ends = np.cumsum(quotas)
    length = int(ends[-1])
    cycles, places = np.divmod(samples, length)
    keys = epoch_keys(seed, _CYCLES, cycles.astype(np.uint64))
    slots = permute(places.astype(np.uint64), length, keys).astype(np.int64)
    sources = np.searchsorted(ends, slots, side="right")
    return sources, cycles * quotas[sources] + slots - (ends - quotas)[sources]


def blend_counts(samples: int, quotas: Int64s, seed: int) -> Int64s:
    """How many of the first `samples` samples are each source's: (sources,)."""
    cycles, rest = divmod(samples, int(quotas.sum()))
    sources, _ = blend(np.arange(samples - rest, samples), quotas, seed)
    return cycles * quotas + np.bincount(sources, minlength=len(quotas))


def places(
    samples: Int64s,
    quotas: Int64s,
    n_tokens: Sequence[int],
    keys: Sequence[int],
    seq_len: int,
    seed: int,
) -> tuple[Int64s, Int64s]:
    """(source, the token in it at which the window starts) of each global sample number (≥ 0).

    quotas, n_tokens, keys  of each source: samples a cycle, tokens, and what keys its order
    """
    sources, ordinals = blend(samples, quotas, seed)
    starts = np.empty_like(ordinals)
    for number, (size, key) in enumerate(zip(n_tokens, keys, strict=True)):
        own = sources == number
        starts[own] = window_starts(ordinals[own], size, seq_len, seed, key)
    return sources, starts


def rank_samples(start: int, steps: int, global_batch: int, rank: int, world_size: int) -> Int64s:
    """Global numbers of the samples that a rank takes in `steps` steps from sample `start` on:
    (steps, global_batch / world_size)."""
    firsts = start + np.arange(steps, dtype=np.int64) * global_batch
    return firsts[:, None] + np.arange(rank, global_batch, world_size)
