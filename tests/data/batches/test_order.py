from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sparse_gpt.data.batches import order

seeds = st.integers(0, 2**63)


def permutation(size: int, seed: int, epoch: int, source: int = 0) -> list[int]:
    keys = order.epoch_keys(seed, source, np.full(size, epoch, np.uint64))
    return order.permute(np.arange(size, dtype=np.uint64), size, keys).tolist()


@settings(max_examples=60)
@given(st.integers(1, 5000), seeds, st.integers(0, 10**6))
@example(1, 0, 0)
@example(2, 0, 0)
@example(3, 0, 0)
@example(4097, 1, 1)
def test_bijection_on_any_size(size: int, seed: int, epoch: int) -> None:
    assert sorted(permutation(size, seed, epoch)) == list(range(size))


def test_seed_source_and_epoch_each_change_the_order() -> None:
    orders = {
        tuple(permutation(1000, seed, epoch, source))
        for seed in (0, 1)
        for epoch in (0, 1)
        for source in (0, 1)
    }
    assert len(orders) == 8


def test_neighbours_are_scattered() -> None:
    """A permutation that mixes has no more adjacent pairs than chance (one or two) gives."""
    steps = np.diff(permutation(10_007, 0, 0))
    assert np.sum(np.abs(steps) == 1) < 15
    assert abs(np.corrcoef(steps[:-1], steps[1:])[0, 1] + 0.5) < 0.05  # that of random order


def test_sizes_beyond_32_bits() -> None:
    size = 3 * 2**40 + 1
    index = np.arange(size - 1000, size, dtype=np.uint64)
    out = order.permute(index, size, order.epoch_keys(0, 0, np.zeros_like(index)))
    assert len(np.unique(out)) == 1000
    assert out.max() < size
    assert out.max() > 2**32


@settings(max_examples=60)
@given(st.integers(1, 400), seeds, st.integers(0, 30))
def test_each_epoch_is_a_permutation_of_its_windows(windows: int, seed: int, epoch: int) -> None:
    samples = np.arange(epoch * windows, (epoch + 1) * windows)
    epochs, located = order.locate(samples, windows, seed)
    assert set(epochs.tolist()) == {epoch}
    assert sorted(located.tolist()) == list(range(windows))


@settings(max_examples=40)
@given(st.integers(2, 3000), st.integers(1, 64), seeds, st.integers(0, 9))
def test_no_transition_twice_an_epoch(tokens: int, seq_len: int, seed: int, epoch: int) -> None:
    seq_len = min(seq_len, tokens - 1)
    windows = tokens // seq_len
    samples = np.arange(epoch * windows, (epoch + 1) * windows)
    starts = order.window_starts(samples, tokens, seq_len, seed)
    transitions = (starts[:, None] + np.arange(seq_len)) % tokens
    assert len(np.unique(transitions)) == windows * seq_len


def test_offsets_differ_between_epochs() -> None:
    offsets = order.offsets(np.arange(100), 10**12, seed=0)
    assert len(set(offsets.tolist())) == 100
    assert offsets.min() >= 0
    assert offsets.max() < 10**12


def test_order_is_frozen() -> None:
    """Runs resume across versions only if these numbers never change."""
    starts = order.window_starts(np.arange(998, 1003), 128_000, 128, seed=7)
    assert starts.tolist() == [92198, 98598, 45997, 13741, 62637]


weights = st.lists(st.floats(1e-3, 1e3) | st.integers(1, 10**6), min_size=1, max_size=8)
quotas = st.lists(st.integers(1, 40), min_size=1, max_size=6)


@given(weights)
def test_quotas_are_less_than_one_sample_a_cycle_off(weights: list[float]) -> None:
    found = order.cycle_quotas(weights)
    length = int(found.sum())
    assert length <= order.LONGEST_CYCLE
    shares = [Fraction(str(float(weight))) for weight in weights]
    off = [abs(q - w / sum(shares) * length) for q, w in zip(found.tolist(), shares, strict=True)]
    assert max(off) < 1
    if length < order.LONGEST_CYCLE:
        assert max(off) == 0


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([5], [1]),
        ([0.7, 0.3], [7, 3]),
        ([0.1, 0.1, 0.1], [1, 1, 1]),
        ([0.99999, 0.00001], [99_999, 1]),
        ([1.0, 1e6], [0, 100_000]),
        ([299_999, 300_002], [50_000, 50_000]),
        ([2**61, 2**61, 2**61 + 2**20], [33_333, 33_333, 33_334]),  # the largest remainder
    ],
)
def test_quotas_by_hand(weights: list[float], expected: list[int]) -> None:
    assert order.cycle_quotas(weights).tolist() == expected


@settings(max_examples=60)
@given(quotas, seeds, st.integers(0, 10**12), st.integers(1, 4))
def test_a_blend_is_a_bijection(quotas: list[int], seed: int, first: int, cycles: int) -> None:
    length = sum(quotas)
    samples = np.arange(first * length, (first + cycles) * length)
    sources, ordinals = order.blend(samples, np.array(quotas), seed)
    for source, quota in enumerate(quotas):
        own = sorted(ordinals[sources == source].tolist())
        assert own == list(range(first * quota, (first + cycles) * quota))


@settings(max_examples=60)
@given(quotas, seeds)
def test_every_prefix_has_the_shares(quotas: list[int], seed: int) -> None:
    length, each = sum(quotas), np.array(quotas)
    sources, _ = order.blend(np.arange(4 * length), each, seed)
    counts = np.cumsum(sources[:, None] == np.arange(len(quotas)), axis=0)
    n = np.arange(1, 4 * length + 1)
    error = np.abs(counts - n[:, None] * each / length)
    assert (error <= each * (1 - each / length) + 1e-9).all()
    assert (counts[length - 1 :: length] == np.arange(1, 5)[:, None] * each).all()
    for samples in {1, length, 4 * length - 1, len(n) // 3 + 1}:
        found = order.blend_counts(samples, each, seed)
        assert found.tolist() == counts[samples - 1].tolist()
    assert order.blend_counts(0, each, seed).tolist() == [0] * len(quotas)


def test_each_cycle_has_an_order_of_its_own() -> None:
    quotas = np.array([5, 3, 2])
    orders = {
        tuple(order.blend(np.arange(cycle * 10, cycle * 10 + 10), quotas, seed)[0].tolist())
        for cycle in range(50)
        for seed in (0, 1)
    }
    assert len(orders) > 90  # of 2,520 possible ones


def test_a_blend_is_frozen() -> None:
    """As the order of one source."""
    sources, ordinals = order.blend(np.arange(10**10, 10**10 + 8), np.array([5, 3]), seed=7)
    assert sources.tolist() == [0, 0, 0, 1, 0, 1, 0, 1]
    assert (ordinals - 5 * 10**10 // 8)[sources == 0].tolist() == [2, 0, 3, 4, 1]
    assert (ordinals - 3 * 10**10 // 8)[sources == 1].tolist() == [0, 1, 2]
    starts = order.window_starts(np.arange(998, 1003), 128_000, 128, seed=7, source=2**63 + 5)
    assert starts.tolist() == [98076, 103836, 38115, 112867, 6755]
