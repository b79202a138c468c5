"""What one rank saves fits any other: engines of every ZeRO stage, files cut anywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import stage

from sparse_gpt.train.checkpoint.zero_state import (
    KINDS,
    Fragment,
    _share,
    fragments,
    restore,
    snapshot,
)


def trained(engine, batch, *overrides):
    """An engine after two steps."""
    made = engine(*overrides)
    for step in range(2):
        made.step(batch(step).tokens, batch(step).targets, step)
    return made


def equal(one, other):
    return one["step"] == other["step"] and all(
        torch.equal(saved[kind], other["fragments"][name][kind])
        for name, saved in one["fragments"].items()
        for kind in KINDS
    )


@pytest.mark.parametrize("zero_stage", range(4))
def test_a_rank_alone_holds_all_of_every_parameter(engine, zero_stage):
    made = engine(stage(zero_stage))
    sizes = {name: p.numel() for name, p in engine().module.named_parameters()}
    found = fragments(made.deepspeed)
    assert {f.name: f.numel for f in found} == sizes
    assert all(f.start == 0 for f in found)


@pytest.mark.parametrize("to_stage", range(4))
@pytest.mark.parametrize("from_stage", range(4))
def test_every_stage_goes_on_from_every_other(engine, batch, from_stage, to_stage):
    made, other = trained(engine, batch, stage(from_stage)), engine(stage(to_stage), "seed=1")
    saved = snapshot(made.deepspeed, 0, 1)
    assert saved["step"] == 2
    assert not equal(snapshot(other.deepspeed, 0, 1), saved)
    restore(other.deepspeed, [saved])
    assert equal(snapshot(other.deepspeed, 0, 1), saved)
    other.set_statistics_and_scale(made.statistics_and_scale())
    losses = [each.step(batch(2).tokens, batch(2).targets, 2)[0] for each in (made, other)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-5)


def test_a_snapshot_is_a_copy(engine, batch):
    made = trained(engine, batch, stage(0))
    saved = snapshot(made.deepspeed, 0, 1)
    before = {name: each["master"].clone() for name, each in saved["fragments"].items()}
    made.step(batch(2).tokens, batch(2).targets, 2)
    assert all(torch.equal(saved["fragments"][name]["master"], before[name]) for name in before)


@given(numel=st.integers(0, 300), offset=st.integers(0, 9), world_size=st.integers(1, 40))
def test_ranks_share_a_fragment_without_gap_or_overlap(numel, offset, world_size):
    base = torch.arange(400.0)
    whole = Fragment("p", 7, numel, base, offset)
    parts = [part for rank in range(world_size) for part in _share(whole, rank, world_size)]
    assert [part.start for part in parts] == [7, *(p.start + p.numel for p in parts)][: len(parts)]
    assert sum(part.numel for part in parts) == numel
    values = [value for part in parts for value in part.part(base).tolist()]
    assert values == whole.part(base).tolist()
    sizes = [
        numel * (rank + 1) // world_size - numel * rank // world_size for rank in range(world_size)
    ]
    assert [part.numel for part in parts] == [size for size in sizes if size]


@pytest.fixture
def pair_of_engines(engine, batch):
    """A trained engine's snapshot, and another engine to restore into."""
    return snapshot(trained(engine, batch, stage(1)).deepspeed, 0, 1), engine(stage(2), "seed=1")


def cut(saved, places):
    """The snapshot as files of several ranks, every parameter cut at shares of its length."""
    files = [{"step": saved["step"], "fragments": {}} for _ in range(len(places) + 1)]
    for name, fragment in saved["fragments"].items():
        numel = len(fragment["master"])
        edges = [0, *sorted(int(place * numel) for place in places), numel]
        for file, low, high in zip(files, edges, edges[1:], strict=False):
            if low < high:
                kinds = {kind: fragment[kind][low:high] for kind in KINDS}
                file["fragments"][name] = {"start": low, **kinds}
    return files


def test_files_cut_anywhere_are_the_same_checkpoint(pair_of_engines):
    saved, other = pair_of_engines

    @settings(max_examples=20)
    @given(places=st.lists(st.floats(0, 1), max_size=6), rotate=st.integers(0, 6))
    def restored(places, rotate):
        for fragment in fragments(other.deepspeed):
            fragment.part(fragment.base.detach()).zero_()
        files = cut(saved, places)
        turn = rotate % len(files)
        restore(other.deepspeed, files[turn:] + files[:turn])
        assert equal(snapshot(other.deepspeed, 0, 1), saved)

    restored()


def test_files_of_another_model_are_refused(pair_of_engines):
    saved, other = pair_of_engines
    name, fragment = next(iter(saved["fragments"].items()))
    numel = len(fragment["master"])
    short = {"start": 0, **{kind: fragment[kind][:-1] for kind in KINDS}}
    part = {**saved, "fragments": {**saved["fragments"], name: short}}
    with pytest.raises(ValueError, match=f"{name}: {numel - 1} of {numel} elements are in"):
        restore(other.deepspeed, [part])
    del part["fragments"][name]
    with pytest.raises(ValueError, match=f"{name}: 0 of {numel} elements are in the checkpoint"):
        restore(other.deepspeed, [part])
