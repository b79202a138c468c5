"""Learning rates that mean the same at every width: muP for this model under Adam.

A step of Adam moves every weight by about the learning rate, so what a matrix adds to its output
grows with the number of its inputs. Yang et al. 2022 ("Tensor Programs V", table 8, Adam's column)
keep the change of every activation equal over widths:

| weights                       | initial std | output times | learning rate |
|-------------------------------|-------------|--------------|---------------|
| inputs, and one a channel     | constant    | 1            | 1             |
| hidden: inputs grow with d    | ∝ 1/√inputs | 1            | ∝ 1/inputs    |
| head, here the input's matrix | constant    | ∝ 1/d_model  | 1             |

Models that are compared must have heads of one width (d_model / n_head constant): the scores'
1/√head_dim is right for that alone. Depth, batch and duration are not transferred.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from sparse_gpt.model.attention import CausalSelfAttention
from sparse_gpt.model.config import DenseFFNConfig, ModelConfig, SparseFFNConfig
from sparse_gpt.model.ffn import TokenFeedback
from sparse_gpt.model.gpt import GPT

BASE_WIDTH = 128
"""The d_model at which transfer changes nothing: a learning rate is that of this width."""


def check_transfers(config: ModelConfig) -> None:
    """Raise ValueError when the initial weights do not follow the width."""
    if isinstance(config.ffn, DenseFFNConfig) and not config.ffn.fan_in_init:
        raise ValueError(
            "the dense FFN starts at one std whatever its width; set model.ffn.fan_in_init: true"
        )


@torch.no_grad()
def transfer_width(model: GPT) -> None:
    """Scale a new model's initial weights, in place, to what `lr_multipliers` belong to.

    The attention's weights, the only hidden ones of a fixed std, by √(BASE_WIDTH / d_model). The
    last norm by BASE_WIDTH / d_model: the factor of the head's output, in a place where it is an
    ordinary weight, so that code and checkpoints stay GPT-2's. Learning at that multiple too, the
    norm trains as if the factor stood behind it, as Adam does not see a gradient's scale.
    Raises ValueError as `check_transfers`.
    """
    check_transfers(model.config)
    ratio = BASE_WIDTH / model.config.d_model
    for module in model.modules():
        if isinstance(module, CausalSelfAttention):
            module.qkv.weight.mul_(math.sqrt(ratio))
            module.out.weight.mul_(math.sqrt(ratio))
    for p in model.ln_f.parameters():
        p.mul_(ratio)


def lr_multipliers(model: GPT) -> dict[str, float]:
    """What each parameter's learning rate is multiplied by, under its name.

    BASE_WIDTH / d_model where the number of inputs grows with d_model, and for the last norm (see
    `transfer_width`); 1 elsewhere, so for blocks of a fixed width, embeddings, norms and biases.
    """
    with torch.device("meta"):
        wider = _fan_ins(GPT(_twice_as_wide(model.config)))
    ratio = BASE_WIDTH / model.config.d_model
    found = {name: ratio if wider[name] > n else 1.0 for name, n in _fan_ins(model).items()}
    return found | {name: ratio for name, _ in model.ln_f.named_parameters(prefix="ln_f")}


def _twice_as_wide(config: ModelConfig) -> ModelConfig:
    """Whatever divides d_model divides its double; what suits d_model alone is left out."""
    ffn = config.ffn
    if isinstance(ffn, SparseFFNConfig):
        spectral = ffn.spectral and ffn.spectral.model_copy(update={"factors": None})
        ffn = ffn.model_copy(update={"spectral": spectral})
    sizes = {"d_model": 2 * config.d_model, "n_head": 2 * config.n_head}
    return config.model_copy(update={**sizes, "ffn": ffn})


def _fan_ins(model: GPT) -> dict[str, int]:
    """How many products with a parameter are added up to one value; 1 where none are."""
    fan_ins = {}
    for name, p in model.named_parameters():  # the tied matrix once, as the embedding
        owner = model.get_submodule(name.rpartition(".")[0])
        if isinstance(owner, TokenFeedback) and p is owner.score:
            fan_ins[name] = p.shape[0]
        elif p.dim() == 1 or isinstance(owner, nn.Embedding):  # a lookup picks a row
            fan_ins[name] = 1
        elif isinstance(owner, nn.Linear):
            fan_ins[name] = p.shape[1]
        else:  # blocks (..., inputs, outputs)
            assert p.dim() > 2, f"{name}: which axis is its input's?"
            fan_ins[name] = p.shape[-2]
    return fan_ins
