import math
from functools import cache

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import max_pool2d, pad

from sparse_gpt import GPT, CausalSelfAttention, ModelConfig
from sparse_gpt.model.attention import KVCache, block_mask, dense_mask, document_mask, has_flex


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


def packed(*lengths):
    """`(1, sum(lengths))`: the number of each token's document, in no order."""
    return torch.randperm(len(lengths)).repeat_interleave(torch.tensor(lengths))[None]


def results(attention, x, mask):
    """What comes out, and the gradients of the inputs and of every weight."""
    y = attention(x, mask=mask)
    return y, *torch.autograd.grad(y.square().sum(), [x, *attention.parameters()])


LENGTHS = st.lists(st.integers(1, 4) | st.integers(1, 200), min_size=1, max_size=6)
COUNTED = settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@COUNTED
@given(rows=st.lists(LENGTHS, min_size=1, max_size=2), seed=st.integers(0, 2**31))
@pytest.mark.usefixtures("eager_flex")
def test_flex_attention_is_what_the_dense_mask_makes_of_it(attention, rows, seed):
    torch.manual_seed(seed)
    seq = min(map(sum, rows))
    documents = torch.cat([packed(*lengths)[:, :seq] for lengths in rows])
    x = torch.randn(len(rows), seq, 32, dtype=torch.float64, requires_grad=True)
    dense, blocks = dense_mask(documents), block_mask(documents)
    for ours, expected in zip(
        results(attention, x, blocks), results(attention, x, dense), strict=True
    ):
        torch.testing.assert_close(ours, expected)

    # What a kernel goes by, and torch's reference does not: the blocks that are seen at all.
    whole = pad(dense.double(), (0, -seq % 128, 0, -seq % 128))
    assert torch.equal(blocks.to_dense(), max_pool2d(whole, 128).int())


@pytest.mark.slow
@pytest.mark.usefixtures("flex")
def test_flex_attention_compiles_here_as_far_as_a_cpu_goes(attention):
    """Its forward, by Inductor; it reads the lists of blocks."""
    attention = attention.float()
    documents = packed(1, 140, 90, 9)
    x = torch.randn(1, 240, 32)
    with torch.compiler.set_stance("force_eager"):  # made by Inductor it would take 20 s
        mask = block_mask(documents)
    with torch.no_grad():
        expected = attention(x, mask=dense_mask(documents))
        torch.testing.assert_close(attention(x, mask=mask), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compiled", "recompute"),
    [
        ("attention", "none"),
        ("attention", "full"),
        ("blocks", "none"),
        ("blocks", "full"),
        ("model", "none"),
    ],
)
@pytest.mark.usefixtures("flex")
def test_compiled_once_whatever_the_documents(monkeypatch, compiled, recompute):
    """Alone, inside blocks as `compile: true` has them, and inside the whole model."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    options = {"backend": counter, "dynamic": False, "fullgraph": True}
    monkeypatch.setattr(
        "sparse_gpt.model.attention._compile", cache(lambda f: torch.compile(f, **options))
    )
    sizes = {"vocab_size": 97, "d_model": 32, "n_head": 2, "n_layer": 3, "max_seq_len": 150}
    model = GPT(ModelConfig.preset("tiny", document_mask=True, **sizes))
    plain = GPT(model.config)
    plain.load_state_dict(model.state_dict())
    model.recompute(recompute)
    if compiled == "blocks":
        for block in model.blocks:
            block.compile(**options)
    elif compiled == "model":
        model.compile(**options)

    frames = []
    for documents in (packed(100, 1, 49), packed(3, 147), packed(150)):
        tokens = torch.randint(97, (1, 150))
        loss = model(tokens, tokens, documents)
        loss.backward()
        frames.append(counter.frame_count)
        with monkeypatch.context() as patch:
            patch.setattr("sparse_gpt.model.attention.has_flex", lambda *_: False)
            expected = plain(tokens, tokens, documents)
            expected.backward()
        torch.testing.assert_close(loss, expected)
        for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)
    assert frames == [1 if compiled == "model" else 2] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("flex")
def test_flex_attention_keeps_what_causal_attention_does(attention, monkeypatch):
    compiled = cache(lambda f: torch.compile(f, backend="aot_eager", dynamic=False))
    monkeypatch.setattr("sparse_gpt.model.attention._compile", compiled)
    attention, kept = attention.float(), []
    documents = packed(500, 12, 512)
    for mask in (None, block_mask(documents), dense_mask(documents)):
        storages = {}

        def pack(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with saved_tensors_hooks(pack, lambda tensor: tensor):
            y = attention(torch.randn(1, 1024, 32), mask=mask)
        kept.append(sum(storage.nbytes() for storage in storages.values()))
        del y
    causal, flex, dense = kept
    assert dense == causal + 4 * 1024**2  # torch makes float32 of the bools
    # Four lists of 8 × 8 blocks and their lengths, and each token's document.
    assert flex == causal + 4 * 4 * (8 * 8 + 8) + 8 * 1024


@pytest.mark.usefixtures("eager_flex")
def test_a_block_mask_is_made_without_a_look_at_a_value():
    """On a GPU a look would wait for it. Fake tensors have no values to look at."""
    with FakeTensorMode():
        documents = torch.zeros(2, 200, dtype=torch.int64)
        assert isinstance(document_mask(documents, ModelConfig.preset("tiny")), BlockMask)


def test_the_device_and_the_heads_choose_the_mask():
    wide, narrow = (ModelConfig.preset("tiny", d_model=64, n_head=n) for n in (4, 8))
    assert has_flex("cuda:1", wide)
    assert not has_flex("cuda", narrow)  # Triton's products are of 16 values at least
    assert not has_flex("cpu", wide)
