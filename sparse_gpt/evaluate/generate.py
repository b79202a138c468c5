"""Text that a trained model continues prompts with, as it comes."""

import codecs
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from sparse_gpt.data import Tokenizer
from sparse_gpt.errors import ConfigError
from sparse_gpt.evaluate.checkpoint import Trained
from sparse_gpt.model.sampling import Sampling

Finish = Literal["stop", "end of text", "length"]


@dataclass(frozen=True)
class Continuation:
    """What a model wrote after a prompt.

    finish: why it ends: a stop string, which is not in the text, the model's end of text, or
    max_new_tokens. tokens: that it took.
    """

    prompt: str
    text: str
    tokens: int
    finish: Finish


class TextStream:
    """Token by token to text, of whole characters, up to the first of some stop strings.

    What may yet turn out to be the beginning of one is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        self.finish: Finish | None = None
        self.tokens = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def feed(self, token: int) -> str:
        """The text that is certain now, of those before and this token; "" once it has finished."""
        if self.finish:
            return ""
        self.tokens += 1
        if token == self.tokenizer.eot:
            self.finish = "end of text"
            return self._take(final=True)
        return self._take(self.tokenizer.decode_bytes([token]))

    def end(self) -> str:
        """No token follows: what was held back."""
        if self.finish:
            return ""
        text = self._take(final=True)
        self.finish = self.finish or "length"
        return text

    def _take(self, content: bytes = b"", final: bool = False) -> str:
        text = self._held + self._decoder.decode(content, final)
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.finish, self._held = "stop", ""
            return text[: min(found)]
        held = 0
        if not final:
            lengths = range(1, max(map(len, self.stop), default=0))
            held = max((n for n in lengths if text.endswith(self._heads(n))), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def _heads(self, length: int) -> tuple[str, ...]:
        return tuple(stop[:length] for stop in self.stop if len(stop) > length)


def generate(
    trained: Trained,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    stop: Sequence[str] = (),
    seed: int | None = None,
    tell: Callable[[str], None] | None = None,
) -> list[Continuation]:
    """Continue each prompt as the beginning of a document, all in one batch.

    seed: the same text for the same one; None: another each time. tell: is given the text of a
    single prompt as it comes. Raises ConfigError for a prompt that exceeds the context, naming it,
    and DataError where the vocabulary is not at hand.
    """
    tokenizer, context = trained.tokenizer, trained.config.model.max_seq_len
    ids = [[tokenizer.eot, *tokenizer.encode(prompt).tolist()] for prompt in prompts]
    for prompt, row in zip(prompts, ids, strict=True):
        if len(row) > context:
            raise ConfigError(
                f"the prompt {prompt[:30]!r}… is {len(row):,} tokens with the one that opens a "
                f"document, the context of {trained.run} {context:,}; shorten it"
            )
    longest = max(map(len, ids))
    tokens = torch.tensor([[tokenizer.eot] * (longest - len(row)) + row for row in ids])
    lengths = torch.tensor([len(row) for row in ids])
    generator = torch.Generator(trained.device)
    generator.manual_seed(torch.seed() if seed is None else seed)
    streams = [TextStream(tokenizer, stop) for _ in prompts]
    texts = [""] * len(prompts)
    for step in trained.model.stream(
        tokens.to(trained.device),
        max_new_tokens,
        sampling,
        lengths=None if int(lengths.min()) == longest else lengths.to(trained.device),
        generator=generator,
    ):
        for number, token in enumerate(step[:, 0].tolist()):
            piece = streams[number].feed(token)
            texts[number] += piece
            if tell and piece:
                tell(piece)
        if all(stream.finish for stream in streams):
            break
    found = []
    for prompt, stream, text in zip(prompts, streams, texts, strict=True):
        rest = stream.end()
        if tell and rest:
            tell(rest)
        assert stream.finish
        found.append(Continuation(prompt, text + rest, stream.tokens, stream.finish))
    return found
