import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sparse_gpt import DenseFFNConfig, SparseFFNConfig, UltraEfficientSparseFFN

transformers = pytest.importorskip("transformers")
from transformers import (  # noqa: E402
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPT2Model,
)

from sparse_gpt.surgery import fit_to_dense, replace_ffn  # noqa: E402

FEEDBACK = {"preset": "default", "feedback": {"rank": 2, "groups": 4}}
HEADS = (
    "GPT2Model",
    "GPT2LMHeadModel",
    "GPT2DoubleHeadsModel",
    "GPT2ForSequenceClassification",
    "GPT2ForTokenClassification",
    "GPT2ForQuestionAnswering",
)


def gpt2(kind=GPT2LMHeadModel, **overrides):
    sizes = {"vocab_size": 211, "n_positions": 32, "n_embd": 64, "n_layer": 3, "n_head": 4}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    return kind(GPT2Config(**{**sizes, **ends, **overrides})).eval()


def sample(batch=2, seq=16):
    return torch.randint(1, 211, (batch, seq))


@torch.no_grad()
def logits(model, tokens):
    return model(tokens).logits


def state_equals(model, state):
    own = model.state_dict()
    return own.keys() == state.keys() and all(
        own[key].dtype == state[key].dtype and torch.equal(own[key], state[key]) for key in own
    )


def test_package_needs_no_transformers():
    code = "import sys, sparse_gpt; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    layers=st.lists(st.integers(-3, 2), min_size=1, unique_by=lambda layer: layer % 3),
    seed=st.integers(0, 999),
)
def test_replaces_the_chosen_layers_alone(layers, seed):
    torch.manual_seed(seed)
    model, tokens = gpt2(), sample()
    before = logits(model, tokens)
    parts = [(block.ln_1, block.attn, block.ln_2, block.mlp) for block in model.transformer.h]
    assert replace_ffn(model, layers=layers) is model
    chosen = {layer % 3 for layer in layers}
    for i, (block, (ln_1, attn, ln_2, mlp)) in enumerate(
        zip(model.transformer.h, parts, strict=True)
    ):
        assert block.ln_1 is ln_1
        assert block.attn is attn
        if i in chosen:
            assert isinstance(block.mlp, UltraEfficientSparseFFN)
            assert block.mlp.norm_in is ln_2  # a pretrained norm is kept
        else:
            assert block.ln_2 is ln_2
            assert block.mlp is mlp
    assert model.lm_head.weight is model.transformer.wte.weight
    assert not torch.equal(logits(model, tokens), before)


def test_block_adds_the_ffns_branch_to_its_input():
    model = replace_ffn(gpt2(GPT2Model), layers=[1])
    seen = {}
    block = model.h[1]
    block.ln_2.register_forward_pre_hook(lambda _, args: seen.update(x=args[0]))
    block.register_forward_hook(lambda _, args, output: seen.update(y=output))
    with torch.no_grad():
        model(sample())
        assert torch.equal(seen["y"], seen["x"] + block.mlp(seen["x"]))


@settings(
    max_examples=15,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(last=st.integers(0, 14), seed=st.integers(0, 999))
def test_logits_do_not_see_the_future(wake, last, seed):
    torch.manual_seed(seed)
    model, tokens, other = wake(replace_ffn(gpt2(), FEEDBACK)), sample(), sample()
    other[0, : last + 1] = tokens[0, : last + 1]
    before, after = logits(model, tokens)[0], logits(model, other)[0]
    assert torch.equal(before[: last + 1], after[: last + 1])


@pytest.mark.parametrize("layers", [None, [1]])
def test_generates_the_same_with_and_without_cache(wake, layers):
    model, tokens = wake(replace_ffn(gpt2(), layers=layers)), sample(seq=5)
    options = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False}
    attention_mask = torch.ones_like(tokens)
    cached, plain = (
        model.generate(tokens, attention_mask=attention_mask, use_cache=cache, **options)
        for cache in (True, False)
    )
    assert cached.shape == (2, 25)
    assert torch.equal(cached, plain)


