"""GPT: embeddings, blocks, output head, loss and generation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from sparse_gpt.model.attention import (
    KVCache,
    Mask,
    document_mask,
    document_positions,
    padding_mask,
)
from sparse_gpt.model.block import DenseBlock, SparseBlock
from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.loss import head_cross_entropy
from sparse_gpt.model.recompute import recomputed
from sparse_gpt.model.sampling import Sampling

GREEDY = Sampling(temperature=0)
VOCAB_MULTIPLE = 64  # matrix units want the head's width a multiple of it


def padded_vocabulary(config: ModelConfig) -> int:
    """Rows of the embedding, and of the head that shares it."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


class Head(nn.Linear):
    """Hidden states to logits, or with targets to their mean loss, chunk by chunk."""

    def forward(
        self, hidden: Tensor, targets: Tensor | None = None, vocab_size: int | None = None
    ) -> Tensor:
        """Logits `(..., out_features)`, or the loss over the first `vocab_size` ids, `()`."""
        if targets is None or vocab_size is None:
            return super().forward(hidden)
        return head_cross_entropy(hidden.flatten(0, 1), self.weight, targets.flatten(), vocab_size)


class GPT(nn.Module):
    """GPT-2 (Radford et al. 2019): learned positions, pre-LayerNorm, tied head.

    The embedding's rows are padded to a multiple of 64; padded tokens can neither be predicted nor
    share in the loss. Matrices have 2 dimensions or more, everything per channel has 1, so
    `p.dim() >= 2` tells what to decay.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        padded = padded_vocabulary(config)
        self.wte = nn.Embedding(padded, config.d_model)
        self.wpe = nn.Embedding(config.max_seq_len, config.d_model)
        self.dropout = nn.Dropout(config.dropout)
        block = DenseBlock if config.ffn.kind == "dense" else SparseBlock
        self.blocks = nn.ModuleList(block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.d_model)
        # On meta: its own weight would only be thrown away.
        self.lm_head = Head(config.d_model, padded, bias=False, device="meta")
        self.lm_head.weight = self.wte.weight
        nn.init.normal_(self.wte.weight, std=0.02)
        nn.init.normal_(self.wpe.weight, std=0.02)
        self._recompute_blocks = False

    def recompute(self, what: Literal["none", "selective", "full"]) -> None:
        """Choose which activations training computes again in the backward, to save memory.

        `full`: each block, of which its input alone is kept. `selective`: each block's FFN, whose
        activations are most of a block's; attention keeps no scores and costs most to repeat.
        """
        self._recompute_blocks = what == "full"
        for block in self.blocks:
            assert isinstance(block, DenseBlock | SparseBlock)
            block.recompute_ffn = what == "selective"

    def forward(
        self, tokens: Tensor, targets: Tensor | None = None, documents: Tensor | None = None
    ) -> Tensor:
        """Logits, or with targets the loss.

        tokens, targets: `(batch, seq)` int64. documents: `(batch, seq)` integers, each token's
        document, needed with `document_mask`. Logits: `(batch, seq, vocab_size)` in the module's
        dtype (a view of the padded ones). Loss: float32 `()`, the mean cross-entropy in nats over
        the real vocabulary and the targets that are not -100.
        Raises ValueError when seq exceeds max_seq_len, and where documents would be ignored or are
        missing.
        """
        if (documents is not None) != self.config.document_mask:
            missing = "needs the documents of" if documents is None else "ignores the documents of"
            raise ValueError(
                f"document_mask is {self.config.document_mask}: the model {missing} its tokens"
            )
        hidden, vocab_size = self._hidden(tokens, documents=documents), self.config.vocab_size
        if targets is None:
            logits: Tensor = self.lm_head(hidden)[..., :vocab_size]
            return logits
        loss: Tensor = self.lm_head(hidden, targets, vocab_size)
        return loss.float()

    def _hidden(
        self,
        tokens: Tensor,
        caches: list[KVCache] | None = None,
        documents: Tensor | None = None,
        padding: Tensor | None = None,
    ) -> Tensor:
        """What the head reads, `(batch, seq, d_model)`; tokens continue the cached ones.

        padding: int64 `(batch,)`, tokens at each row's start that nothing sees.
        """
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens exceed max_seq_len {self.config.max_seq_len}")
        mask: Mask | None = None
        positions = torch.arange(start, end, device=tokens.device)
        if documents is not None:
            mask, positions = document_mask(documents, self.config), document_positions(documents)
        elif padding is not None:
            mask = padding_mask(padding, start, end)
            positions = (positions - padding[:, None]).clamp(min=0)
        x = self.dropout(self.wte(tokens) + self.wpe(positions))
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            if self._recompute_blocks:
                x = recomputed(block, x, cache, mask)
            else:
                x = block(x, cache, mask)
        hidden: Tensor = self.ln_f(x)
        return hidden

    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `(batch, seq)` int64 tokens; returns `(batch, seq + max_new_tokens)`.

        The rest is as in `stream`.
        """
        new = self.stream(tokens, max_new_tokens, sampling, lengths=lengths, generator=generator)
        return torch.cat((tokens, *new), 1)

    @torch.no_grad()
    def stream(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        lengths: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """The tokens that follow `(batch, seq)` int64 ones, one at a time: `(batch, 1)` each.

        lengths: int64 `(batch,)`, of how many tokens each row's prompt is, at its end; what stands
        before it is padding, whatever it holds. generator: draws the tokens. Runs in eval mode; a
        row is one document.

        A token is computed once: keys and values are kept. Where they fill the context, the latter
        half of it is read anew, from position 0, and it goes on.

        Raises ValueError when there is no prompt, or one longer than the context.
        """
        (batch, seq), context = tokens.shape, self.config.max_seq_len
        if not 0 < seq <= context:
            raise ValueError(f"a prompt of {seq} tokens; it must have 1 to {context}")
        padding = None if lengths is None else seq - lengths
        if padding is not None:  # its ids must count for nothing
            first = tokens.gather(1, padding[:, None])
            places = torch.arange(seq, device=tokens.device)
            tokens = torch.where(places < padding[:, None], first, tokens)
        seen = torch.zeros(batch, self.config.vocab_size, dtype=torch.bool, device=tokens.device)
        seen.scatter_(1, tokens, True)
        training = self.training
        self.eval()
        try:
            new, caches = tokens, self._caches(seq + max_new_tokens)
            for _ in range(max_new_tokens):
                if caches[0].length + new.shape[1] > context:
                    keep = max(1, context // 2)
                    new, caches = tokens[:, -keep:], self._caches(context)
                    if padding is not None:
                        padding = (padding - (tokens.shape[1] - keep)).clamp(min=0)
                        padding = padding if bool(padding.any()) else None
                    tokens = new
                hidden = self._hidden(new, caches, padding=padding)[:, -1]
                logits = self.lm_head(hidden)[:, : self.config.vocab_size]
                new = sampling.choose(logits, seen, generator)
                seen.scatter_(1, new, True)
                tokens = torch.cat((tokens, new), 1)
                yield new
        finally:
            self.train(training)

    def _caches(self, length: int) -> list[KVCache]:
        return [KVCache(min(length, self.config.max_seq_len)) for _ in self.blocks]
