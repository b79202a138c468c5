"""CausalSelfAttention: the only part in which a token sees others, the earlier ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_gpt.config import ModelConfig
from sparse_gpt.flops import FlopCount


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


def document_mask(documents: Tensor) -> Tensor:
    """Which keys a query may see: those at or before it of its own document.

    documents: `(batch, seq)` integers, another for each document of a row. Returns bool
    `(batch, 1, seq, seq)`, seq bytes a token.
    """
    same = documents[:, :, None] == documents[:, None, :]
    return same.tril()[:, None]


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

    def forward(
        self, x: Tensor, cache: KVCache | None = None, mask: Tensor | None = None
    ) -> Tensor:
        """With a cache, x continues the cached tokens: any number at first, then one at a time.

        mask: bool `(batch, 1, seq, seq)`, which keys a query may see, in place of all earlier ones.
        """
        batch, seq, _ = x.shape
        qkv = self.qkv(x).view(batch, seq, 3, self.n_head, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            k, v = cache.extend(k, v)
        if k.shape[2] != seq and seq != 1:
            raise ValueError(f"{seq} tokens after {k.shape[2] - seq} cached: only 1 can follow")
        # A single query sees every key, and is_causal would align it with the first.
        causal = mask is None and seq > 1
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.dropout(self.out(y.transpose(1, 2).reshape(batch, seq, self.d_model)))

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
