"""What a sparse FFN starts from before it is distilled: least squares on one layer's tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_gpt.model.ffn import BlockDictionary, SparseFactorLinear, UltraEfficientSparseFFN
from sparse_gpt.model.ffn.dictionary import polynomial

RIDGE = 1e-2  # of the mean variance of what enters a matrix
SHARPNESS = 20.0  # of the energies: logits are so many times a cosine
SWEEPS = 8  # over the projection and all blocks; twice as many take a tenth off the error
# GELU is z/2 + z²/√(2π) near 0: c + c²/2 at c = 1.6 z, but for the size.
GELU = 1.6


@torch.no_grad()
def solve(ffn: UltraEfficientSparseFFN, mlp: Any, x: Tensor, y: Tensor) -> None:
    """Fit the FFN to the dense branch y of the residual stream x, both `(tokens, d)`.

    `mlp` is transformers' GPT-2 MLP that made y; a dictionary takes neurons from it. The same
    input gives the same result.
    """
    if isinstance(ffn.spectral, BlockDictionary):
        h = ffn.norm_in(x)
        _cluster(ffn.spectral, h)
        _take_neurons(ffn.spectral, mlp.c_fc.weight.to(h))
        _solve_blocks(ffn.spectral, h, y)
    _solve_projection(ffn, x, y)


def _cluster(spectral: BlockDictionary, h: Tensor) -> None:
    """Energies that tell tokens apart by direction: spherical k-means of h. β is 0: the clusters
    are even enough, and β moved until they are more so leaves them less even on other tokens."""
    blocks = spectral.config.blocks
    directions = F.normalize(h, dim=-1)
    generator = torch.Generator().manual_seed(0)
    start = torch.randperm(len(h), generator=generator).to(h.device)
    centres = directions[start.repeat(-(-blocks // len(h)))[:blocks]]
    for _ in range(15):
        nearest = F.one_hot((directions @ centres.T).argmax(-1), blocks).to(h)
        sums = nearest.T @ directions  # a product: sums by index are in no order on a GPU
        centres = torch.where(nearest.any(0).unsqueeze(1), F.normalize(sums, dim=-1), centres)
    spectral.router.weight.copy_(SHARPNESS * centres / h.norm(dim=-1).mean())
    spectral.moves.zero_()
    spectral.loads.zero_()


def _take_neurons(spectral: BlockDictionary, weight: Tensor) -> None:
    """Atoms are the dense neurons, `(d, neurons)`, drawn at random for each block by itself."""
    generator, count = torch.Generator().manual_seed(0), weight.shape[1]
    for block in spectral.analysis:
        shuffled = torch.randperm(count, generator=generator).to(weight.device)
        # Twice in a block a neuron is of no use, but where there are fewer than atoms.
        block.copy_(GELU * weight[:, shuffled.repeat(-(-spectral.size // count))[: spectral.size]])


def _solve_blocks(spectral: BlockDictionary, h: Tensor, y: Tensor) -> None:
    """Synthesis by least squares beside a linear map of h, one matrix after another."""
    energies, chosen = spectral.route(h)
    linear, rest = _Ridge(h), y
    blocks = []
    for b, analysis in enumerate(spectral.analysis):
        token, place = (chosen == b).nonzero(as_tuple=True)
        c = h[token] @ analysis
        gain = energies[token, place].unsqueeze(1).to(h)
        blocks.append((token, _Ridge(polynomial(c) * gain)))
    for _ in range(SWEEPS):
        rest = linear.step(rest)
        for token, block in blocks:
            rest[token] = block.step(rest[token])
    for weight, (_, block) in zip(spectral.synthesis, blocks, strict=True):
        weight.copy_(block.weight)


class _Ridge:
    """Least squares from `(rows, inputs)`, solved again for what others leave of the targets."""

    def __init__(self, inputs: Tensor) -> None:
        self.inputs = inputs
        self.weight: Tensor | float = 0.0
        gram = (inputs.T @ inputs).double()
        # A block without rows has no variance: its weight is then 0.
        gram.diagonal().add_(RIDGE * gram.diagonal().mean() + torch.finfo(inputs.dtype).tiny)
        self.factor = torch.linalg.cholesky(gram)

    def step(self, rest: Tensor) -> Tensor:
        """Of targets less all predictions, `(rows, outputs)`: the same with this one made anew."""
        if isinstance(self.weight, Tensor):
            rest = rest + self.inputs @ self.weight
        products = (self.inputs.T @ rest).double()
        self.weight = torch.cholesky_solve(products, self.factor).to(rest)
        return rest - self.inputs @ self.weight


def _solve_projection(ffn: UltraEfficientSparseFFN, x: Tensor, y: Tensor) -> None:
    """The projection, and the norm if one follows it, by least squares from x to y."""
    norm = ffn.norm_out if ffn.config.norm_out == "after" else None
    target = y
    if isinstance(norm, nn.LayerNorm):
        norm.reset_parameters()
        # All that a norm can be given: tokens of one size. Channels alike, so that none rules.
        target = F.layer_norm((y - y.mean(0)) / y.std(0).clamp_min(1e-6), y.shape[-1:])
    seen: list[Tensor] = []
    (v,) = inputs([ffn.projection], lambda: seen.append(ffn(x)))
    if norm is None and ffn.norm_out is None:
        target = y - (seen[0] - ffn.projection(v))  # of what is beside a dictionary
    if isinstance(ffn.projection, nn.Linear):
        ridge = _Ridge(v)
        ridge.step(target)
        assert isinstance(ridge.weight, Tensor)
        ffn.projection.weight.copy_(ridge.weight.T)
    elif isinstance(ffn.projection, SparseFactorLinear) and norm is None:
        z = ffn.projection(v)  # two factors have no closed form, but each output its best size
        sizes = (z * target).sum(0) / z.square().sum(0)
        ffn.projection.second.mul_(sizes.view(-1, 1, ffn.projection.block))
    if isinstance(norm, nn.LayerNorm):
        z = ffn(x)
        spread = z - z.mean(0)
        norm.weight.copy_((spread * y).sum(0) / spread.square().sum(0))
        norm.bias.copy_(y.mean(0) - norm.weight * z.mean(0))


def inputs(modules: Iterable[nn.Module], run: Callable[[], object]) -> list[Tensor]:
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