def test_gradients_reach_every_parameter(model_config, wake):
    if model_config.ffn.kind == "dense":
        pytest.skip("no sparse FFN")
    model = wake(replace_ffn(gpt2(n_embd=32), model_config.ffn)).train()
    tokens = sample(8)
    model(tokens, labels=tokens).loss.backward()
    for name, p in model.named_parameters():
        assert p.grad.isfinite().all(), name
        assert p.grad.any(), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_keeps_dtype_mode_and_frozen_norms(dtype, training):
    model = gpt2().to(dtype).train(training)
    model.transformer.h[1].eval()
    model.requires_grad_(False)
    replace_ffn(model)
    assert {p.dtype for p in model.parameters()} == {dtype}
    modes = [{part.training for part in block.mlp.modules()} for block in model.transformer.h]
    assert modes == [{training}, {False}, {training}]
    ffn = model.transformer.h[0].mlp
    frozen = {name for name, p in ffn.named_parameters() if not p.requires_grad}
    assert frozen == {"norm_in.weight", "norm_in.bias"}


@pytest.mark.parametrize(
    ("config", "dropout"),
    [
        ("default", 0.3),
        ({"preset": "default"}, 0.3),
        ({"preset": "default", "dropout": 0.0}, 0.0),
        (SparseFFNConfig(), 0.3),
        (SparseFFNConfig(dropout=0.0), 0.0),
    ],
)
def test_dropout_is_the_models_unless_given(config, dropout):
    model = replace_ffn(gpt2(resid_pdrop=0.3), config)
    assert {block.mlp.config.dropout for block in model.transformer.h} == {dropout}
    assert {block.mlp.dropout.p for block in model.transformer.h} == {dropout}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layers": [3]}, "layer 3: .* 3 layers"),
        ({"layers": [0, -4]}, "layer -4: .* 3 layers"),
        ({"layers": ["a"]}, "layer 'a'"),
        ({"layers": [1, -2]}, "layer -2 is twice"),
        ({"layers": []}, r"layers \[\]"),
        ({"config": "dense"}, "dense"),
        ({"config": DenseFFNConfig()}, "dense"),
        ({"config": "spares"}, "spares"),
        ({"config": {"preset": "default", "polynomial": {"group_size": 7}}}, "group_size 7"),
        ({"config": {"preset": "default", "spektral": None}}, "spektral"),
        ({"model": torch.nn.Linear(2, 2)}, "Linear is no GPT-2"),
        ({"model": gpt2(n_layer=0)}, "of 0"),
    ],
)
def test_errors_name_the_value_and_leave_the_model(arguments, message):
    model = gpt2()
    with pytest.raises(ValueError, match=message):
        replace_ffn(**{"model": model, **arguments})
    assert type(model) is GPT2LMHeadModel
    assert not hasattr(model.config, "sparse_ffn")


def test_a_layer_is_replaced_once():
    model = replace_ffn(gpt2(), layers=[1])
    with pytest.raises(ValueError, match="layer 1 has"):
        replace_ffn(model, layers=[0, 1])


def test_other_models_of_the_same_config_stay_dense():
    model = gpt2()
    twin = GPT2LMHeadModel(model.config)
    replace_ffn(model)
    assert type(twin.config) is GPT2Config
    assert type(twin) is GPT2LMHeadModel
    assert "sparse_ffn" not in twin.config.to_dict()
    assert model.transformer.config is model.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [None, [0, 2], [1]])
def test_saved_and_loaded_is_bit_equal(tmp_path, wake, layers, dtype):
    model, tokens = replace_ffn(gpt2().to(dtype), layers=layers), sample()
    if layers == [1]:
        replace_ffn(model, FEEDBACK, [2])
    wake(model).save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "generation_config.json", "model.safetensors"}
    record = json.loads((tmp_path / "config.json").read_text())["sparse_ffn"]
    assert [done["layers"] for done in record] == [layers or [0, 1, 2], [2]][: len(record)]

    before = logits(model, tokens)
    for reader in (AutoModelForCausalLM, type(model)):
        loaded = reader.from_pretrained(tmp_path)
        assert type(loaded) is type(model)
        assert loaded.dtype == dtype
        assert state_equals(loaded, model.state_dict())
        assert torch.equal(logits(loaded, tokens), before)
        assert loaded.lm_head.weight is loaded.transformer.wte.weight
    body = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        hidden = [m(tokens).last_hidden_state for m in (body, model.transformer)]
    assert torch.equal(*hidden)

    again = tmp_path / "again"
    replace_ffn(loaded, layers=[0]) if layers == [1] else None
    loaded.save_pretrained(again)
    assert state_equals(AutoModelForCausalLM.from_pretrained(again), loaded.state_dict())


def test_every_option_is_saved_and_loaded(tmp_path, model_config, wake):
    if model_config.ffn.kind == "dense":
        pytest.skip("no sparse FFN")
    model, tokens = wake(replace_ffn(gpt2(n_embd=32), model_config.ffn)), sample()
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.transformer.h[0].mlp.config == model_config.ffn
    assert torch.equal(logits(loaded, tokens), logits(model, tokens))


