"""GPT-2s of transformers with sparse FFNs: their classes, which its Auto classes are told of here,
and what puts an FFN into a block."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    GPT2Config,
    GPT2DoubleHeadsModel,
    GPT2ForQuestionAnswering,
    GPT2ForSequenceClassification,
    GPT2ForTokenClassification,
    GPT2LMHeadModel,
    GPT2Model,
    GPT2PreTrainedModel,
    initialization,
)

from sparse_gpt.model.config import SparseFFNConfig
from sparse_gpt.model.ffn import UltraEfficientSparseFFN

GPT2 = TypeVar("GPT2", bound=GPT2PreTrainedModel)


class SparseGPT2Config(GPT2Config):
    """GPT-2's configuration with what `replace_ffn` did.

    `sparse_ffn` holds a {"layers": [indices], "ffn": SparseFFNConfig as JSON} for every call.
    """

    model_type = "sparse_gpt2"
    sparse_ffn: list[dict[str, Any]] | None = None


class SparseGPT2(GPT2PreTrainedModel):
    config_class = SparseGPT2Config
    config: SparseGPT2Config

    def __init__(self, config: SparseGPT2Config) -> None:
        super().__init__(config)
        for done in config.sparse_ffn or []:
            insert(self, done["layers"], SparseFFNConfig(**done["ffn"]))

    def initialize_weights(self) -> None:
        # transformers loads into a model built without storage. What no file holds, such as fixed
        # transforms, is then undefined, and its own initialisation knows nothing of our parts.
        for ffn in self.modules():
            if isinstance(ffn, UltraEfficientSparseFFN) and not _is_initialized(ffn):
                fresh = UltraEfficientSparseFFN(self.config.n_embd, config=ffn.config)
                for name, value in (*fresh.named_parameters(), *fresh.named_buffers()):
                    path, _, leaf = name.rpartition(".")
                    initialization.copy_(getattr(ffn.get_submodule(path), leaf), value)
                mark_initialized(ffn)
        super().initialize_weights()  # type: ignore[no-untyped-call]


class SparseGPT2Model(SparseGPT2, GPT2Model): ...


class SparseGPT2LMHeadModel(SparseGPT2, GPT2LMHeadModel): ...


class SparseGPT2DoubleHeadsModel(SparseGPT2, GPT2DoubleHeadsModel): ...


class SparseGPT2ForSequenceClassification(SparseGPT2, GPT2ForSequenceClassification): ...


class SparseGPT2ForTokenClassification(SparseGPT2, GPT2ForTokenClassification): ...


class SparseGPT2ForQuestionAnswering(SparseGPT2, GPT2ForQuestionAnswering): ...


SPARSE_CLASSES: dict[type[GPT2PreTrainedModel], type[SparseGPT2]] = {
    GPT2Model: SparseGPT2Model,
    GPT2LMHeadModel: SparseGPT2LMHeadModel,
    GPT2DoubleHeadsModel: SparseGPT2DoubleHeadsModel,
    GPT2ForSequenceClassification: SparseGPT2ForSequenceClassification,
    GPT2ForTokenClassification: SparseGPT2ForTokenClassification,
    GPT2ForQuestionAnswering: SparseGPT2ForQuestionAnswering,
}
AutoConfig.register("sparse_gpt2", SparseGPT2Config)
AutoModel.register(SparseGPT2Config, SparseGPT2Model)
AutoModelForCausalLM.register(SparseGPT2Config, SparseGPT2LMHeadModel)
AutoModelForSequenceClassification.register(SparseGPT2Config, SparseGPT2ForSequenceClassification)
AutoModelForTokenClassification.register(SparseGPT2Config, SparseGPT2ForTokenClassification)
AutoModelForQuestionAnswering.register(SparseGPT2Config, SparseGPT2ForQuestionAnswering)


class _NoNorm(nn.Identity):
    """In place of a block's ln_2, with a weight whose shape makes dense GPT-2s refuse the file.

    They would else read it with a warning, and fill the missing MLPs with noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1))


def insert(model: GPT2PreTrainedModel, layers: Iterable[int], config: SparseFFNConfig) -> None:
    for layer in layers:
        block = blocks_of(model)[layer]
        norm = block.ln_2
        ffn = UltraEfficientSparseFFN(model.config.n_embd, config=config).to(norm.weight)
        ffn.norm_in, block.ln_2 = norm, _NoNorm().to(norm.weight)
        block.mlp = ffn.train(block.mlp.training)
        if not norm.weight.is_meta:
            mark_initialized(ffn)


def blocks_of(model: GPT2PreTrainedModel) -> Any:
    return model.base_model.h


def is_sparse(block: Any) -> bool:
    return isinstance(block.mlp, UltraEfficientSparseFFN)


# transformers' own mark, without which it would initialise what it does not know again.
def mark_initialized(ffn: nn.Module) -> None:
    for part in ffn.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


def _is_initialized(ffn: nn.Module) -> bool:
    return getattr(ffn, "_is_hf_initialized", False)
