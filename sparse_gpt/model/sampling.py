"""How the next token is chosen from its logits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Which token follows.

    temperature: divides the logits; 0 takes the likeliest token.
    top_k: draws among so many likeliest alone.
    top_p: draws among the fewest likeliest whose probabilities reach so much together (Holtzman et
        al. 2020, arXiv 1904.09751).
    repetition_penalty: makes logits of tokens that came before less by this factor, more where it
        is under 1 (Keskar et al. 2019, arXiv 1909.05858, section 4.1).

    Raises ValueError naming a value that is out of its range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, value, sound, says in (
            ("temperature", self.temperature, 0 <= self.temperature < math.inf, "0 or more"),
            ("top_k", self.top_k, self.top_k is None or self.top_k >= 1, "1 or more"),
            ("top_p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            (
                "repetition_penalty",
                self.repetition_penalty,
                0 < self.repetition_penalty < math.inf,
                "above 0",
            ),
        ):
            if not sound:
                raise ValueError(f"{name} is {value}; it must be {says}")

    def choose(self, logits: Tensor, seen: Tensor, generator: torch.Generator | None) -> Tensor:
        """Next tokens `(batch, 1)` int64 for logits `(batch, vocab_size)`.

        seen: bool `(batch, vocab_size)`, the tokens that came before.
        """
        logits = logits.float()
        if self.repetition_penalty != 1:
            less = torch.where(
                logits > 0, logits / self.repetition_penalty, logits * self.repetition_penalty
            )
            logits = torch.where(seen, less, logits)
        if self.temperature == 0:
            return logits.argmax(-1, keepdim=True)
        logits = logits / self.temperature
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probabilities = logits.softmax(-1)
        if self.top_p < 1:
            ordered, places = probabilities.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # of all likelier ones together
            ordered = ordered.masked_fill(before >= self.top_p, 0)
            probabilities = torch.zeros_like(ordered).scatter(-1, places, ordered)
        return torch.multinomial(probabilities, 1, generator=generator)
