import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from subprocess import run
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.data import Batches, evaluation, open_shards
from sparse_gpt.errors import DataError

MakeShards = Callable[..., Path]


@pytest.fixture
def counted(tmp_path: Path, make_shards: MakeShards) -> Path:
    """1,003 tokens, each its own position, in three shards; the first 100 also held out."""
    tokens = np.arange(1003)
    shards = [[tokens[:400]], [tokens[400:402]], [tokens[402:600], tokens[600:]]]
    return make_shards(tmp_path / "counted", shards, [[tokens[:100]]])


def test_windows_are_the_stream(counted: Path) -> None:
    train = open_shards(counted).train
    epoch = list(islice(Batches(train, seq_len=10, global_batch=20), 5))
    for batch in epoch:
        assert batch.windows.dtype == torch.uint16
        assert batch.tokens.dtype == batch.targets.dtype == batch.samples.dtype == torch.int64
        assert batch.tokens.shape == batch.targets.shape == (20, 10)
        assert torch.equal(batch.targets, (batch.tokens + 1) % 1003)
        assert torch.equal(batch.tokens[:, 1:], batch.targets[:, :-1])
    assert torch.cat([batch.tokens for batch in epoch]).unique().numel() == 5 * 20 * 10


def test_a_batch_may_be_kept(counted: Path) -> None:
    train = open_shards(counted).train
    kept = list(islice(Batches(train, 10, 4), 60))
    again = islice(Batches(train, 10, 4), 60)
    for old, new in zip(kept, again, strict=True):
        assert torch.equal(old.windows, new.windows)
        assert torch.equal(old.samples, new.samples)


def test_the_order_of_one_data_set_is_frozen(counted: Path) -> None:
    """As it was before there were blends."""
    train = open_shards(counted).train
    batches = islice(Batches(train, 10, 8, seed=3, rank=1, world_size=2, start=96), 2)
    assert [batch.tokens[:, 0].tolist() for batch in batches] == [
        [692, 842, 933, 393],
        [523, 753, 893, 273],
    ]


def test_uint32_tokens(tmp_path: Path, make_shards: MakeShards) -> None:
    tokens = np.arange(70_000, 70_100)
    folder = make_shards(tmp_path / "wide", [[tokens]], dtype="uint32")
    batch = next(iter(Batches(open_shards(folder).train, 9, 11)))
    assert batch.windows.dtype == torch.uint32
    assert batch.tokens.min() == 70_000
    assert torch.equal(batch.to("cpu").targets, batch.targets)


