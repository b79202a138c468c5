"""Sparse FFNs in place of the dense ones of a transformers GPT-2."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from transformers import GPT2Config

from sparse_gpt.huggingface.modelling import (
    GPT2,
    SPARSE_CLASSES,
    SparseGPT2,
    SparseGPT2Config,
    blocks_of,
    insert,
    is_sparse,
)
from sparse_gpt.model.config import DenseFFNConfig, ModelConfig, SparseFFNConfig


def replace_ffn(
    model: GPT2,
    config: str | Mapping[str, Any] | SparseFFNConfig = "default",
    layers: Iterable[int] | None = None,
) -> GPT2:
    """Put a sparse FFN into blocks of a transformers GPT-2, in place; returns the model.

    `model` is a GPT2Model or one of transformers' GPT-2s with a head; `layers` its block indices
    (negative ones count from the end), all by default; `config` a preset's name, a mapping as
    `ModelConfig`'s `ffn`, or a SparseFFNConfig. Unless that names a dropout, it is the model's
    `resid_pdrop`. The block's `ln_2` moves into the FFN as its first norm; the rest of the FFN
    starts random, so a pretrained model wants `fit_to_dense` next. Device, dtype and train mode
    stay. Other blocks are not touched.

    The model's class becomes its `SparseGPT2...` subclass and its config a copy that records the
    FFNs, so that `save_pretrained` writes a folder from which that class and, once this module is
    imported, transformers' Auto classes read the same model.

    Raises ValueError, naming the value, for another kind of model, a layer that is not there,
    twice there or sparse already, no layers, a dense config or one that does not fit the width.
    """
    if type(model) not in SPARSE_CLASSES and not isinstance(model, SparseGPT2):
        possible = ", ".join(kind.__name__ for kind in SPARSE_CLASSES)
        raise ValueError(f"{type(model).__name__} is no GPT-2 of transformers: {possible}")
    blocks = blocks_of(model)
    chosen = _indices(layers, len(blocks))
    for layer in chosen:
        if is_sparse(blocks[layer]):
            raise ValueError(f"layer {layer} has a sparse FFN already")
    ffn = _ffn_config(config, model.config)
    insert(model, chosen, ffn)

    # A copy: other models may have been made of the same config.
    before: Any = model.config
    after = copy.deepcopy(before)
    after.__class__ = SparseGPT2Config
    done = {"layers": chosen, "ffn": ffn.model_dump(mode="json")}
    after.sparse_ffn = [*(getattr(before, "sparse_ffn", None) or []), done]
    for part in model.modules():
        if getattr(part, "config", None) is before:
            part.config = after
    model.__class__ = SPARSE_CLASSES.get(type(model), type(model))  # type: ignore[assignment]
    return model


def _indices(layers: Iterable[int] | None, count: int) -> list[int]:
    """`layers` as rising indices below `count`."""
    chosen: list[int] = []
    for layer in range(count) if layers is None else layers:
        try:
            index = range(count)[layer]
        except (IndexError, TypeError):
            raise ValueError(f"layer {layer!r}: the model has {count} layers") from None
        if index in chosen:
            raise ValueError(f"layer {layer} is twice in layers")
        chosen.append(index)
    if not chosen:
        raise ValueError(f"layers {layers}: none to replace, of {count}")
    return sorted(chosen)


def _ffn_config(
    config: str | Mapping[str, Any] | SparseFFNConfig, gpt2: GPT2Config
) -> SparseFFNConfig:
    if isinstance(config, str):
        config = {"preset": config}
    if isinstance(config, Mapping):
        config = {"dropout": gpt2.resid_pdrop, **config}
    elif isinstance(config, SparseFFNConfig) and "dropout" not in config.model_fields_set:
        config = config.model_copy(update={"dropout": gpt2.resid_pdrop})
    sizes = {"d_model": gpt2.n_embd, "n_layer": gpt2.n_layer, "n_head": gpt2.n_head}
    whole = {"max_seq_len": gpt2.n_positions, **sizes, "ffn": config}
    try:
        ffn = ModelConfig.model_validate(whole).ffn
    except ValidationError as error:
        found = (f"{'.'.join(map(str, e['loc'])) or 'config'}: {e['msg']}" for e in error.errors())
        raise ValueError("; ".join(found)) from None
    if isinstance(ffn, DenseFFNConfig):
        raise ValueError(f"config {config!r} is no sparse FFN")
    return ffn
