import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_gpt import GPT, DenseBlock, DenseFFN, DenseFFNConfig, ModelConfig, Sampling, SparseBlock

FEEDBACK = {"preset": "light", "feedback": {}}


def sample(vocab=97, batch=2, seq=12):
    return torch.randint(vocab, (batch, seq))


def tiny(ffn="dense", **overrides):
    sizes = {"vocab_size": 97, "max_seq_len": 16, "d_model": 32, "n_layer": 2, "n_head": 4}
    return GPT(ModelConfig.preset("tiny", ffn=ffn, **{**sizes, **overrides}))


@settings(
    max_examples=10,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("training", [True, False])
def test_logits_do_not_see_the_future_or_other_samples(model_config, wake, training, data):
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    last = data.draw(st.integers(0, 10))
    model = wake(GPT(model_config)).train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tokens = sample()
    other = sample()
    other[0, : last + 1] = tokens[0, : last + 1]

    torch.manual_seed(1)  # the same dropout
    before = model(tokens)[0, : last + 1]
    model.load_state_dict(state)
    torch.manual_seed(1)
    after = model(other)
    assert torch.equal(before, after[0, : last + 1])


def packed(lengths):
    """`(1, sum(lengths))`: the number of each token's document."""
    numbers = torch.randperm(len(lengths))
    return numbers.repeat_interleave(torch.tensor(lengths))[None]


@settings(
    max_examples=6,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
@pytest.mark.parametrize("what", ["none", "selective", "full"])
@pytest.mark.parametrize("ffn", ["dense", FEEDBACK])
@pytest.mark.parametrize("mask", ["dense_mask", pytest.param("eager_flex", marks=pytest.mark.slow)])
def test_a_document_does_not_see_the_others(request, wake, mask, ffn, what, data):
    """Neither in its logits nor in what it learns, in any order and however many there are."""
    if mask == "eager_flex":
        request.getfixturevalue(mask)
    torch.manual_seed(data.draw(st.integers(0, 2**31)))
    lengths = data.draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    chosen = data.draw(st.integers(0, len(lengths) - 1))
    start = sum(lengths[:chosen])
    here = slice(start, start + lengths[chosen])
    model = wake(tiny(ffn, document_mask=True))
    model.recompute(what)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    tokens, documents = sample(batch=1, seq=sum(lengths)), packed(lengths)
    other = sample(batch=1, seq=sum(lengths))
    other[0, here] = tokens[0, here]

    before = model(tokens, documents=documents)[0, here]
    model.load_state_dict(state)
    after = model(other, documents=documents)[0, here]
    assert torch.equal(before, after)
    model.load_state_dict(state)
    alone = model(tokens[:, here], documents=torch.zeros_like(tokens[:, here]))[0]
    torch.testing.assert_close(before, alone, rtol=1e-4, atol=1e-5)

    targets = torch.full_like(tokens, -100)
    targets[0, here] = sample(batch=1, seq=lengths[chosen])
    gradients = []
    for row in (tokens, other):
        model.load_state_dict(state)
        model.zero_grad()
        model(row, targets, documents).backward()
        gradients.append([p.grad for p in model.blocks.parameters()])
    assert all(map(torch.equal, *gradients))


def test_documents_are_neither_ignored_nor_missing():
    tokens = sample()
    with pytest.raises(ValueError, match="ignores the documents"):
        tiny()(tokens, documents=tokens)
    with pytest.raises(ValueError, match="needs the documents"):
        tiny(document_mask=True)(tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_document_is_an_ordinary_row(dtype):
    model, masked = tiny().to(dtype), tiny(document_mask=True).to(dtype)
    masked.load_state_dict(model.state_dict())
    tokens = sample()
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(
        masked(tokens, documents=torch.ones_like(tokens)), model(tokens), rtol=0, atol=tolerance
    )
    assert torch.equal(masked.generate(tokens, 4), model.generate(tokens, 4))


@pytest.mark.parametrize(
    ("size", "published"),
    [
        ("124m", 124_439_808),
        ("355m", 354_823_168),
        ("774m", 774_030_080),
        ("1558m", 1_557_611_200),
    ],
)
def test_dense_sizes_are_gpt2s(size, published):
    with torch.device("meta"):
        model = GPT(ModelConfig.preset(size))
    padding = (50304 - 50257) * model.config.d_model
    assert sum(p.numel() for p in model.parameters()) - padding == published


@pytest.mark.parametrize("ffn", ["dense", FEEDBACK])
@pytest.mark.parametrize("vocab_size", [97, 128])
def test_loss_and_gradients_equal_the_naive_cross_entropy(ffn, vocab_size):
    model = tiny(ffn, vocab_size=vocab_size).eval()
    tokens, targets = sample(vocab_size), sample(vocab_size)
    targets[0, 3:] = -100
    loss = model(tokens, targets)
    loss.backward()
    gradients = [p.grad.clone() for p in model.parameters()]

    model.zero_grad()
    logits = model(tokens)
    assert logits.shape == (2, 12, vocab_size)
    log_p = logits.double() - logits.double().logsumexp(-1, keepdim=True)
    kept = [(b, t) for b in range(2) for t in range(12) if targets[b, t] != -100]
    naive = -sum(log_p[b, t, targets[b, t]] for b, t in kept) / len(kept)
    naive.backward()
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    torch.testing.assert_close(loss.double(), naive)
    for mine, p in zip(gradients, model.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad, rtol=1e-4, atol=1e-6)


def test_initial_values_are_gpt2s():
    model = GPT(ModelConfig.preset("tiny", vocab_size=5000, n_layer=8))
    assert model.lm_head.weight is model.wte.weight
    block = model.blocks[0]
    assert isinstance(block, DenseBlock)
    for p in (model.wte.weight, model.wpe.weight, block.attention.qkv.weight, block.ffn.up.weight):
        assert p.std().item() == pytest.approx(0.02, rel=0.02)
    for p in (block.attention.out.weight, block.ffn.down.weight):
        assert p.std().item() == pytest.approx(0.02 / 4, rel=0.02)
    by_width = DenseFFN(128, DenseFFNConfig(fan_in_init=True), n_layer=8)
    assert by_width.up.weight.std().item() == pytest.approx(128**-0.5, rel=0.02)
    assert by_width.down.weight.std().item() == pytest.approx(512**-0.5 / 4, rel=0.02)
    tokens = sample(5000, seq=100)
    assert model(tokens, sample(5000, seq=100)).item() == pytest.approx(math.log(5000), abs=0.1)


def test_only_matrices_have_two_dimensions():
    ffn = {**FEEDBACK, "spectral": {"path": "parallel"}}
    model = tiny(ffn, n_layer=1)
    matrices = {
        name.removeprefix("blocks.0.") for name, p in model.named_parameters() if p.dim() >= 2
    }
    assert matrices == {
        "wte.weight",
        "wpe.weight",
        "attention.qkv.weight",
        "attention.out.weight",
        "ffn.polynomial.weight",
        "ffn.feedback.a",
        "ffn.feedback.b",
        "ffn.projection.weight",
    }


def uncached(model, tokens, new):
    """`(1, seq)` and its `new` likeliest followers, each by a whole forward pass; where the context
    is full, its latter half stays."""
    every, window = tokens, tokens
    for _ in range(new):
        if window.shape[1] > model.config.max_seq_len:
            window = window[:, -(model.config.max_seq_len // 2) :]
        follower = model(window)[:, -1:].argmax(-1)
        every, window = (torch.cat((part, follower), 1) for part in (every, window))
    return every


@pytest.mark.parametrize("ffn", ["dense", "default", FEEDBACK, "paper"])
def test_greedy_generation_equals_the_uncached_up_to_the_context_and_beyond(ffn):
    model = tiny(ffn).double()
    for length in (1, 4, 16):
        tokens = sample(batch=1, seq=length)
        expected = uncached(model.eval(), tokens, 30)
        model.train()
        assert torch.equal(model.generate(tokens, 30), expected)
        assert torch.equal(model.generate(tokens, 30, Sampling(top_k=1)), expected)
    assert model.training


@settings(max_examples=15)
@given(st.lists(st.integers(1, 15), min_size=1, max_size=5), st.integers(0, 2**31))
@pytest.mark.parametrize("ffn", ["dense", "default"])
def test_unequal_prompts_give_what_each_gives_alone(ffn, lengths, seed):
    torch.manual_seed(seed)
    model = tiny(ffn).double().eval()
    prompts = [sample(batch=1, seq=n) for n in lengths]
    tokens = sample(batch=len(lengths), seq=max(lengths))  # what stands before a prompt is anything
    for row, prompt in zip(tokens, prompts, strict=True):
        row[-prompt.shape[1] :] = prompt
    for sampling in (Sampling(temperature=0), Sampling(temperature=0, repetition_penalty=1.5)):
        found = model.generate(tokens, 8, sampling, lengths=torch.tensor(lengths))
        for row, prompt in zip(found, prompts, strict=True):
            alone = model.generate(prompt, 8, sampling)
            if prompt.shape[1] + 8 <= 16 and max(lengths) + 8 <= 16:  # rows slide together
                assert torch.equal(row[-8:], alone[0, -8:])


def test_rows_of_unequal_length_slide_together():
    model = tiny("default").double().eval()
    tokens = sample(batch=2, seq=6)
    found = model.generate(tokens, 40, lengths=torch.tensor([6, 2]))
    assert torch.equal(found[:1], uncached(model, tokens[:1], 40))


def test_top_p_draws_among_the_fewest_that_reach_it():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().expand(4000, -1)
    seen = torch.zeros_like(logits, dtype=torch.bool)
    generator = torch.Generator().manual_seed(0)
    for top_p, kept in ((0.5, 1), (0.51, 2), (0.8, 2), (0.81, 3), (1.0, 4)):
        drawn = Sampling(top_p=top_p).choose(logits, seen, generator)
        assert drawn.unique().tolist() == list(range(kept))
    drawn = Sampling(top_p=0.8).choose(logits, seen, generator)
    assert (drawn == 0).float().mean().item() == pytest.approx(0.5 / 0.8, abs=0.04)


def test_a_penalty_keeps_from_repeating():
    seen = torch.tensor([[True, False, True]])
    for logits, penalty, expected in (
        ([2.0, 1.5, 0.0], 1.0, 0),
        ([2.0, 1.5, 0.0], 1.5, 1),
        ([-1.0, -1.8, -1.0], 2.0, 1),  # of a negative logit the penalty makes more, not less
    ):
        sampling = Sampling(temperature=0, repetition_penalty=penalty)
        assert sampling.choose(torch.tensor([logits]), seen, None).item() == expected


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": 0},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"repetition_penalty": 0.0},
    ],
)
def test_a_sampling_that_makes_no_sense_is_named(wrong):
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"^{name} is {value}; it must be "):
        Sampling(**wrong)


def test_sampling_follows_its_generator_and_top_k():
    model = tiny().eval()
    tokens = sample(batch=64, seq=2)

    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(tokens, 1, Sampling(top_k=3), generator=generator)

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    likeliest = model(tokens)[:, -1].topk(3).indices
    assert (draw(1)[:, -1:] == likeliest).any(-1).all()


def test_temperature_sharpens():
    model = tiny().eval()
    tokens = sample(batch=1, seq=2).expand(500, -1)
    likeliest = model(tokens[:1])[0, -1].argmax()
    hits = [
        (model.generate(tokens, 1, Sampling(temperature=t))[:, -1] == likeliest)
        .float()
        .mean()
        .item()
        for t in (100.0, 1e-3)
    ]
    assert hits[0] < 0.1
    assert hits[1] == 1


def test_too_long_a_sequence_is_named():
    model = tiny()
    with pytest.raises(ValueError, match=r"17 tokens exceed max_seq_len 16"):
        model(sample(seq=17))
    with pytest.raises(ValueError, match=r"a prompt of 17 tokens; it must have 1 to 16"):
        model.generate(sample(seq=17), 5)


def test_blocks_refuse_the_other_kind_of_ffn():
    with pytest.raises(ValueError, match="dense"):
        SparseBlock(ModelConfig.preset("tiny", ffn="dense"))
    with pytest.raises(ValueError, match="sparse"):
        DenseBlock(ModelConfig.preset("tiny", ffn="paper"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("ffn", ["dense", FEEDBACK])
def test_runs_in_every_dtype(ffn, dtype):
    model = tiny(ffn).to(dtype)
    tokens = sample()
    assert model(tokens).dtype == dtype
    loss = model(tokens, tokens)
    assert loss.dtype == torch.float32
    loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.dtype == dtype, name
        assert p.grad.isfinite().all(), name
    assert loss.isfinite()


@pytest.mark.parametrize("ffn", ["dense", FEEDBACK])
def test_learns(ffn):
    model = tiny(ffn)
    tokens = sample()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5  # from ln 97 = 4.6


@pytest.mark.slow
@pytest.mark.parametrize("ffn", ["dense", FEEDBACK])
def test_compiles_without_graph_breaks(ffn):
    torch._dynamo.reset()
    model = tiny(ffn, n_layer=1)
    tokens = sample()
    expected = model.eval()(tokens, tokens)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens, tokens), expected)
