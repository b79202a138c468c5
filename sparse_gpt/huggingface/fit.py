"""Sparse FFNs fitted to the dense ones that they replace."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import GPT2PreTrainedModel

from sparse_gpt.huggingface.closed_form import inputs, solve
from sparse_gpt.huggingface.modelling import blocks_of, is_sparse
from sparse_gpt.model.ffn import BlockDictionary, UltraEfficientSparseFFN

# What is fitted closely from the start is only shaken by steps as large as a fixed spectrum's.
LR, DICTIONARY_LR = 1e-2, 1e-3


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
    lr: float | None = None,
    calibration: int = 8,
) -> dict[int, FitError]:
    """Start the model's sparse FFNs from the dense MLPs that they replaced, each layer by itself.

    `dense` is the model as it was (a `copy.deepcopy` made before `replace_ffn`); its activations
    are what every layer sees. `batches` are `(batch, seq)` int64 tokens. The first one only
    measures. The next `calibration` ones, or as many as there are, give a start in closed form
    (`closed_form.solve`; they are held in memory at once, and should have several times n_embd
    tokens, for a dictionary several times its atoms). Then come `steps` steps of Adam, a batch
    each, from the second on and again when they run out, at `lr` falling linearly to 0; None is
    1e-3 for FFNs with a dictionary and 1e-2 for others. A dictionary's β stays as it is: moved, the
    distillation would gain nothing (docs/drop-in.md); in training, `balance` moves it.

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
    start = list(itertools.islice(stream, 1 + max(1, calibration)))
    if len(start) < 2:
        raise ValueError(f"{len(start)} batches: two are needed, one to measure, one to fit")
    held_out, train = start[0], itertools.cycle(itertools.chain(start[1:], stream))

    def targets(tokens: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(layer, residual stream, dense branch), both `(tokens, n_embd)`."""
        norms = [blocks[i].ln_2 for i in ffns]
        run = partial(dense.base_model, tokens.to(dense.device), use_cache=False)
        for i, x in zip(ffns, inputs(norms, run), strict=True):
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
        seen: dict[int, list[tuple[Tensor, Tensor]]] = {i: [] for i in ffns}
        for tokens in start[1:]:
            for i, x, y in targets(tokens):
                seen[i].append((x, y))
        for i, ffn in ffns.items():
            xs, ys = zip(*seen.pop(i), strict=True)
            solve(ffn, blocks[i].mlp, torch.cat(xs), torch.cat(ys))
        optimizer = torch.optim.Adam(_groups(ffns.values(), lr))
        rates = [group["lr"] for group in optimizer.param_groups]
        optimizer.zero_grad()  # of a caller's gradients
        for step, tokens in zip(range(steps), train, strict=False):
            for group, rate in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = rate * (1 - step / steps)
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


def balance(model: nn.Module) -> None:
    """Move β of all of a model's dictionaries, once after each step of an optimizer.

    Training elsewhere than in `sparse-gpt train` wants it, or blocks that are little used stay so:
    `optimizer.register_step_post_hook(lambda *_: balance(model))`. Over several processes, sum
    their `loads` before.
    """
    for dictionary in _dictionaries(model):
        dictionary.balance()
        dictionary.loads.zero_()


def _dictionaries(module: nn.Module) -> list[BlockDictionary]:
    return [part for part in module.modules() if isinstance(part, BlockDictionary)]


def _groups(ffns: Iterable[UltraEfficientSparseFFN], lr: float | None) -> list[dict[str, Any]]:
    """An optimizer's, each FFN at its own rate."""
    return [
        {
            "params": [p for p in ffn.parameters() if p.requires_grad],
            "lr": (DICTIONARY_LR if _dictionaries(ffn) else LR) if lr is None else lr,
        }
        for ffn in ffns
    ]
