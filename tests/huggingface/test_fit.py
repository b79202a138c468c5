"""`fit_to_dense`: sparse FFNs learn what the dense ones did, and nothing else changes."""

import copy
import math
import re
from pathlib import Path

import pytest
import torch
from small_gpt2 import gpt2, logits, sample, state_equals

from sparse_gpt.huggingface.fit import balance, fit_to_dense
from sparse_gpt.huggingface.replace import replace_ffn


def teacher(**overrides):
    # Weights this large make MLPs that a linear map does not imitate.
    return gpt2(initializer_range=0.15, **overrides)


def distance(model, dense, tokens):
    return (logits(model, tokens) - logits(dense, tokens)).square().mean().item()


def dictionaries(model):
    return [block.mlp.spectral for block in model.transformer.h]


both = pytest.mark.parametrize("preset", ["light", "default"])


@both
@pytest.mark.parametrize("layers", [None, [1]])
def test_fit_brings_layers_and_logits_nearer(layers, preset):
    dense, tokens = teacher(), sample(16)
    model = replace_ffn(copy.deepcopy(dense), preset, layers)
    unfitted = distance(model, dense, tokens)
    errors = fit_to_dense(model, dense, (sample(16) for _ in range(42)), steps=40)
    assert list(errors) == (layers or [0, 1, 2])
    for before, after in errors.values():
        assert after < 0.6
        assert after < 0.5 * before
    assert distance(model, dense, tokens) < 0.7 * unfitted


@both
def test_closed_form_alone_beats_a_constant(preset):
    dense = teacher()
    model = replace_ffn(copy.deepcopy(dense), preset)
    errors = fit_to_dense(model, dense, [sample(64), sample(64)], steps=0)
    assert all(after < 0.9 for _, after in errors.values())


def test_closed_form_of_a_dictionary_beats_a_linear_map():
    dense = teacher()
    batches = [sample(128) for _ in range(9)]
    model = replace_ffn(copy.deepcopy(dense), {"preset": "default", "spectral": {"blocks": 8}})
    errors = fit_to_dense(model, dense, batches, steps=0)
    seen = {i: [] for i in errors}
    for i, block in enumerate(dense.transformer.h):
        block.mlp.register_forward_hook(
            lambda _, a, y, i=i: seen[i].append((a[0].flatten(0, 1), y.flatten(0, 1)))
        )
    for tokens in batches:
        logits(dense, tokens)
    for i, pairs in seen.items():
        h, y = (torch.cat(rows) for rows in zip(*pairs, strict=True))
        count = batches[0].numel()
        linear = torch.linalg.lstsq(h[count:], y[count:]).solution
        held_out, target = h[:count], y[:count]
        error = (held_out @ linear - target).square().sum() / (
            target - target.mean(0)
        ).square().sum()
        assert errors[i].after < 0.8 * error


def test_distillation_leaves_the_balance_and_the_blocks_in_use():
    dense = teacher()
    model = replace_ffn(copy.deepcopy(dense), {"preset": "default", "spectral": {"blocks": 8}})
    batches = [sample(32) for _ in range(4)]
    fit_to_dense(model, dense, batches, steps=20)
    assert not any(d.moves.any() or d.loads.any() for d in dictionaries(model))
    model.train()(batches[0])
    for dictionary in dictionaries(model):
        loads = dictionary.loads.double()
        assert loads.min() > 0.2 * loads.mean()
        assert loads.max() < 3 * loads.mean()


def test_balance_follows_an_optimizers_steps():
    model, tokens = replace_ffn(gpt2()).train(), sample(8)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    optimizer.register_step_post_hook(lambda *_: balance(model))
    model(tokens, labels=tokens).loss.backward()
    model(tokens, labels=tokens).loss.backward()
    loads = [dictionary.loads.clone() for dictionary in dictionaries(model)]
    optimizer.step()
    for dictionary, load in zip(dictionaries(model), loads, strict=True):
        assert load.sum() == 2 * 2 * tokens.numel()
        assert torch.equal(dictionary.moves, (load.sum() - 64 * load).sign())
        assert not dictionary.loads.any()


