"""Held-out loss of a trained model, by data set."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from sparse_gpt.data import Batch, Dataset, Split, open_shards
from sparse_gpt.data.batches.batches import IGNORED, count_windows
from sparse_gpt.errors import ConfigError, DataError
from sparse_gpt.evaluate.checkpoint import Trained, on_devices
from sparse_gpt.model.gpt import GPT
from sparse_gpt.progress import Progress
from sparse_gpt.train.engine import summed_loss
from sparse_gpt.train.feed import held_out_of, open_data


@dataclass(frozen=True)
class HeldOutLoss:
    """What a model loses on a held-out split.

    loss: nats a token. tokens: that were predicted. bytes: of the text that they are, end of text
    being none; None where the vocabulary is not at hand.
    """

    checkpoint: str
    data: str
    loss: float
    tokens: int
    bytes: int | None

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float | None:
        """Comparable over vocabularies."""
        return self.bytes and self.loss * self.tokens / math.log(2) / self.bytes

    @property
    def scores(self) -> dict[str, float]:
        """By the names of the metrics."""
        found = {"loss": self.loss, "perplexity": self.perplexity}
        bits = self.bits_per_byte
        return found if bits is None else {**found, "bits_per_byte": bits}


def evaluate(
    trained: Trained,
    folders: Sequence[str] = (),
    max_tokens: int | None = None,
    progress: bool = True,
    devices: Sequence[torch.device] = (),
) -> list[HeldOutLoss]:
    """The loss on the held-out split of each folder of shards; of none, of the run's own sources.

    Of those with the run's `eval.max_tokens` unless `max_tokens` is given: the numbers are those
    of the run's record. `devices` share the work, the model's first; by default all GPUs.

    Raises DataError where `open_shards` does, and for a data set of another vocabulary than the
    run's or without a held-out split; ConfigError where the run's own data cannot be opened.
    """
    vocab_hash = trained.provenance.get("vocab_hash")
    if folders:
        sources = {folder: open_shards(folder) for folder in folders}
    else:
        sources = _own_sources(trained)
        max_tokens = max_tokens or trained.config.eval.max_tokens
    for folder, dataset in sources.items():
        if dataset.manifest.tokenizer["vocab_hash"] != vocab_hash:
            raise DataError(
                f"{folder}: has another vocabulary than {trained.run} was trained in; prepare it "
                "with that one"
            )
        count_windows(dataset.held_out, trained.config.model.max_seq_len)
    try:
        lengths = torch.from_numpy(trained.tokenizer.lengths)
    except DataError:
        lengths = None
    models = on_devices(trained.model, devices)
    return [
        _loss(trained, models, folder, dataset.held_out, lengths, max_tokens, progress)
        for folder, dataset in sources.items()
    ]


def _own_sources(trained: Trained) -> dict[str, Dataset]:
    try:
        sources = open_data(trained.config.data).sources
    except DataError as error:
        raise ConfigError(f"the data of {trained.run}: {error}; name others with --data") from None
    return {s.folder: s.dataset for s in sources if s.dataset.held_out.n_tokens} or {
        s.folder: s.dataset for s in sources
    }


def _loss(
    trained: Trained,
    models: list[GPT],
    folder: str,
    split: Split,
    lengths: Tensor | None,
    max_tokens: int | None,
    progress: bool,
) -> HeldOutLoss:
    """Of all models together, which are one on several devices: a thread and a share for each."""
    config, world = trained.config, len(models)
    seq_len = config.model.max_seq_len
    windows = count_windows(split, seq_len)
    if max_tokens is not None:
        windows = min(windows, max(1, max_tokens // seq_len))
    done, counted = [0] * world, [0] * world

    def share(rank: int) -> list[float]:
        def batches() -> Iterator[Batch]:
            for batch in held_out_of(config, split, max_tokens, world, rank):
                targets = batch.targets[batch.targets != IGNORED]
                if lengths is not None:
                    counted[rank] += int(lengths[targets].sum())
                yield batch
                done[rank] += len(targets)
                bar.at(sum(done))

        model = models[rank]
        found: list[float] = summed_loss(model, batches(), model.wte.weight.device).tolist()
        return found

    with (
        Progress(f"{trained.name} on {folder}", windows * seq_len, progress, False) as bar,
        ThreadPoolExecutor(world) as pool,
    ):
        loss, tokens = map(sum, zip(*pool.map(share, range(world)), strict=True))
    return HeldOutLoss(
        checkpoint=trained.name,
        data=folder,
        loss=loss / tokens,
        tokens=int(tokens),
        bytes=None if lengths is None else sum(counted),
    )


def evaluation_table(found: Sequence[HeldOutLoss]) -> Table:
    """A row for each checkpoint and data set."""
    table = Table("checkpoint", "held-out split of", box=None)
    for column in ("tokens", "loss", "perplexity", "bits a byte"):
        table.add_column(column, justify="right")
    for one in found:
        bits = one.bits_per_byte
        table.add_row(
            one.checkpoint,
            one.data,
            f"{one.tokens:,}",
            f"{one.loss:.4f}",
            f"{one.perplexity:.4g}",
            "" if bits is None else f"{bits:.4f}",
        )
    return table


def evaluation_json(found: Sequence[HeldOutLoss]) -> list[dict[str, Any]]:
    """As `--json` prints it."""
    return [
        {**asdict(one), "perplexity": one.perplexity, "bits_per_byte": one.bits_per_byte}
        for one in found
    ]
