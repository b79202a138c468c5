"""Sparse FFNs fitted to the dense ones that they replace."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GPT2PreTrainedModel

from sparse_gpt.huggingface.modelling import blocks_of, is_sparse
from sparse_gpt.model.ffn import SparseFactorLinear, UltraEfficientSparseFFN

RIDGE = 1e-2  # of the mean variance of what enters the projection


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
    ffns = {i: b.mlp for i, b in enumerate(blocks_of(model)) if is_sparse(b)}
    blocks = dict(enumerate(blocks_of(dense)))
    if not ffns:
        raise ValueError("the model has no sparse FFN: call replace_ffn before")
    if dense.config.n_embd != model.config.n_embd:
        widths = f"{dense.config.n_embd}, the model's {model.config.n_embd}"
        raise ValueError(f"n_embd of the dense model is {widths}")
    for i in ffns:
        if i not in blocks or is_sparse(blocks[i]):
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