@pytest.mark.parametrize(
    ("dtype", "width"),
    [(torch.float32, 50), (torch.bfloat16, 50), (torch.bfloat16, 64), (torch.float64, 64)],
)
def test_widths_and_types_that_products_at_once_refuse(dtype, width):
    dense = teacher(n_embd=width, n_head=2).to(dtype)
    model = replace_ffn(copy.deepcopy(dense))
    # Far fewer tokens than a block has atoms, and blocks that none of them is given.
    errors = fit_to_dense(model, dense, [sample(1), sample(1), sample(2)], steps=3, calibration=1)
    assert all(math.isfinite(after) and after < before for before, after in errors.values())
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert logits(model, sample()).isfinite().all()


def test_every_option_can_be_fitted(model_config):
    if model_config.ffn.kind == "dense":
        pytest.skip("no sparse FFN")
    dense = teacher(n_embd=32)
    model = replace_ffn(copy.deepcopy(dense), model_config.ffn)
    errors = fit_to_dense(model, dense, [sample(16) for _ in range(4)], steps=10)
    assert all(after < min(1, before) for before, after in errors.values())


@both
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_changes_sparse_ffns_and_nothing_else(dtype, preset):
    dense = teacher(resid_pdrop=0.5).to(dtype).train()
    model = replace_ffn(copy.deepcopy(dense), preset, [0, 2]).train()
    model.transformer.h[2].mlp.eval()
    modes = [part.training for part in (*model.modules(), *dense.modules())]
    start, original = (copy.deepcopy(m.state_dict()) for m in (model, dense))
    with torch.no_grad():  # a caller's own mode does not matter
        errors = fit_to_dense(model, dense, [sample(16) for _ in range(3)], steps=20)
    assert all(after < 0.8 * before for before, after in errors.values())

    assert [part.training for part in (*model.modules(), *dense.modules())] == modes
    assert state_equals(dense, original)
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, start[k])}
    assert changed
    assert all(".h.0.mlp." in key or ".h.2.mlp." in key for key in changed)
    assert {p.dtype for p in model.parameters()} == {dtype}
    assert all(p.grad is None for m in (model, dense) for p in m.parameters())
    assert not any(p._forward_pre_hooks for m in (model, dense) for p in m.modules())


@both
def test_fit_is_deterministic(preset):
    dense = teacher(resid_pdrop=0.5).train()  # dropout would draw from the generator
    model = replace_ffn(copy.deepcopy(dense), preset)
    twin = copy.deepcopy(model)
    batches = [sample(8) for _ in range(4)]
    first = fit_to_dense(model.eval(), dense, batches, steps=5)
    # Gradients of other work do not matter. (In training it would move TokenFeedback's threshold.)
    twin.eval()(batches[0], labels=batches[0]).loss.backward()
    assert fit_to_dense(twin, dense, batches, steps=5) == first
    assert state_equals(twin, model.state_dict())


@pytest.mark.parametrize(
    ("dense", "batches", "message"),
    [
        (gpt2(n_embd=32), 2, "32"),
        (gpt2(n_layer=1), 2, "layer 1 of the dense"),
        (replace_ffn(gpt2(), layers=[2]), 2, "layer 2 of the dense"),
        (gpt2(), 0, "0 batches"),
        (gpt2(), 1, "1 batches"),
    ],
)
def test_fit_names_what_it_cannot_use(dense, batches, message):
    with pytest.raises(ValueError, match=message):
        fit_to_dense(replace_ffn(gpt2()), dense, [sample()] * batches)


def test_fit_needs_a_sparse_ffn():
    with pytest.raises(ValueError, match="replace_ffn"):
        fit_to_dense(gpt2(), gpt2(), [sample()] * 2)


def test_documented_example_runs(tmp_path):
    gpt2(vocab_size=50257, n_positions=256).save_pretrained(tmp_path / "dense")
    root = Path(__file__).parents[2]
    (code,) = re.findall(r"```python\n(.*?)```", (root / "docs/drop-in.md").read_text(), re.S)
    for public, own in (
        ("openai-community/gpt2", tmp_path / "dense"),
        ("gpt2-sparse", tmp_path / "sparse"),
        ("data/novels", root / "data/novels"),
        ("steps=100", "steps=1"),
    ):
        assert public in code
        code = code.replace(public, str(own))
    names = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "SparseGPT2LMHeadModel"
