"""Sparse FFNs inside a GPT-2 of Hugging Face transformers (extra `hf`): drop in, fit, save, load.

Importing this module, which needs transformers 5, tells its Auto classes of the model type
`sparse_gpt2`. Without that they refuse a saved model, and so do transformers' own GPT-2 classes.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
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

from sparse_gpt.config import DenseFFNConfig, ModelConfig, SparseFFNConfig
from sparse_gpt.ffn import SparseFactorLinear, UltraEfficientSparseFFN

RIDGE = 1e-2  # of the mean variance of what enters the projection

GPT2 = TypeVar("GPT2", bound=GPT2PreTrainedModel)


class SparseGPT2Config(GPT2Config):
    """GPT-2's configuration with what `replace_ffn` did.

    `sparse_ffn` holds a {"layers": [indices], "ffn": SparseFFNConfig as JSON} for every call.
    """

    model_type = "sparse_gpt2"
    sparse_ffn: list[dict[str, Any]] | None = None


class _Sparse(GPT2PreTrainedModel):
    config_class = SparseGPT2Config
    config: SparseGPT2Config

    def __init__(self, config: SparseGPT2Config) -> None:
        super().__init__(config)
        for done in config.sparse_ffn or []:
            _insert(self, done["layers"], SparseFFNConfig(**done["ffn"]))

    def initialize_weights(self) -> None:
        # transformers loads into a model built without storage. What no file holds, such as fixed
        # transforms, is then undefined, and its own initialisation knows nothing of our parts.
        for ffn in self.modules():
            if isinstance(ffn, UltraEfficientSparseFFN) and not _is_initialized(ffn):
                fresh = UltraEfficientSparseFFN(self.config.n_embd, config=ffn.config)
                for name, value in (*fresh.named_parameters(), *fresh.named_buffers()):
                    path, _, leaf = name.rpartition(".")
                    initialization.copy_(getattr(ffn.get_submodule(path), leaf), value)
                _mark_initialized(ffn)
        super().initialize_weights()


class SparseGPT2Model(_Sparse, GPT2Model): ...


class SparseGPT2LMHeadModel(_Sparse, GPT2LMHeadModel): ...


class SparseGPT2DoubleHeadsModel(_Sparse, GPT2DoubleHeadsModel): ...


class SparseGPT2ForSequenceClassification(_Sparse, GPT2ForSequenceClassification): ...


class SparseGPT2ForTokenClassification(_Sparse, GPT2ForTokenClassification): ...


class SparseGPT2ForQuestionAnswering(_Sparse, GPT2ForQuestionAnswering): ...


_SPARSE: dict[type[GPT2PreTrainedModel], type[_Sparse]] = {
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
    if type(model) not in _SPARSE and not isinstance(model, _Sparse):
        possible = ", ".join(kind.__name__ for kind in _SPARSE)
        raise ValueError(f"{type(model).__name__} is no GPT-2 of transformers: {possible}")
    blocks = _blocks(model)
    chosen = _indices(layers, len(blocks))
    for layer in chosen:
        if _is_sparse(blocks[layer]):
            raise ValueError(f"layer {layer} has a sparse FFN already")
    ffn = _ffn_config(config, model.config)
    _insert(model, chosen, ffn)

    # A copy: other models may have been made of the same config.
    before: Any = model.config
    after = copy.deepcopy(before)
    after.__class__ = SparseGPT2Config
    done = {"layers": chosen, "ffn": ffn.model_dump(mode="json")}
    after.sparse_ffn = [*(getattr(before, "sparse_ffn", None) or []), done]
    for part in model.modules():
        if getattr(part, "config", None) is before:
            part.config = after
    model.__class__ = _SPARSE.get(type(model), type(model))  # type: ignore[assignment]
    return model


class FitError(NamedTuple):
    """Mean squared error over the variance of the dense MLP's output: 1 is a constant's, 0 none."""

    before: float
    after: float


@torch.enable_grad()
def fit_to_dense(
    model: GPT2PreTrainedModel,
    dense: GPT2PreTrainedModel,
    batches: Iterable[Tensor],
    steps: int = 200,
    lr: float = 1e-2,
) -> dict[int, FitError]:
    """Start the model's sparse FFNs from the dense MLPs that they replaced, each layer by itself.

    `dense` is the model as it was (a `copy.deepcopy` made before `replace_ffn`); its activations
    are what every layer sees. `batches` are `(batch, seq)` int64 tokens. The first one only
    measures. The second one gives the last projection and norm in closed form (least squares; it
    should have several times n_embd tokens). Then come `steps` steps of Adam, a batch each, from
    the second on and again when they run out, at `lr` falling linearly to 0.

    Returns the errors of every sparse layer on the first batch. Dropout is off meanwhile;
    train modes and dtypes are as before, gradients of the FFNs are None. Same input and device,
    same result.

    Raises ValueError when there is no sparse FFN, when `dense` has not the width, the layers or
    dense MLPs in them, or for fewer than two batches.
    """
    ffns = {i: b.mlp for i, b in enumerate(_blocks(model)) if _is_sparse(b)}
    blocks = dict(enumerate(_blocks(dense)))
    if not ffns:
        raise ValueError("the model has no sparse FFN: call replace_ffn before")
    if dense.config.n_embd != model.config.n_embd:
        widths = f"{dense.config.n_embd}, the model's {model.config.n_embd}"
        raise ValueError(f"n_embd of the dense model is {widths}")
    for i in ffns:
        if i not in blocks or _is_sparse(blocks[i]):
            raise ValueError(f"layer {i} of the dense model is no dense layer")
    stream = iter(batches)
    start = list(itertools.islice(stream, 2))
    if len(start) < 2:
        raise ValueError(f"{len(start)} batches: two are needed, one to measure, one to fit")
    held_out, train = start[0], itertools.cycle(itertools.chain(start[1:], stream))

    def targets(tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(layer, residual stream, dense branch), both `(tokens, n_embd)`."""
        norms = [blocks[i].ln_2 for i in ffns]
        run = partial(dense.base_model, tokens.to(dense.device), use_cache=False)
        for i, x in zip(ffns, _inputs(norms, run), strict=True):
            with torch.no_grad():
                y = blocks[i].mlp(blocks[i].ln_2(x))
            weight = ffns[i].norm_in.weight
            yield i, x.to(weight), y.to(weight)

    def errors() -> dict[int, float]:
        with torch.no_grad():
            return {i: _error(ffns[i](x), y).item() for i, x, y in targets(held_out)}

    modes = {part: part.training for part in (*model.modules(), *dense.modules())}
    dtype = model.dtype
    try:
        model.eval()
        dense.eval()
        for ffn in ffns.values():
            ffn.to(torch.promote_types(dtype, torch.float32))  # small steps vanish in bfloat16
        before = errors()
        for i, x, y in targets(start[1]):
            _solve(ffns[i], x, y)
        parameters = [p for ffn in ffns.values() for p in ffn.parameters() if p.requires_grad]
        optimizer = torch.optim.Adam(parameters, lr)
        optimizer.zero_grad()  # of a caller's gradients
        for step, tokens in zip(range(steps), train, strict=False):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            for i, x, y in targets(tokens):
                _error(ffns[i](x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        after = errors()
    finally:
        for ffn in ffns.values():
            ffn.to(dtype)
        for part, mode in modes.items():
            part.training = mode
    return {i: FitError(before[i], after[i]) for i in ffns}


def _error(branch: Tensor, y: Tensor) -> Tensor:
    return (branch - y).square().sum() / (y - y.mean(0)).square().sum()


@torch.no_grad()
def _solve(ffn: UltraEfficientSparseFFN, x: Tensor, y: Tensor) -> None:
    """The projection, and the norm if one follows it, by least squares from x to y."""
    norm = ffn.norm_out if ffn.config.norm_out == "after" else None
    target = y
    if isinstance(norm, nn.LayerNorm):
        norm.reset_parameters()
        # All that a norm can be given: tokens of one size. Channels alike, so that none rules.
        target = F.layer_norm((y - y.mean(0)) / y.std(0).clamp_min(1e-6), y.shape[-1:])
    if isinstance(ffn.projection, nn.Linear):
        (v,) = _inputs([ffn.projection], partial(ffn, x))
        gram = (v.T @ v).double()
        gram.diagonal().add_(RIDGE * gram.diagonal().mean())
        ffn.projection.weight.copy_(torch.linalg.solve(gram, (v.T @ target).double()).T)
    elif isinstance(ffn.projection, SparseFactorLinear) and norm is None:
        z = ffn(x)  # two factors have no closed form, but each output its best size
        sizes = (z * y).sum(0) / z.square().sum(0)
        ffn.projection.second.mul_(sizes.view(-1, 1, ffn.projection.block))
    if isinstance(norm, nn.LayerNorm):
        z = ffn(x)
        spread = z - z.mean(0)
        norm.weight.copy_((spread * y).sum(0) / spread.square().sum(0))
        norm.bias.copy_(y.mean(0) - norm.weight * z.mean(0))


def _inputs(modules: Iterable[nn.Module], run: Callable[[], object]) -> list[Tensor]:
    """What enters the modules, in the order of their calls, as `(tokens, channels)`."""
    seen: list[Tensor] = []
    hooks = [
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2)))
        for module in modules
    ]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return seen


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
    ffn = ModelConfig(
        max_seq_len=gpt2.n_positions,
        d_model=gpt2.n_embd,
        n_layer=gpt2.n_layer,
        n_head=gpt2.n_head,
        ffn=config,
    ).ffn
    if isinstance(ffn, DenseFFNConfig):
        raise ValueError(f"config {config!r} is no sparse FFN")
    return ffn


