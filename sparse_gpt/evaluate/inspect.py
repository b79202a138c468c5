"""What the parts of a sparse FFN do on held-out text: who uses a block, and what it writes.

A block of the dictionary is told by the tokens at which it is computed, more often than they are
frequent; by the contexts of its largest energies; by the ids whose logits its mean contribution
raises, read straight through the last norm's gain and the head (the direct path alone: later
layers may do otherwise); and by the blocks that are chosen with it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from sparse_gpt.data import Split, Tokenizer
from sparse_gpt.data.batches.batches import count_windows
from sparse_gpt.errors import ConfigError
from sparse_gpt.evaluate.checkpoint import Trained
from sparse_gpt.model.ffn import BlockDictionary, UltraEfficientSparseFFN
from sparse_gpt.model.ffn.dictionary import polynomial
from sparse_gpt.model.ffn.grouped import grouped_product
from sparse_gpt.model.ffn.routing import Places
from sparse_gpt.model.gpt import GPT
from sparse_gpt.train.feed import held_out_of

_SHOWN = 8  # tokens, contexts and neighbours of a block
_BEFORE, _AFTER = 16, 6  # tokens of a context


@dataclass(frozen=True)
class Context:
    """Text around a token at which a block has a large energy."""

    before: str
    token: str
    after: str
    energy: float


@dataclass(frozen=True)
class Block:
    """What one block of a layer's dictionary does.

    load: tokens that compute it, over the mean of the layer's blocks. energy: its mean where it is
    computed. tokens: (text, share of the block's uses, how many times the token's own frequency
    that is). writes: (text, nats that its logit rises by, over the mean of the layer's blocks).
    together: (block, how many times as often as by chance).
    """

    number: int
    load: float
    energy: float
    tokens: list[tuple[str, float, float]]
    writes: list[tuple[str, float]]
    together: list[tuple[int, float]]
    contexts: list[Context]


@dataclass(frozen=True)
class Layer:
    """A sparse FFN. parts: RMS of what each part gives, over the branch's. branch: its RMS over the
    residual stream's. entropy: of the energies, nats; None without a dictionary."""

    number: int
    branch: float
    parts: dict[str, float]
    entropy: float | None
    blocks: list[Block]


@dataclass(frozen=True)
class Inspection:
    """All layers of a checkpoint on some held-out tokens."""

    checkpoint: str
    data: str
    tokens: int
    layers: list[Layer]


@dataclass
class _Use:
    """Sums over the tokens seen, of one dictionary: count and energy `(blocks,)`, by_id `(blocks,
    vocab_size)`, together `(blocks, blocks)`, coefficients `(blocks, size)`; the largest energies
    `(n, blocks)` and the places of their tokens in the text."""

    dictionary: BlockDictionary
    count: Tensor = field(init=False)
    energy: Tensor = field(init=False)
    by_id: Tensor = field(init=False)
    together: Tensor = field(init=False)
    coefficients: Tensor = field(init=False)
    largest: Tensor = field(init=False)
    places: Tensor = field(init=False)
    entropy: float = 0.0

    def begin(self, vocab_size: int) -> None:
        blocks, like = self.dictionary.config.blocks, self.dictionary.analysis
        zeros = partial(torch.zeros, dtype=torch.float32, device=like.device)
        self.count, self.energy = zeros(blocks), zeros(blocks)
        self.by_id, self.together = zeros(blocks, vocab_size), zeros(blocks, blocks)
        self.coefficients = zeros(blocks, self.dictionary.size)
        self.largest = zeros(0, blocks)
        self.places = torch.zeros(0, blocks, dtype=torch.int64, device=like.device)

    def add(self, h: Tensor, ids: Tensor, start: int) -> None:
        """Tokens `(n, d_model)` with their ids, the first of which is the start-th of the text."""
        own, blocks = self.dictionary, self.dictionary.config.blocks
        energies, chosen = own.route(h)
        kept = torch.zeros(len(h), blocks, device=h.device).scatter_(1, chosen, energies.float())
        used = (kept > 0).float()
        self.count += used.sum(0)
        self.energy += kept.sum(0)
        self.by_id.index_add_(1, ids, used.t())
        self.together += used.t() @ used
        self.entropy += own.energy_entropy(h).item() * len(h)
        places = Places.of(chosen, blocks)
        rows = h.index_select(0, places.order // chosen.shape[1])
        gain = energies.flatten()[places.order, None].to(h.dtype)
        c = polynomial(grouped_product(rows, own.analysis, places.ends)) * gain
        self.coefficients.index_add_(0, chosen.flatten()[places.order], c.float())
        best = kept.topk(min(_SHOWN, len(h)), 0)
        largest = torch.cat((self.largest, best.values))
        order = largest.topk(min(_SHOWN, len(largest)), 0).indices
        self.largest = largest.gather(0, order)
        self.places = torch.cat((self.places, best.indices + start)).gather(0, order)


def inspect(trained: Trained, folder: str, split: Split, max_tokens: int = 65_536) -> Inspection:
    """Look at every sparse FFN of a model on about so many tokens of a held-out split.

    Raises ConfigError for a dense model, DataError where the vocabulary is not at hand or the split
    is too short.
    """
    model, config = trained.model, trained.config.model
    ffns = {
        number: ffn
        for number, block in enumerate(model.blocks)
        if isinstance(ffn := block.get_submodule("ffn"), UltraEfficientSparseFFN)
    }
    if not ffns:
        raise ConfigError(f"{trained.name}: its FFNs are dense; there are no parts to look at")
    tokenizer = trained.tokenizer
    uses = {n: _Use(f.spectral) for n, f in ffns.items() if isinstance(f.spectral, BlockDictionary)}
    for use in uses.values():
        use.begin(config.vocab_size)
    sizes: dict[tuple[int, str], float] = {}
    handles = [
        part.register_forward_hook(partial(_measure, sizes, (number, name)))
        for number, ffn in ffns.items()
        for name, part in _parts(ffn)
    ]
    inputs: dict[int, Tensor] = {}
    handles += [
        use.dictionary.register_forward_pre_hook(partial(_keep, inputs, number))
        for number, use in uses.items()
    ]
    count_windows(split, config.max_seq_len)
    text: list[Tensor] = []
    seen = 0
    try:
        with torch.no_grad():
            for batch in held_out_of(trained.config, split, max_tokens):
                tokens = batch.tokens[batch.samples >= 0].to(trained.device)
                documents = batch.documents
                if documents is not None:
                    documents = documents[batch.samples >= 0].to(trained.device)
                model(tokens, documents=documents)
                for number, use in uses.items():
                    use.add(inputs[number].flatten(0, -2), tokens.flatten(), seen)
                text.append(tokens.flatten().cpu())
                seen += tokens.numel()
    finally:
        for handle in handles:
            handle.remove()
    whole = torch.cat(text)
    layers = []
    for number in ffns:
        branch, stream = sizes[number, "branch"], sizes[number, "stream"]
        found = {
            name: (value / branch) ** 0.5
            for (layer, name), value in sizes.items()
            if layer == number and name not in ("branch", "stream")
        }
        used = uses.get(number)
        layers.append(
            Layer(
                number=number,
                branch=(branch / stream) ** 0.5,
                parts=found,
                entropy=used.entropy / seen if used else None,
                blocks=_blocks(used, model, tokenizer, whole) if used else [],
            )
        )
    return Inspection(trained.name, folder, seen, layers)


def _parts(ffn: UltraEfficientSparseFFN) -> list[tuple[str, nn.Module]]:
    named = ("spectral", "polynomial", "feedback", "refine", "projection", "norm_out")
    there = [(name, part) for name in named if (part := getattr(ffn, name)) is not None]
    return [*there, ("branch", ffn)]


def _measure(
    sizes: dict[tuple[int, str], float],
    key: tuple[int, str],
    _: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    """Add up squares; the branch's input is the residual stream."""
    sizes[key] = sizes.get(key, 0.0) + output.float().square().sum().item()
    if key[1] == "branch":
        stream = (key[0], "stream")
        sizes[stream] = sizes.get(stream, 0.0) + inputs[0].float().square().sum().item()


def _keep(kept: dict[int, Tensor], number: int, _: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    kept[number] = inputs[0]


def _blocks(use: _Use, model: GPT, tokenizer: Tokenizer, text: Tensor) -> list[Block]:
    norm, head, seq_len = model.ln_f, model.wte.weight, model.config.max_seq_len
    count, total = use.count.clamp(min=1), len(text)
    mean = use.coefficients / count[:, None]
    written = torch.einsum("bs,bsd->bd", mean, use.dictionary.synthesis.float())
    written = written - written.mean(0)
    logits = (written * norm.weight.float()) @ head[: tokenizer.vocab_size].float().t()
    frequency = use.by_id.sum(0) / use.by_id.sum()
    share = use.by_id / count[:, None]
    lift = share / frequency.clamp(min=1 / total)
    telling = share * lift.clamp(min=1e-9).log()
    chance = use.count[:, None] * use.count[None, :] / total
    together = (use.together / chance.clamp(min=1e-9)).fill_diagonal_(0)
    say: Callable[[int], str] = lambda token: tokenizer.decode([token])  # noqa: E731
    blocks = []
    for b in range(len(count)):
        ids = [i for i in telling[b].topk(_SHOWN).indices.tolist() if share[b, i] > 0]
        raised = logits[b].topk(_SHOWN)
        near = together[b].topk(min(_SHOWN, len(count) - 1))
        blocks.append(
            Block(
                number=b,
                load=(use.count[b] / use.count.mean()).item(),
                energy=(use.energy[b] / count[b]).item(),
                tokens=[(say(i), share[b, i].item(), lift[b, i].item()) for i in ids],
                writes=[
                    (say(i), value)
                    for i, value in zip(
                        raised.indices.tolist(), raised.values.tolist(), strict=True
                    )
                ],
                together=[
                    (other, times)
                    for other, times in zip(
                        near.indices.tolist(), near.values.tolist(), strict=True
                    )
                    if times > 0
                ],
                contexts=[
                    _context(tokenizer, text, seq_len, place, energy)
                    for place, energy in zip(
                        use.places[:, b].tolist(), use.largest[:, b].tolist(), strict=True
                    )
                    if energy > 0
                ],
            )
        )
    return blocks


def _context(
    tokenizer: Tokenizer, text: Tensor, seq_len: int, place: int, energy: float
) -> Context:
    first = place - place % seq_len  # of its window; the one before may be from elsewhere
    before = text[max(first, place - _BEFORE) : place]
    after = text[place + 1 : min(first + seq_len, place + 1 + _AFTER)]
    return Context(
        tokenizer.decode(before.tolist()),
        tokenizer.decode([int(text[place])]),
        tokenizer.decode(after.tolist()),
        energy,
    )