@pytest.mark.parametrize("name", HEADS)
def test_every_head_is_saved_and_loaded(tmp_path, name):
    model = replace_ffn(gpt2(getattr(transformers, name)), layers=[1])
    assert type(model).__name__ == f"Sparse{name}"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert state_equals(loaded, model.state_dict())
    assert isinstance(loaded, getattr(transformers, name))


def test_dense_reader_refuses_a_sparse_folder(tmp_path):
    replace_ffn(gpt2(), layers=[1]).save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="mismatched"):
        GPT2LMHeadModel.from_pretrained(tmp_path)


def test_damaged_record_is_refused(tmp_path):
    replace_ffn(gpt2()).save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    record = json.loads(path.read_text())
    record["sparse_ffn"][0]["ffn"]["spektral"] = 1
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="spektral"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_config_alone_makes_a_sparse_model():
    config = replace_ffn(gpt2(), FEEDBACK, [0, 2]).config
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config.to_dict()))
    kinds = [isinstance(block.mlp, UltraEfficientSparseFFN) for block in model.transformer.h]
    assert kinds == [True, False, True]
    assert logits(model.eval(), sample()).isfinite().all()


def test_transformers_does_not_initialise_it_again(tmp_path):
    model = replace_ffn(gpt2())
    state = copy.deepcopy(model.state_dict())
    model.init_weights()
    assert state_equals(model, state)

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    loaded.init_weights()
    assert state_equals(loaded, state)


def test_what_a_file_lacks_starts_as_in_a_new_ffn(tmp_path):
    model = replace_ffn(gpt2(), FEEDBACK)
    state = model.state_dict()
    lost = [key for key in state if ".h.1.mlp." in key]
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if k not in lost})
    torch.manual_seed(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).transformer
    torch.manual_seed(1)
    fresh = [UltraEfficientSparseFFN(64, config=loaded.h[0].mlp.config) for _ in range(3)]
    assert state_equals(loaded.h[1].mlp, fresh[1].state_dict())
    assert state_equals(loaded.h[2].mlp, model.transformer.h[2].mlp.state_dict())


def teacher(**overrides):
    # Weights this large make MLPs that a linear map does not imitate.
    return gpt2(initializer_range=0.15, **overrides)


def distance(model, dense, tokens):
    return (logits(model, tokens) - logits(dense, tokens)).square().mean().item()


@pytest.mark.parametrize("layers", [None, [1]])
def test_fit_brings_layers_and_logits_nearer(layers):
    dense, tokens = teacher(), sample(16)
    model = replace_ffn(copy.deepcopy(dense), layers=layers)
    unfitted = distance(model, dense, tokens)
    errors = fit_to_dense(model, dense, (sample(16) for _ in range(42)), steps=40)
    assert list(errors) == (layers or [0, 1, 2])
    for before, after in errors.values():
        assert after < 0.6
        assert after < 0.5 * before
    assert distance(model, dense, tokens) < 0.7 * unfitted


def test_closed_form_alone_beats_a_constant():
    dense = teacher()
    model = replace_ffn(copy.deepcopy(dense))
    errors = fit_to_dense(model, dense, [sample(64), sample(64)], steps=0)
    assert all(after < 0.9 for _, after in errors.values())


def test_every_option_can_be_fitted(model_config):
    if model_config.ffn.kind == "dense":
        pytest.skip("no sparse FFN")
    dense = teacher(n_embd=32)
    model = replace_ffn(copy.deepcopy(dense), model_config.ffn)
    errors = fit_to_dense(model, dense, [sample(16) for _ in range(4)], steps=10)
    assert all(after < min(1, before) for before, after in errors.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fit_changes_sparse_ffns_and_nothing_else(dtype):
    dense = teacher(resid_pdrop=0.5).to(dtype).train()
    model = replace_ffn(copy.deepcopy(dense), layers=[0, 2]).train()
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


def test_fit_is_deterministic():
    dense = teacher(resid_pdrop=0.5).train()  # dropout would draw from the generator
    model = replace_ffn(copy.deepcopy(dense))
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
        ("data/samples", root / "data/samples"),
        ("steps=100", "steps=1"),
    ):
        assert public in code
        code = code.replace(public, str(own))
    names = {}
    exec(code, names)
    assert type(names["model"]).__name__ == "SparseGPT2LMHeadModel"