@settings(max_examples=30)
@given(
    n_tokens=st.integers(40, 2000),
    seq_len=st.integers(1, 20),
    multiple=st.integers(1, 3),
    seed=st.integers(0, 2**40),
    steps_before=st.integers(0, 40),
    data=st.data(),
)
def test_same_batches_at_any_world_size_and_after_any_resume(
    make_shards: MakeShards,
    n_tokens: int,
    seq_len: int,
    multiple: int,
    seed: int,
    steps_before: int,
    data: st.DataObject,
) -> None:
    cuts = sorted(data.draw(st.sets(st.integers(1, n_tokens - 1), max_size=4)))
    global_batch = min(8 * multiple, n_tokens // seq_len // 8 * 8)
    if global_batch == 0:
        seq_len, global_batch = 1, 8
    with TemporaryDirectory() as scratch:
        shards = [[piece] for piece in np.split(np.arange(n_tokens), cuts)]
        train = open_shards(make_shards(Path(scratch) / "s", shards)).train
        epoch = n_tokens // seq_len
        steps = 2 * epoch // global_batch + 3

        def batches(count: int, **options: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
            stream = islice(Batches(train, seq_len, global_batch, seed, **options), count)
            return [(batch.samples, batch.windows.to(torch.int64)) for batch in stream]

        alone = batches(steps)
        samples = torch.cat([samples for samples, _ in alone])
        assert torch.equal(samples, torch.arange(steps * global_batch))
        starts = torch.cat([windows[:, 0] for _, windows in alone])
        for first in (0, epoch):  # every epoch covers its own windows, each once
            covered = (starts[first : first + epoch, None] + torch.arange(seq_len)) % n_tokens
            assert covered.unique().numel() == epoch * seq_len
        for world_size in (2, 4, 8):
            parts = [batches(steps, rank=r, world_size=world_size) for r in range(world_size)]
            for step, whole in enumerate(alone):
                for kind in (0, 1):
                    rows = torch.stack([part[step][kind] for part in parts], dim=1).flatten(0, 1)
                    assert torch.equal(rows, whole[kind])
        steps_before %= steps
        resumed = batches(steps - steps_before, start=steps_before * global_batch)
        for old, new in zip(alone[steps_before:], resumed, strict=True):
            assert torch.equal(old[0], new[0])
            assert torch.equal(old[1], new[1])


def test_batch_size_may_change_at_a_resume(counted: Path) -> None:
    """The position is samples, not steps."""
    train = open_shards(counted).train
    small = torch.cat([batch.windows for batch in islice(Batches(train, 10, 4), 9)])
    large = next(iter(Batches(train, 10, 24, start=12))).windows
    assert torch.equal(small[12:], large)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize(("max_tokens", "windows"), [(1, 1), (21, 3), (27, 3), (10_000, 14)])
def test_evaluation_can_be_cut_short_by_tokens(counted, world_size, max_tokens, windows):
    held_out = open_shards(counted).held_out  # 100 tokens: 14 windows of 7
    ranks = [
        list(evaluation(held_out, 7, 4, r, world_size, max_tokens=max_tokens))
        for r in range(world_size)
    ]
    samples = torch.cat([batch.samples for rank in ranks for batch in rank])
    assert sorted(samples[samples >= 0].tolist()) == list(range(windows))
    tokens = torch.cat([batch.tokens for rank in ranks for batch in rank])
    starts = tokens[samples >= 0][:, 0].sort().values  # evenly spread over the 14
    assert ((starts - starts[0]) // 7).tolist() == [14 * w // windows for w in range(windows)]


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_evaluation_reads_every_window_once(counted: Path, world_size: int) -> None:
    held_out = open_shards(counted).held_out  # 100 tokens: 14 windows of 7
    ranks = [list(evaluation(held_out, 7, 8, r, world_size)) for r in range(world_size)]
    assert {len(rank) for rank in ranks} == {2}
    seen = []
    for batch in (batch for rank in ranks for batch in rank):
        assert batch.tokens.shape == (8 // world_size, 7)
        real = batch.samples >= 0
        assert torch.equal((batch.targets != -100).all(1), real)
        assert torch.equal((batch.targets == -100).all(1), ~real)
        assert torch.equal(batch.targets[real], batch.tokens[real] + 1)
        assert torch.equal(batch.tokens[real, 0], batch.samples[real] * 7)
        seen += batch.samples[real].tolist()
    assert sorted(seen) == list(range(14))


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seq_len": 1003}, "context longer than the corpus: seq_len 1003 needs 1004 tokens"),
        ({"seq_len": 0}, "seq_len is 0"),
        ({"global_batch": 10, "world_size": 4}, "a global batch of 8 or 12, or 1, 2 ranks"),
        ({"global_batch": 0}, "global batch 0 does not divide"),
        ({"global_batch": 101}, "a global batch of 101 .* more than its 100 samples"),
        ({"global_batch": 128, "world_size": 128}, r"over 128 rank\(s\) is more than its 100"),
        ({"rank": 2, "world_size": 2}, "rank 2 of 2"),
        ({"start": -1}, "start is -1"),
    ],
)
def test_impossible_batches(counted: Path, options: dict[str, int], says: str) -> None:
    with pytest.raises(DataError, match=says) as error:
        Batches(open_shards(counted).train, **{"seq_len": 10, "global_batch": 8, **options})
    assert "\n" not in str(error.value)


def test_an_empty_split(tmp_path: Path, make_shards: MakeShards) -> None:
    held_out = open_shards(make_shards(tmp_path / "s", [[np.arange(10)]])).held_out
    assert (held_out.n_tokens, held_out.n_documents) == (0, 0)
    with pytest.raises(DataError, match=r"s \(held_out\): the split is empty; .* held_out above 0"):
        evaluation(held_out, 4, 4)


def test_opening_shards_imports_neither_torch_nor_datasets(counted: Path) -> None:
    code = (
        "import sys\nfrom sparse_gpt import data\n"
        f"data.open_shards({str(counted)!r})\n"
        "print([m for m in ('torch', 'datasets', 'sparse_gpt.model') if m in sys.modules])"
    )
    done = run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


@settings(max_examples=60)
@given(
    shards=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=4),
    starts=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    length=st.integers(1, 90),
)
def test_documents_are_those_of_the_index(
    make_shards: MakeShards, shards: list[list[int]], starts: list[int], length: int
) -> None:
    """They rise by one where a document begins, round the end of the stream too."""
    documents = [[np.zeros(n, np.uint16) for n in lengths] for lengths in shards]
    with TemporaryDirectory() as folder:
        train = open_shards(make_shards(Path(folder) / "s", documents)).train
        found = train.documents(np.array(starts), length)
    assert found.dtype == np.int32
    assert not found[:, 0].any()
    first_tokens = np.cumsum([0, *(n for lengths in shards for n in lengths)])
    places = (np.array(starts)[:, None] + np.arange(1, length)) % train.n_tokens
    assert np.array_equal(np.diff(found) == 1, np.isin(places, first_tokens))
    assert np.array_equal(np.diff(found) == 0, ~np.isin(places, first_tokens))


def test_batches_say_which_documents_their_tokens_are_of(novels: Path) -> None:
    """End of text stands at the head of each document of these shards, and nowhere else."""
    dataset = open_shards(novels)
    trained = islice(Batches(dataset.train, 200, 6, world_size=2, rank=1, documents=True), 60)
    evaluated = evaluation(dataset.held_out, 50, 8, documents=True)
    seen = 0
    for batch in (*trained, *evaluated):
        opens = batch.tokens == 50256
        opens[:, 0] = False
        assert torch.equal(batch.to("cpu").documents, opens.cumsum(1, dtype=torch.int32))
        seen += int(opens.sum())
    assert seen > 10
    assert next(iter(Batches(dataset.train, 200, 6))).documents is None
