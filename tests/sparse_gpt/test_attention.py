import math

import pytest
import torch

from sparse_gpt import CausalSelfAttention, ModelConfig
from sparse_gpt.attention import KVCache


@pytest.fixture
def attention():
    return CausalSelfAttention(ModelConfig.preset("tiny", d_model=32)).double()


def test_equals_the_definition(attention):
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    q, k, v = (part.view(2, 7, 4, 8) for part in attention.qkv(x).split(32, -1))
    mixed = torch.zeros(2, 7, 4, 8, dtype=torch.float64)
    for t in range(7):
        scores = torch.einsum("bhc,bshc->bhs", q[:, t], k[:, : t + 1]) / math.sqrt(8)
        mixed[:, t] = torch.einsum("bhs,bshc->bhc", scores.softmax(-1), v[:, : t + 1])
    torch.testing.assert_close(attention(x), attention.out(mixed.flatten(2)))


@pytest.mark.parametrize("prefix", [1, 3])
def test_cache_continues_where_it_stopped(attention, prefix):
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    cache = KVCache(7)
    pieces = [attention(x[:, :prefix], cache)]
    pieces += [attention(x[:, t : t + 1], cache) for t in range(prefix, 7)]
    torch.testing.assert_close(torch.cat(pieces, 1), attention(x))


def test_several_tokens_cannot_follow_a_cache(attention):
    x = torch.randn(2, 4, 32, dtype=torch.float64)
    cache = KVCache(8)
    attention(x, cache)
    with pytest.raises(ValueError, match="4 tokens after 4 cached"):
        attention(x, cache)
