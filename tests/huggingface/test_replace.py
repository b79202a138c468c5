"""Sparse FFNs in a GPT-2 of transformers: what `replace_ffn` does, and that it saves and loads."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_gpt2 import gpt2, logits, sample, state_equals
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
)

from sparse_gpt import DenseFFNConfig, SparseFFNConfig, UltraEfficientSparseFFN
from sparse_gpt.huggingface.replace import replace_ffn

FEEDBACK = {"feedback": {"rank": 2, "groups": 4}}
LIGHT, DEFAULT = ({"preset": preset, **FEEDBACK} for preset in ("light", "default"))
HEADS = (
    GPT2Model,
    GPT2LMHeadModel,
    GPT2DoubleHeadsModel,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2ForQuestionAnswering,
)


def test_package_needs_no_transformers():
    code = "import sys, sparse_gpt; sys.exit('transformers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
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
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(config=st.sampled_from((LIGHT, DEFAULT)), last=st.integers(0, 14), seed=st.integers(0, 999))
def test_logits_do_not_see_the_future(wake, config, last, seed):
    torch.manual_seed(seed)
    model, tokens, other = wake(replace_ffn(gpt2(), config)), sample(), sample()
    other[0, : last + 1] = tokens[0, : last + 1]
    before, after = logits(model, tokens)[0], logits(model, other)[0]
    assert torch.equal(before[: last + 1], after[: last + 1])


@pytest.mark.parametrize("preset", ["light", "default"])
@pytest.mark.parametrize("layers", [None, [1]])
def test_generates_the_same_with_and_without_cache(wake, layers, preset):
    model, tokens = wake(replace_ffn(gpt2(), preset, layers)), sample(seq=5)
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
@pytest.mark.parametrize("preset", ["light", "default"])
def test_keeps_dtype_mode_and_frozen_norms(dtype, training, preset):
    model = gpt2().to(dtype).train(training)
    model.transformer.h[1].eval()
    model.requires_grad_(False)
    replace_ffn(model, preset)
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
        ({"config": {"preset": "light", "polynomial": {"group_size": 7}}}, "group_size 7"),
        ({"config": {"preset": "default", "polynomial": {}}}, "^[^\n]*with a dictionary[^\n]*$"),
        ({"model": gpt2(n_embd=51, n_head=3)}, r"^[^\n]*top_k 2 does not divide d_model 51[^\n]*$"),
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
        replace_ffn(model, LIGHT, [2])
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


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_saved_and_loaded(tmp_path, head):
    model = replace_ffn(gpt2(head), layers=[1])
    assert type(model).__name__ == f"Sparse{head.__name__}"
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert state_equals(loaded, model.state_dict())
    assert isinstance(loaded, head)


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
    config = replace_ffn(gpt2(), LIGHT, [0, 2]).config
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


@pytest.mark.parametrize("config", [LIGHT, DEFAULT])
def test_what_a_file_lacks_starts_as_in_a_new_ffn(tmp_path, config):
    model = replace_ffn(gpt2(), config)
    state = model.state_dict()
    lost = [key for key in state if ".h.1.mlp." in key]
    model.save_pretrained(tmp_path, state_dict={k: v for k, v in state.items() if k not in lost})
    torch.manual_seed(1)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).transformer
    torch.manual_seed(1)
    fresh = [UltraEfficientSparseFFN(64, config=loaded.h[0].mlp.config) for _ in range(3)]
    assert state_equals(loaded.h[1].mlp, fresh[1].state_dict())
    assert state_equals(loaded.h[2].mlp, model.transformer.h[2].mlp.state_dict())