class _NoNorm(nn.Identity):
    """In place of a block's ln_2, with a weight whose shape makes dense GPT-2s refuse the file.

    They would else read it with a warning, and fill the missing MLPs with noise.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.zeros(1))


def _insert(model: GPT2PreTrainedModel, layers: Iterable[int], config: SparseFFNConfig) -> None:
    for layer in layers:
        block = _blocks(model)[layer]
        norm = block.ln_2
        ffn = UltraEfficientSparseFFN(model.config.n_embd, config=config).to(norm.weight)
        ffn.norm_in, block.ln_2 = norm, _NoNorm().to(norm.weight)
        block.mlp = ffn.train(block.mlp.training)
        if not norm.weight.is_meta:
            _mark_initialized(ffn)


def _blocks(model: GPT2PreTrainedModel) -> Any:
    return model.base_model.h


def _is_sparse(block: Any) -> bool:
    return isinstance(block.mlp, UltraEfficientSparseFFN)


# transformers' own mark, without which it would initialise what it does not know again.
def _mark_initialized(ffn: nn.Module) -> None:
    for part in ffn.modules():
        part._is_hf_initialized = True  # type: ignore[assignment]


def _is_initialized(ffn: nn.Module) -> bool:
    return getattr(ffn, "_is_hf_initialized", False)
