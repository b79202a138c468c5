"""GPT: embeddings, blocks, output head, loss and generation."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from sparse_gpt.model.attention import KVCache, document_mask, document_positions
from sparse_gpt.model.block import DenseBlock, SparseBlock
from sparse_gpt.model.config import ModelConfig
from sparse_gpt.model.loss import head_cross_entropy
from sparse_gpt.model.recompute import recomputed

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
    ) -> Tensor:
        """What the head reads, `(batch, seq, d_model)`; tokens continue the cached ones."""
        start = caches[0].length if caches else 0
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"{end} tokens exceed max_seq_len {self.config.max_seq_len}")
        if documents is None:
            mask, positions = None, torch.arange(start, end, device=tokens.device)
        else:
            mask, positions = document_mask(documents, self.config), document_positions(documents)
        x = self.dropout(self.wte(tokens) + self.wpe(positions))
        for i, block in enumerate(self.blocks):
            cache = caches[i] if caches else None
            if self._recompute_blocks:
                x = recomputed(block, x, cache, mask)
            else:
                x = block(x, cache, mask)
        hidden: Tensor = self.ln_f(x)
        return hidden

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Continue `(batch, seq)` int64 tokens; returns `(batch, seq + max_new_tokens)`.

        Temperature 0 takes the likeliest token, otherwise one is drawn (by `generator`), of the
        `top_k` likeliest if given. Runs in eval mode with a KV cache. A row is one document.
        Raises ValueError when the result would exceed max_seq_len.
        """
        total = tokens.shape[1] + max_new_tokens
        if total > self.config.max_seq_len:
            raise ValueError(
                f"{tokens.shape[1]} tokens and {max_new_tokens} new ones exceed "
                f"max_seq_len {self.config.max_seq_len}"
            )
        training = self.training
        self.eval()
        try:
            caches = [KVCache(total) for _ in self.blocks]
            new = tokens
            for _ in range(max_new_tokens):
                hidden = self._hidden(new, caches)[:, -1]
                logits = self.lm_head(hidden)[:, : self.config.vocab_size]
                new = _choose(logits, temperature, top_k, generator)
                tokens = torch.cat((tokens, new), 1)
        finally:
            self.train(training)
        return tokens


def _choose(
    logits: Tensor, temperature: float, top_k: int | None, generator: torch.Generator | None
) -> Tensor:
    """Next tokens `(batch, 1)` from logits `(batch, vocab_size)`."""
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits.float() / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < least, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)
