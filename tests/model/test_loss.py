import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from sparse_gpt.model.loss import chunk_size, head_cross_entropy

VOCAB, PADDED, WIDTH = 11, 16, 5


def sample(tokens, dtype=torch.float64, ignored=0.0):
    hidden = torch.randn(tokens, WIDTH, dtype=dtype, requires_grad=True)
    weight = torch.randn(PADDED, WIDTH, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCAB, (tokens,))
    targets[1:][torch.rand(tokens - 1) < ignored] = -100
    return hidden, weight, targets


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 20),
    chunk=st.integers(1, 25),
    ignored=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_any_chunk_gives_the_plain_loss_and_gradients(tokens, chunk, ignored, seed):
    torch.manual_seed(seed)
    hidden, weight, targets = sample(tokens, ignored=ignored)
    ours = head_cross_entropy(hidden, weight, targets, VOCAB, chunk)
    plain = F.cross_entropy(hidden @ weight[:VOCAB].t(), targets)
    torch.testing.assert_close(ours, plain)
    # Times 3, as loss scaling and gradient accumulation do.
    mine = torch.autograd.grad(3 * ours, (hidden, weight))
    torch.testing.assert_close(mine, torch.autograd.grad(3 * plain, (hidden, weight)))
    with torch.no_grad():
        assert head_cross_entropy(hidden, weight, targets, VOCAB, chunk) == ours


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_its_rounding(dtype):
    hidden, weight, targets = sample(300, dtype)
    loss = head_cross_entropy(hidden, weight, targets, VOCAB, 64)
    assert loss.dtype == torch.float32
    mine = torch.autograd.grad(loss, (hidden, weight))
    exact = F.cross_entropy(hidden.double() @ weight.double()[:VOCAB].t(), targets)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-2, atol=0)
    for got, want in zip(mine, torch.autograd.grad(exact, (hidden, weight)), strict=True):
        assert got.dtype == dtype
        # Most of a float16 mean's gradients would be 0, were it not for the late scaling.
        assert (got - want).norm() < 0.02 * want.norm()


def test_nothing_is_computed_twice_and_no_chunk_is_large():
    hidden, weight, targets = sample(13)
    with FlopCounterMode(display=False) as counter:
        head_cross_entropy(hidden, weight, targets, VOCAB, 4).backward()
    assert counter.get_total_flops() == 3 * 2 * 13 * WIDTH * PADDED
    for device, most in (("cpu", 2**26), ("cuda", 2**29)):
        for tokens in (1, 333, 334, 512, 16384):
            size = chunk_size(tokens, 50304, torch.device(device))
            assert 4 * size * 50304 <= most
            assert size * math.ceil(tokens / size) < tokens + math.ceil(tokens / size)


def test_without_a_target_there_is_no_mean():
    hidden, weight, targets = sample(3)
    assert head_cross_entropy(hidden, weight, targets.fill_(-100), VOCAB).isnan()
