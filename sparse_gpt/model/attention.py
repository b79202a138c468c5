"""CausalSelfAttention: the only part in which a token sees others, the earlier ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.flops import FlopCount

Mask: TypeAlias = Tensor | BlockMask


class KVCache:
    """Keys and values of one layer for generation, up to `max_len` tokens."""

    def __init__(self, max_len: int) -> None:
        self.max_len = max_len
        self.length = 0
        self._store: Tensor | None = None

    def extend(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append `(batch, n_head, seq, head_dim)` twice; returns all keys and values so far."""
        if self._store is None:
            batch, heads, _, width = keys.shape
            self._store = keys.new_empty(2, batch, heads, self.max_len, width)
        start, self.length = self.length, self.length + keys.shape[2]
        self._store[0, :, :, start : self.length] = keys
        self._store[1, :, :, start : self.length] = values
        return self._store[0, :, :, : self.length], self._store[1, :, :, : self.length]


def has_flex(device: torch.device | str, config: ModelConfig) -> bool:
    """Whether FlexAttention masks documents there: on a GPU, where a head has 16 values or more.

    Triton multiplies no narrower matrices. Elsewhere `scaled_dot_product_attention` does it, with a
    tensor for the mask: FlexAttention has no backward on a CPU.
    """
    return torch.device(device).type == "cuda" and config.d_model // config.n_head >= 16


def document_mask(documents: Tensor, config: ModelConfig) -> Mask:
    """Which keys a query may see: those at or before it of its own document.

    documents: `(batch, seq)` integers, another for each document of a row. A mask serves every
    block, and is made without waiting for the device.
    """
    flex = has_flex(documents.device, config)
    return block_mask(documents) if flex else dense_mask(documents)


def dense_mask(documents: Tensor) -> Tensor:
    """The document mask as bool `(batch, 1, seq, seq)`.

    `scaled_dot_product_attention` makes numbers of it, which each block keeps for the backward.
    """
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


def block_mask(documents: Tensor) -> BlockMask:
    """The document mask as lists of 128 × 128 blocks: those seen in part, those seen in full.

    Blocks that nothing sees cost no time. No tensor of seq × seq is made: compiled, comparisons
    are summed as they are made.
    """
    batch, seq = documents.shape

    def seen(b: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[b, query] == documents[b, key])

    with torch.no_grad():  # else it would be compiled for both
        create = _compiled(create_block_mask)
        mask: BlockMask = create(seen, batch, None, seq, seq, device=documents.device)
    return mask


def padding_mask(padding: Tensor, start: int, end: int) -> Tensor:
    """Which of the keys 0 to end the queries from start on see, bool `(batch, 1, queries, keys)`.

    padding: int64 `(batch,)`, keys at each row's start that nothing sees but, lest a row of the
    scores be empty, itself.
    """
    keys = torch.arange(end, device=padding.device)
    queries = keys[start:, None]
    seen = (keys <= queries) & ((keys >= padding[:, None, None]) | (keys == queries))
    return seen[:, None]


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` compiled; as it is inside of what is being compiled as a whole."""
    return function if torch.compiler.is_compiling() else _compile(function)


@cache  # at the first use: importing the compiler takes seconds
def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    # Once for each shape, with gradients and without. All batches of a run have one shape.
    return torch.compile(function, dynamic=False)


def document_positions(documents: Tensor) -> Tensor:
    """Each token's distance from its document's first in the row, `(batch, seq)` int64."""
    places = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    opens = torch.ones_like(documents, dtype=torch.bool)
    opens[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return places - torch.where(opens, places, 0).cummax(1).values


class CausalSelfAttention(nn.Module):
    """Multi-head causal attention of GPT-2, `(batch, seq, d_model) -> (batch, seq, d_model)`.

    One fused matmul makes queries, keys and values. Dropout acts on the output only, as the
    attention kernels that are fast have none inside.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.n_head = config.n_head
        self.qkv = nn.Linear(config.d_model, 3 * config.d_model)
        self.out = nn.Linear(config.d_model, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        nn.init.normal_(self.qkv.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02 / math.sqrt(2 * config.n_layer))
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, cache: KVCache | None = None, mask: Mask | None = None) -> Tensor:
        """With a cache, x continues the cached tokens: any number at first, then one at a time.

        mask: which keys a query may see, in place of all earlier ones, as `document_mask` has it.
        """
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            k, v = cache.extend(k, v)
        if k.shape[2] != seq and seq != 1:
            raise ValueError(f"{seq} tokens after {k.shape[2] - seq} cached: only 1 can follow")
        if isinstance(mask, BlockMask):
            y = _compiled(flex_attention)(q, k, v, block_mask=mask)
        else:
            # A single query sees every key, and is_causal would align it with the first.
            causal = mask is None and seq > 1
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        y = self.out(y.transpose(1, 2).reshape(batch, seq, self.d_model))
        out: Tensor = self.dropout(y)
        return out

    def flop_count(self, batch: int, seq: int) -> FlopCount:
        """4d² MACs a token, and 2·seq·d for the scores and their use, un-halved.

        Softmax is 6 operations a score: scale, compare, subtract, exp, add, divide.
        """
        tokens, d = batch * seq, self.d_model
        scores = tokens * 2 * seq * d
        macs = tokens * 4 * d * d + scores
        return FlopCount(
            matmul=2 * macs,
            scores=2 * scores,
            elementwise=6 * tokens * seq * self.n_head,
            mac_equivalents=macs,
        )
