"""Which blocks a token is given, and where it stands among those of a block."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparse_gpt.model.ffn.routing import Places, Route


@st.composite
def choices(draw):
    """Blocks that tokens chose, `(tokens, k)` and no block twice a token, of how many."""
    blocks = draw(st.integers(1, 9))
    k, tokens = draw(st.integers(1, blocks)), draw(st.integers(0, 20))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    return torch.rand(tokens, blocks, generator=generator).argsort(-1)[:, :k], blocks


@settings(max_examples=50)
@given(
    blocks=st.integers(1, 70),
    tokens=st.integers(0, 20),
    data=st.data(),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_route_is_softmax_and_the_largest_with_their_gradient(blocks, tokens, data, dtype):
    k = data.draw(st.integers(1, min(blocks, 8)))
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    logits = (3 * torch.randn(tokens, blocks)).to(dtype).requires_grad_()
    balance = torch.randn(blocks)
    energies, chosen = Route.apply(logits, balance, k)

    twin = logits.detach().clone().requires_grad_()
    wide = torch.promote_types(dtype, torch.float32)
    every = (twin.to(wide) + balance).softmax(-1)
    best = every.topk(k, -1)
    assert (energies.dtype, chosen.dtype) == (wide, torch.int64)
    found = every.gather(-1, chosen)
    torch.testing.assert_close(found, best.values, rtol=2**-12, atol=0)  # ties: either block
    assert all(len(set(token)) == k for token in chosen.tolist())
    assert torch.equal(energies, every.gather(-1, chosen))
    assert not chosen.requires_grad

    grad = torch.randn(tokens, k).to(wide)
    energies.backward(grad)
    every.gather(-1, chosen).backward(grad)
    tolerance = {"rtol": 2e-2, "atol": 1e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(logits.grad, twin.grad, **tolerance)


def test_the_balance_chooses_and_weighs():
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    energies, chosen = Route.apply(logits, torch.tensor([0.0, 0.0, 3.0]), 2)
    assert chosen.tolist() == [[2, 0]]
    assert torch.equal(energies[0], torch.tensor([2.0, 1.0, 3.0]).softmax(-1)[[2, 0]])


@pytest.mark.parametrize("k", [1, 3])
def test_ties_go_to_the_first_blocks(k):
    assert Route.apply(torch.zeros(2, 5), torch.zeros(5), k)[1].tolist() == [list(range(k))] * 2


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_token_gone_wrong_has_blocks_like_any_other(value):
    """The guard skips its step: until then nothing may run out of bounds."""
    logits = torch.zeros(2, 5)
    logits[0, 3] = value
    chosen = Route.apply(logits, torch.zeros(5), 5)[1]
    assert chosen.sort(-1).values.tolist() == [[0, 1, 2, 3, 4]] * 2


@settings(max_examples=50)
@given(choices())
def test_places_are_a_stable_sort_by_block_and_back(made):
    chosen, blocks = made
    k = chosen.shape[1]
    places = Places.of(chosen, blocks)
    order, rows, ends = (tensor.tolist() for tensor in places)
    assert (places.order.dtype, places.rows.dtype, places.ends.dtype) == (
        torch.int64,
        torch.int64,
        torch.int32,
    )
    flat = chosen.flatten().tolist()
    assert order == sorted(range(len(flat)), key=lambda place: (flat[place], place))
    assert [order[row] for token in rows for row in token] == list(range(len(flat)))
    assert places.rows.shape == chosen.shape
    assert all(
        place // k == token
        for token, own in enumerate(rows)
        for place in map(order.__getitem__, own)
    )
    loads = [flat.count(block) for block in range(blocks)]
    assert ends == [sum(loads[: block + 1]) for block in range(blocks)]
    assert places.loads().tolist() == loads
    assert places.loads().dtype == torch.int64


def test_nothing_is_asked_of_the_device():
    """On the meta device there is nothing to ask."""
    logits = torch.empty(7, 5, device="meta", requires_grad=True)
    energies, chosen = Route.apply(logits, torch.empty(5, device="meta"), 2)
    energies.sum().backward()
    assert logits.grad.shape == (7, 5)
    assert Places.of(chosen, 5).loads().shape == (5,)
