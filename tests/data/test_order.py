import numpy as np
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data import order

seeds = st.integers(0, 2**63)


def permutation(size: int, seed: int, epoch: int, source: int = 0) -> list[int]:
    keys = order.epoch_keys(seed, source, np.full(size, epoch, np.uint64))
    return order.permute(np.arange(size, dtype=np.uint64), size, keys).tolist()


@settings(max_examples=60, deadline=None)
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


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), seeds, st.integers(0, 30))
def test_each_epoch_is_a_permutation_of_its_windows(windows: int, seed: int, epoch: int) -> None:
    samples = np.arange(epoch * windows, (epoch + 1) * windows)
    epochs, located = order.locate(samples, windows, seed)
    assert set(epochs.tolist()) == {epoch}
    assert sorted(located.tolist()) == list(range(windows))


@settings(max_examples=40, deadline=None)
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
