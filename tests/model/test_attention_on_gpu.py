"""FlexAttention's kernels against `scaled_dot_product_attention` with a tensor for a mask.

What a CPU can try of it is in test_attention.py and test_model.py.
"""

import pytest
import torch

from sparse_gpt import GPT, CausalSelfAttention, ModelConfig
from sparse_gpt.model.attention import block_mask, dense_mask

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
# 300 is no multiple of a kernel's blocks; the last row is one document.
LENGTHS = ((1, 1, 126, 130, 42), (257, 1, 42), (300,))
SEQ = 300


def packed(rows=LENGTHS):
    """`(rows, seq)`: the number of each token's document."""
    numbers = [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in rows]
    return torch.stack(numbers).cuda()


def gpt(dtype):
    sizes = {"vocab_size": 97, "d_model": 128, "n_head": 2, "max_seq_len": SEQ}
    config = ModelConfig.preset("tiny", n_layer=2, document_mask=True, **sizes)
    return GPT(config).to("cuda", dtype)


def train(model, tokens, documents):
    """The loss and every parameter's gradient."""
    model.zero_grad()
    loss = model(tokens, tokens, documents)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters())]


def close(ours, expected, tolerance):
    """As vectors: a gradient's smallest entries are all rounding."""
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).float().norm() <= tolerance * b.float().norm()


TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.02}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_equals_the_dense_mask_forward_and_backward(dtype):
    attention = CausalSelfAttention(ModelConfig.preset("tiny", d_model=128, n_head=2))
    attention.to("cuda", dtype)
    x = torch.randn(3, SEQ, 128, device="cuda", dtype=dtype, requires_grad=True)
    found = []
    for mask in (block_mask(packed()), dense_mask(packed())):
        y = attention(x, mask=mask)
        found.append((y, *torch.autograd.grad(y.sin().sum(), [x, *attention.parameters()])))
    close(*found, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_other_documents_do_not_move_a_bit(dtype):
    model, documents = gpt(dtype), packed()
    tokens = torch.randint(97, (3, SEQ), device="cuda")
    before = model(tokens, documents=documents)
    for row, lengths in enumerate(LENGTHS):
        other, changed = tokens.clone(), documents[row] == len(lengths) - 1
        other[row, changed] = torch.randint(97, (int(changed.sum()),), device="cuda")
        after = model(other, documents=documents)
        assert torch.equal(after[row, ~changed], before[row, ~changed])
        assert not torch.equal(after[row, changed], before[row, changed])


@pytest.mark.parametrize(
    ("compiled", "dtype"),
    [
        ("attention", torch.float32),
        ("attention", torch.bfloat16),
        ("blocks", torch.bfloat16),
        ("model", torch.bfloat16),
    ],
)
def test_trains_recomputed_and_compiled_as_with_the_dense_mask(monkeypatch, compiled, dtype):
    model, documents = gpt(dtype), packed()
    tokens = torch.randint(97, (3, SEQ), device="cuda")
    with monkeypatch.context() as patch:
        patch.setattr("sparse_gpt.model.attention.has_flex", lambda *_: False)
        expected = train(model, tokens, documents)
    if compiled == "blocks":
        for block in model.blocks:
            block.compile(dynamic=False)
    elif compiled == "model":
        model.compile(dynamic=False)
    close(train(model, tokens, documents), expected, 2 * TOLERANCE[dtype])
    if compiled != "model":
        model.recompute("full")
        close(train(model, tokens, documents), expected, 2 * TOLERANCE[dtype])


def test_it_neither_waits_for_the_device_nor_makes_a_square():
    seq = 8192
    attention = CausalSelfAttention(ModelConfig.preset("tiny", d_model=32, n_head=2))
    attention.to("cuda", torch.bfloat16)
    x = torch.randn(1, seq, 32, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    documents = torch.arange(seq, device="cuda")[None] // 500

    def step():
        attention(x, mask=block_mask(documents)).sum().backward()

    step()  # compiles
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    try:
        torch.cuda.set_sync_debug_mode("error")
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated() - before < seq**2 / 2
