import shutil
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data import Batches, Blend, open_blend, open_shards
from sparse_gpt.data.batches import order
from sparse_gpt.data.shards import reader
from sparse_gpt.errors import DataError

MakeShards = Callable[..., Path]

SPAN = 10_000  # source k's tokens count up from k · SPAN: an id says where it is from


def make_sources(make_shards: MakeShards, folder: Path, sizes: list[int]) -> list[str]:
    """A folder of shards of so many tokens each, cut into two shards."""
    paths = []
    for number, size in enumerate(sizes):
        tokens = np.arange(size) + number * SPAN
        paths.append(str(folder / f"s{number}"))
        make_shards(Path(paths[-1]), [[tokens[: size // 3]], [tokens[size // 3 :]]])
    return paths


@pytest.fixture
def three(tmp_path: Path, make_shards: MakeShards) -> list[str]:
    return make_sources(make_shards, tmp_path, [700, 900, 1501])


def windows_of(blend: Blend, count: int, **options: int) -> torch.Tensor:
    """The first `count` global batches of all ranks, as rows in the order of the samples."""
    world_size = options.get("world_size", 1)
    ranks = [Batches(blend, **options, rank=rank) for rank in range(world_size)]
    found = []
    for step in zip(*(islice(rank, count) for rank in ranks), strict=True):
        rows = torch.stack([batch.windows.to(torch.int64) for batch in step], dim=1)
        found.append(rows.flatten(0, 1))
        samples = torch.stack([batch.samples for batch in step], dim=1).flatten()
        first = options.get("start", 0) + (len(found) - 1) * options["global_batch"]
        assert samples.tolist() == list(range(first, first + options["global_batch"]))
    return torch.cat(found)


def drawn_blend(
    make_shards: MakeShards, folder: str, sizes: list[int], data: st.DataObject
) -> tuple[list[str], Blend]:
    """Sources of these sizes, and a blend of them with any weights."""
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    paths = make_sources(make_shards, Path(folder), sizes)
    return paths, open_blend(dict(zip(paths, weights, strict=True)))


@settings(max_examples=12)
@given(
    sizes=st.lists(st.integers(1000, 3000), min_size=2, max_size=4),
    seq_len=st.integers(1, 5),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_same_samples_at_1_to_64_ranks_with_other_batches_from_any_sample(
    make_shards: MakeShards, sizes: list[int], seq_len: int, seed: int, data: st.DataObject
) -> None:
    with TemporaryDirectory() as scratch:
        _, blend = drawn_blend(make_shards, scratch, sizes, data)
        whole = windows_of(blend, 16, seq_len=seq_len, global_batch=64, seed=seed)
        world_size = data.draw(st.integers(1, 64))
        options = {"global_batch": world_size * data.draw(st.integers(1, 128 // world_size))}
        options["start"] = data.draw(st.integers(0, len(whole) - options["global_batch"]))
        count = (len(whole) - options["start"]) // options["global_batch"]
        found = windows_of(
            blend, count, seq_len=seq_len, seed=seed, world_size=world_size, **options
        )
        assert torch.equal(found, whole[options["start"] :][: len(found)])


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(120, 400), min_size=2, max_size=4),
    seq_len=st.integers(1, 12),
    seed=st.integers(0, 2**40),
    data=st.data(),
)
def test_each_transition_of_every_source_once_an_epoch(
    make_shards: MakeShards, sizes: list[int], seq_len: int, seed: int, data: st.DataObject
) -> None:
    with TemporaryDirectory() as scratch:
        paths, blend = drawn_blend(make_shards, scratch, sizes, data)
        length = int(blend.quotas.sum())
        cycles = max(-(-2 * s.dataset.train.n_tokens // seq_len // s.quota) for s in blend.sources)
        windows = windows_of(blend, cycles, seq_len=seq_len, global_batch=length, seed=seed)
        sources, ordinals = order.blend(np.arange(cycles * length), blend.quotas, seed)
        for number, source in enumerate(blend.sources):
            first_id, size = paths.index(source.folder) * SPAN, source.dataset.train.n_tokens
            own = windows.numpy()[sources == number] - first_id
            assert (own[:, 1:] == (own[:, :-1] + 1) % size).all()
            own = own[np.argsort(ordinals[sources == number])]
            epoch = size // seq_len
            for begin in (0, epoch):
                covered = (own[begin : begin + epoch, :1] + np.arange(seq_len)) % size
                assert len(np.unique(covered)) == epoch * seq_len


def test_the_shares_are_those_asked_for(three: list[str]) -> None:
    blend = open_blend(dict(zip(three, [0.5, 0.3, 0.2], strict=True)))
    sources = windows_of(blend, 10, seq_len=5, global_batch=100)[:, 0] // SPAN
    assert torch.bincount(sources).tolist() == [500, 300, 200]


def test_a_blend_of_one_is_the_data_set_by_itself(three: list[str]) -> None:
    dataset = open_shards(three[0])
    found = windows_of(Blend.of_one(dataset), 9, seq_len=10, global_batch=8, seed=5)
    assert torch.equal(found, windows_of(dataset.train, 9, seq_len=10, global_batch=8, seed=5))
    assert Blend.of_one(dataset).hash == dataset.manifest.hash
    assert Blend.of_one(dataset).epoch_tokens == 700


def test_neither_names_nor_order_of_folders_matter(three: list[str], tmp_path: Path) -> None:
    def read(weights: dict[str, float]) -> torch.Tensor:
        return windows_of(open_blend(weights), 5, seq_len=7, global_batch=40)

    weights = dict(zip(three, [3.0, 2.0, 1.0], strict=True))
    moved = {str(shutil.copytree(path, f"{tmp_path}/moved-{w}")): w for path, w in weights.items()}
    moved = dict(reversed(moved.items()))
    assert open_blend(moved).hash == open_blend(weights).hash
    assert torch.equal(read(moved), read(weights))
    doubled = {path: 2 * weight for path, weight in weights.items()}
    assert open_blend(doubled).hash == open_blend(weights).hash
    other = {**weights, three[0]: 4.0}
    assert open_blend(other).hash != open_blend(weights).hash


def test_a_source_keeps_its_own_order_when_others_join(three: list[str]) -> None:
    def own(weights: dict[str, float], count: int) -> list[int]:
        windows = windows_of(open_blend(weights), count, seq_len=7, global_batch=12)[:, 0]
        return sorted(windows[windows < SPAN][:36].tolist())

    few = own({three[0]: 1, three[1]: 1}, 6)
    more = own({three[0]: 1, three[1]: 1, three[2]: 1}, 9)
    assert few == more  # the first 36 windows of its first epoch, whoever is read besides


def test_tokens_until_a_source_was_read_once(three: list[str]) -> None:
    blend = open_blend(dict(zip(three, [5, 4, 1], strict=True)))
    assert blend.epoch_tokens == 1400  # the first of 700 · 10/5, 900 · 10/4, 1501 · 10/1


def test_names_are_as_long_as_tells_them_apart(tmp_path: Path, make_shards: MakeShards) -> None:
    places = ("web/en", "web/fr", "books/en")
    for number, place in enumerate(places):
        make_shards(tmp_path / place, [[np.arange(50) + number]])
    blend = open_blend({f"{tmp_path / place}/": 1 for place in places})
    assert sorted(source.name for source in blend.sources) == ["books/en", "web/en", "web/fr"]
    pair = open_blend({str(tmp_path / place): 1 for place in places[:2]})
    assert sorted(source.name for source in pair.sources) == ["en", "fr"]


def test_sources_share_the_file_descriptors(
    tmp_path: Path, make_shards: MakeShards, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [
        make_shards(tmp_path / f"s{number}", [[np.array([number, i])] for i in range(110)])
        for number in range(3)
    ]
    blend = open_blend({str(folder): 1 for folder in folders})
    monkeypatch.setattr(reader, "_most_maps", lambda: 50)
    epoch = windows_of(blend, 10, seq_len=2, global_batch=33, documents=True)
    assert len(epoch) == 330
    assert len(reader._held) == 50


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_hash": "cd" * 32}, r"odd: has another vocabulary: cdcdcdcdcdcd, where 2 of 3"),
        ({"dtype": "uint32"}, r"odd: has another dtype of tokens: uint32, where 2 of 3 .* uint16"),
    ],
)
def test_the_odd_one_out_is_named(
    three: list[str], tmp_path: Path, make_shards: MakeShards, change: dict[str, str], says: str
) -> None:
    odd = make_shards(tmp_path / "odd", [[np.arange(100)]], **change)
    with pytest.raises(DataError, match=says) as error:
        open_blend({str(odd): 1, three[0]: 1, three[1]: 1})
    assert "\n" not in str(error.value)


def test_impossible_blends(three: list[str], tmp_path: Path) -> None:
    a, b, _ = three
    copy = str(shutil.copytree(a, tmp_path / "copy"))
    for weights, says in (
        ({}, "at least one folder"),
        ({a: 1, b: 0}, "s1: its weight in the blend is 0; it must be above 0"),
        ({a: 1, b: float("nan")}, "s1: its weight in the blend is nan"),
        ({a: 1, b: 1e-9}, "s1: its weight is under one sample in 100,000"),
        ({a: 1, copy: 2}, "has the same training tokens as"),
        ({a: 1, f"{tmp_path}/absent": 1}, "absent: no such folder"),
    ):
        with pytest.raises(DataError, match=says) as error:
            open_blend(weights)
        assert "\n" not in str(error.value)
    few = open_blend({a: 1, b: 1})
    says = "s0 .*: its share, 75, of a global batch of 150 over 1 .* more than its 70 samples"
    with pytest.raises(DataError, match=says):
        Batches(few, seq_len=10, global_batch=150)
