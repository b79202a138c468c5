"""A learned spectrum in blocks: its definition, and what a token and a training step see of it."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from sparse_gpt import SparseFFNConfig, UltraEfficientSparseFFN, count_flops
from sparse_gpt.model.config import DictionaryConfig
from sparse_gpt.model.ffn import BlockDictionary
from sparse_gpt.model.recompute import recomputed

shapes = st.fixed_dictionaries(
    {
        "blocks": st.integers(1, 9),
        "top_k": st.integers(1, 4),
        "block_size": st.sampled_from([1, 3, 4, 8, 16]),
    }
).filter(lambda shape: shape["top_k"] <= shape["blocks"])
widths = st.sampled_from([4, 5, 16])


def dictionary(d_model, wake=None, **options):
    part = BlockDictionary(d_model, DictionaryConfig(**options))
    part.moves.copy_(torch.randint(-20, 20, (part.config.blocks,)))
    return wake(part) if wake else part


def by_definition(part, h):
    """Token by token, block by block."""
    rate, out = part.config.balance_rate, []
    for token in h:
        e = (part.router.weight @ token + rate * part.moves).softmax(-1)
        y = torch.zeros_like(token)
        for b in e.argsort(descending=True)[: part.config.top_k]:
            c = part.analysis[b].T @ token
            p = c + (2 * c**2 - 1 + 1) / 4  # T_1, and T_2 with T_0
            y = y + e[b] * (part.synthesis[b].T @ p)
        out.append(y)
    return torch.stack(out) if out else torch.zeros_like(h)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, d=widths, tokens=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_output_and_gradients_are_those_of_the_definition(wake, shape, d, tokens, seed):
    torch.manual_seed(seed)
    part = dictionary(d, wake, **shape).double()
    h = torch.randn(tokens, d, dtype=torch.float64, requires_grad=True)
    inputs = (h, *part.parameters())
    y, expected = part(h), by_definition(part, h)
    torch.testing.assert_close(y, expected)
    grad = torch.randn_like(y)
    found = torch.autograd.grad(y, inputs, grad)
    if tokens:
        expected = torch.autograd.grad(expected, inputs, grad, materialize_grads=True)
    else:
        expected = [torch.zeros_like(each) for each in inputs]
    torch.testing.assert_close(found, expected)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(shape=shapes, d=widths, tokens=st.integers(0, 12), seed=st.integers(0, 2**31))
def test_the_few_tokens_of_decoding_are_those_of_the_definition(wake, shape, d, tokens, seed):
    torch.manual_seed(seed)
    part = dictionary(d, wake, **{**shape, "blocks": 8 * shape["blocks"]}).double().eval()
    h = torch.randn(tokens, d, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(part(h), by_definition(part, h))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_close_to_the_definition(wake, dtype):
    part = dictionary(32, wake, blocks=6).to(dtype)
    h = torch.randn(50, 32, dtype=dtype)
    wide = copy.deepcopy(part).double()
    error = (part(h).double() - by_definition(wide, h.double())).norm(dim=1)
    # A token whose blocks are all but even in energy may be given others.
    assert error.median() < (0.05 if dtype == torch.bfloat16 else 1e-5)


@pytest.mark.parametrize("k", [1, 3])
def test_gradients_are_right_to_the_last_input(wake, k):
    part = dictionary(4, wake, blocks=3, top_k=k, block_size=3).double()
    names, parameters = zip(*part.named_parameters(), strict=True)
    h = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda h, *values: functional_call(part, dict(zip(names, values, strict=True)), (h,)),
        (h, *parameters),
    )


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=st.sampled_from([4, 8, 64]),
    k=st.integers(1, 4),
    size=st.sampled_from([4, 8, 24]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    place=st.integers(0, 40),
    others=st.integers(4, 40),
    seed=st.integers(0, 2**31),
)
def test_a_token_is_the_same_to_the_bit_whatever_is_beside_it(
    wake, blocks, k, size, dtype, place, others, seed
):
    """At widths of which test_grouped.py says why; of under 4 tokens torch's linear layer, the
    router, is another kernel."""
    torch.manual_seed(seed)
    part = dictionary(16, wake, blocks=blocks, top_k=k, block_size=size).to(dtype)
    h = torch.randn(40, 16, dtype=dtype)
    mine = torch.randperm(40)[:place]
    other = 30 * torch.randn(others, 16, dtype=dtype)
    place = min(place, others)
    among = torch.cat((other[:place], h[mine], other[place:]))
    assert torch.equal(part(among)[place : place + len(mine)], part(h)[mine])


def test_a_block_that_no_token_has_gets_a_gradient_of_zero():
    part = dictionary(8, blocks=5, top_k=1, block_size=4)
    part.moves.fill_(-1000)
    part.moves[2] = 1000
    part(torch.randn(3, 8)).sum().backward()
    for weight in (part.analysis, part.synthesis):
        used = weight.grad.flatten(1).abs().sum(1) > 0
        assert used.tolist() == [False, False, True, False, False]


def test_balance_moves_by_whole_numbers_towards_an_even_load():
    part = BlockDictionary(8, DictionaryConfig(blocks=4, top_k=1))
    part.loads.copy_(torch.tensor([5, 2, 0, 1]))
    part.balance()
    assert part.moves.tolist() == [-1, 0, 1, 1]
    part.balance()
    assert part.moves.tolist() == [-2, 0, 2, 2]
    part.loads.zero_()  # nothing was given: nothing moves
    part.balance()
    assert part.moves.tolist() == [-2, 0, 2, 2]


def test_balance_evens_out_what_a_router_prefers():
    part = BlockDictionary(8, DictionaryConfig(blocks=8))
    with torch.no_grad():
        part.router.weight[0] += 0.2
    fullest = []
    for _ in range(60):
        part.loads.zero_()
        part(torch.randn(256, 8) + 1)
        fullest.append((part.loads.max() / part.loads.double().mean()).item())
        part.balance()
    assert fullest[0] > 2.5
    assert max(fullest[-10:]) < 2


def test_loads_add_up_in_training_alone_and_leave_the_output(wake):
    part = dictionary(8, wake, blocks=4)
    h = torch.randn(3, 5, 8)
    moves = part.moves.clone()
    first = part(h)
    loads = part.loads.clone()
    assert loads.sum() == 2 * 15
    assert torch.equal(part(h), first)
    assert torch.equal(part.loads, 2 * loads)
    part.eval()(h)
    part.energy_entropy(h)
    assert torch.equal(part.loads, 2 * loads)
    assert torch.equal(part.moves, moves)


def test_what_is_computed_again_is_not_counted_again(wake):
    part = dictionary(8, wake, blocks=4)
    h = torch.randn(15, 8, requires_grad=True)
    plain = copy.deepcopy(part)
    plain(h).square().sum().backward()
    again = recomputed(part, h)
    part.moves += 50  # as when the balance moves before a backward
    moved = part.moves.clone()
    again.square().sum().backward()
    assert torch.equal(part.loads, plain.loads)
    assert torch.equal(part.moves, moved)
    for ours, theirs in zip(part.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad)


@pytest.mark.parametrize("change", [lambda part: part.bfloat16(), lambda part: part.half()])
def test_whole_numbers_stay_exact_in_any_precision(change):
    part = BlockDictionary(8, DictionaryConfig(blocks=4))
    big = torch.tensor([2**40 + 1, 257, 3, 0])
    part.loads.copy_(big)
    part.moves.copy_(-big)
    change(part)
    assert part.analysis.dtype != torch.float32
    assert torch.equal(part.loads, big)
    assert torch.equal(part.moves, -big)
    part.loads.zero_()
    part(torch.randn(1000, 8, dtype=part.analysis.dtype))
    assert part.loads.sum() == 2000


def test_entropy_is_that_of_the_energies():
    part = dictionary(8, blocks=4)
    h = torch.randn(2, 9, 8)
    expected = torch.distributions.Categorical(logits=part.router(h) + part.beta).entropy().mean()
    torch.testing.assert_close(part.energy_entropy(h), expected.detach())
    with torch.no_grad():
        part.router.weight.zero_()
        part.moves.zero_()
    assert part.energy_entropy(h).item() == pytest.approx(torch.tensor(4.0).log().item())
    assert part.sparsity(h) == 0.5


@pytest.mark.parametrize("d", [16, 10])
def test_flops_are_what_the_counter_sees_forward_and_backward(d):
    part = BlockDictionary(d, DictionaryConfig(blocks=5, block_size=3))
    h = torch.randn(2, 7, d, requires_grad=True)
    expected = count_flops(part, batch=2, seq=7).total.matmul
    assert expected == 2 * 14 * (5 * d + 2 * 2 * 3 * d)
    with FlopCounterMode(display=False) as counter:
        y = part(h)
    assert counter.get_total_flops() == expected
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * expected


LEARNED = {"spectral": {"kind": "dictionary"}, "polynomial": None, "norm_out": None}


@pytest.mark.parametrize(
    ("spectral", "message"),
    [
        ({"top_k": 65}, "top_k 65 is more than the 64 blocks there are"),
        ({"blocks": 2, "top_k": 3}, "top_k 3 is more than the 2 blocks there are"),
        ({"top_k": 0}, "top_k\n.*greater than 0.*input_value=0"),
        ({"blocks": 0}, "blocks\n.*greater than 0.*input_value=0"),
        ({"balance_rate": -0.1}, r"balance_rate\n.*greater than or equal to 0.*input_value=-0\.1"),
    ],
)
def test_a_dictionary_that_cannot_be_is_refused_by_name(spectral, message):
    with pytest.raises(ValueError, match=message):
        DictionaryConfig(**spectral)


@pytest.mark.parametrize(
    ("over", "message"),
    [
        ({"polynomial": {}}, "polynomial must be null with a dictionary"),
        ({"norm_out": "before"}, "norm_out must be null with a dictionary"),
        ({"spectral": None}, "polynomial must be null with a dictionary, and with nothing else"),
    ],
)
def test_what_a_dictionary_stands_for_cannot_be_beside_it(over, message):
    with pytest.raises(ValueError, match=message):
        SparseFFNConfig(**{**LEARNED, **over})


def test_a_width_that_does_not_divide_is_refused_by_name():
    with pytest.raises(ValueError, match="top_k 3 does not divide d_model 32"):
        BlockDictionary(32, DictionaryConfig(top_k=3))
    with pytest.raises(ValueError, match="top_k 3 does not divide d_model 32"):
        UltraEfficientSparseFFN(
            32, config=SparseFFNConfig(**{**LEARNED, "spectral": DictionaryConfig(top_k=3)})
        )
    assert BlockDictionary(32, DictionaryConfig(top_k=3, block_size=7)).size == 7
