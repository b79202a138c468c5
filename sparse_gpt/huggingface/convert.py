"""A GPT of ours as a GPT-2 of transformers, and back: the same numbers under the other names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from sparse_gpt.huggingface.modelling import SparseGPT2Config, SparseGPT2LMHeadModel
from sparse_gpt.model.config import DenseFFNConfig, ModelConfig, SparseFFNConfig
from sparse_gpt.model.gpt import GPT

_NORM_AND_ATTENTION = {
    "ln_1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.out": "attn.c_proj",
}
_CONV1D = (".c_attn.weight", ".c_proj.weight", ".c_fc.weight")
_DENSE = {"ln_2": "ln_2", "ffn.up": "mlp.c_fc", "ffn.down": "mlp.c_proj"}


def to_transformers(model: GPT, end_of_text: int) -> GPT2LMHeadModel:
    """`model` as transformers has it: a plain GPT2LMHeadModel, or with sparse FFNs a
    SparseGPT2LMHeadModel; in the same dtype and evaluation mode, on the CPU.

    end_of_text: the id that opens documents, which is where transformers begins and ends.
    """
    ours, ffn = model.config, model.config.ffn
    shared: dict[str, Any] = {
        "vocab_size": ours.vocab_size,
        "n_positions": ours.max_seq_len,
        "n_embd": ours.d_model,
        "n_layer": ours.n_layer,
        "n_head": ours.n_head,
        "resid_pdrop": ours.dropout,
        "embd_pdrop": ours.dropout,
        "attn_pdrop": 0.0,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
    }
    made: GPT2LMHeadModel
    if isinstance(ffn, SparseFFNConfig):
        every = {"layers": list(range(ours.n_layer)), "ffn": ffn.model_dump(mode="json")}
        made = SparseGPT2LMHeadModel(SparseGPT2Config(**shared, sparse_ffn=[every]))
    else:
        made = GPT2LMHeadModel(GPT2Config(**shared))
    made.to(dtype=model.wte.weight.dtype).eval()  # type: ignore[call-arg]
    source, target = model.state_dict(), made.state_dict()
    with torch.no_grad():
        for name, theirs in _names(ours, source):
            value = _turned(source[name], theirs)
            target[theirs].copy_(value[: ours.vocab_size] if name == "wte.weight" else value)
    return made


def from_transformers(model: GPT2LMHeadModel) -> GPT:
    """The inverse: a GPT of the same dtype. Padding rows of its vocabulary are 0.

    Raises ValueError, saying why, for a model that ours is not: another activation, say, or a
    sparse FFN in some layers only.
    """
    made = GPT(model_config(model.config)).to(model.dtype).eval()
    source, target = model.state_dict(), made.state_dict()
    with torch.no_grad():
        made.wte.weight.zero_()
        for name, theirs in _names(made.config, target):
            value = _turned(source[theirs], theirs)
            ours = target[name]
            (ours[: len(value)] if name == "wte.weight" else ours).copy_(value)
    return made


def model_config(config: GPT2Config) -> ModelConfig:
    """What `from_transformers` makes a model of. Raises ValueError as it does."""
    for key, wanted in (
        ("activation_function", ("gelu_new", "gelu_pytorch_tanh")),
        ("scale_attn_weights", (True,)),
        ("scale_attn_by_inverse_layer_idx", (False,)),
        ("layer_norm_epsilon", (1e-5,)),
        ("n_inner", (None, 4 * config.n_embd)),
        ("tie_word_embeddings", (True,)),
        ("add_cross_attention", (False,)),
    ):
        if (found := getattr(config, key)) not in wanted:
            raise ValueError(f"{key} is {found!r}; a GPT of ours has {wanted[-1]!r}")
    ffn: DenseFFNConfig | SparseFFNConfig = DenseFFNConfig()
    if replaced := getattr(config, "sparse_ffn", None):
        [first, *others] = replaced
        if others or first["layers"] != list(range(config.n_layer)):
            raise ValueError("sparse_ffn is not the same in every layer")
        ffn = SparseFFNConfig(**first["ffn"])
    return ModelConfig(
        vocab_size=config.vocab_size,
        max_seq_len=config.n_positions,
        d_model=config.n_embd,
        n_layer=config.n_layer,
        n_head=config.n_head,
        ffn=ffn,
    )


def read_config(folder: str) -> ModelConfig:
    """The shape of the GPT-2 in a folder. Raises OSError or ValueError where there is none that
    `from_transformers` takes."""
    found = AutoConfig.from_pretrained(folder)
    if not isinstance(found, GPT2Config):
        raise ValueError(f"it is a {found.model_type}, not a GPT-2")
    return model_config(found)


def read_model(folder: str) -> GPT:
    """The GPT-2 in a folder, of safetensors files, in fp32.

    Raises OSError or ValueError where there is none that `from_transformers` takes.
    """
    try:
        found: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, use_safetensors=True
        )
    except SafetensorError as error:
        raise ValueError(f"its weights are damaged: {error}") from None
    return from_transformers(found)


def _names(config: ModelConfig, ours: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Our name of every tensor, and theirs."""
    yield "wte.weight", "transformer.wte.weight"
    yield "wpe.weight", "transformer.wpe.weight"
    dense = isinstance(config.ffn, DenseFFNConfig)
    for i in range(config.n_layer):
        for part, theirs in {**_NORM_AND_ATTENTION, **(_DENSE if dense else {})}.items():
            for leaf in ("weight", "bias"):
                yield f"blocks.{i}.{part}.{leaf}", f"transformer.h.{i}.{theirs}.{leaf}"
        if not dense:
            prefix = f"blocks.{i}.ffn."
            for name in ours:
                if name.startswith(prefix):
                    yield name, f"transformer.h.{i}.mlp.{name.removeprefix(prefix)}"
    for leaf in ("weight", "bias"):
        yield f"ln_f.{leaf}", f"transformer.ln_f.{leaf}"


def _turned(value: Tensor, theirs: str) -> Tensor:
    """Its Conv1D keeps weights as `(inputs, outputs)`, Linear as `(outputs, inputs)`."""
    return value.t() if theirs.endswith(_CONV1D) else value
