"""What a folder of shards holds, in numbers: how long its documents are, of how many bytes a token
is, and how many documents are held out although their text is trained on. Counted over the memory
maps, whole pieces of them at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from sparse_gpt.data.shards.reader import Dataset, Split, open_shards
from sparse_gpt.data.tokenizer import tokenizer_beside
from sparse_gpt.errors import DataError
from sparse_gpt.files import new_file
from sparse_gpt.progress import Progress

PERCENTILES = (1, 5, 25, 50, 75, 95, 99)
_PIECE = 1 << 22  # tokens counted at a time
_STYLES = (("#1a1a1a", "-"), ("#e07b00", "--"))


@dataclass(frozen=True)
class SplitStats:
    """One split.

    name     "train" or "held_out"           tokens  all, those of end of text included
    bytes    of text                         ids     how many of the vocabulary's occur
    lengths  tokens of each document, uint32, `(documents,)`, without the end of text before it
    """

    name: str
    tokens: int
    bytes: int
    ids: int
    lengths: npt.NDArray[np.uint32]

    @property
    def bytes_per_token(self) -> float | None:
        """Of tokens of text; None where there are none."""
        of_text = self.tokens - len(self.lengths)
        return self.bytes / of_text if of_text else None

    def length(self) -> dict[str, float]:
        """Mean, extremes and percentiles of the documents' lengths; {} where there are none."""
        if not len(self.lengths):
            return {}
        found = np.percentile(self.lengths, (0, *PERCENTILES, 100))
        names = ("min", *(f"p{share}" for share in PERCENTILES), "max")
        return {"mean": float(self.lengths.mean()), **dict(zip(names, found.tolist(), strict=True))}

    def fields(self) -> dict[str, Any]:
        """As JSON holds them."""
        return {
            "documents": len(self.lengths),
            "tokens": self.tokens,
            "bytes": self.bytes,
            "bytes_per_token": self.bytes_per_token,
            "ids": self.ids,
            "length": self.length(),
        }


def statistics(
    folder: str | Path, progress: bool = False
) -> tuple[list[SplitStats], list[dict[str, Any]], int]:
    """Both splits' numbers, the manifest's rows of the sources, and how many held-out documents
    have a text that, but for white space, is trained on too. `progress` draws it on stderr, if that
    is a terminal. Raises DataError if the folder, its vocabulary or a shard is not as it should
    be."""
    dataset = open_shards(folder)
    splits = (dataset.train, dataset.held_out)
    tokenizer = tokenizer_beside(dataset.train.folder, dataset.manifest.tokenizer)
    with Progress("counting", sum(s.n_tokens * s.dtype.itemsize for s in splits), progress) as bar:
        found = [_of_split(split, tokenizer.lengths, bar) for split in splits]
    return found, dataset.manifest.sources, _on_both_sides(dataset)


def _of_split(split: Split, bytes_of: npt.NDArray[np.int64], bar: Progress) -> SplitStats:
    counts = np.zeros(len(bytes_of), np.int64)
    for piece in split.pieces(_PIECE):
        of_piece = np.bincount(piece, minlength=len(counts))
        if len(of_piece) > len(counts):
            raise DataError(
                f"{split.folder}: {split.name} holds the id {len(of_piece) - 1}, of "
                f"{len(counts):,} in the vocabulary; look with shards verify"
            )
        counts += of_piece
        bar.advance(piece.nbytes)
    used = int(np.count_nonzero(counts))
    return SplitStats(split.name, split.n_tokens, int(counts @ bytes_of), used, split.lengths())


def _on_both_sides(dataset: Dataset) -> int:
    held_out = np.concatenate([np.empty(0, np.uint64), *dataset.held_out.hashes()])
    found = np.zeros(len(held_out), np.bool_)
    for trained_on in dataset.train.hashes():
        found |= np.isin(held_out, trained_on)
    return int(np.count_nonzero(found))


def plot_lengths(splits: Sequence[SplitStats], out: Path) -> None:
    """Draw into `out` (.png, .svg or .pdf) how documents and tokens are spread over the documents'
    lengths. Raises DataError without matplotlib, for another suffix, and if it cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise DataError("plots need matplotlib: pip install 'sparse-gpt[plots]'") from None
    if out.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise DataError(f"{out}: a plot is a .png, .svg or .pdf file")
    figure = Figure(figsize=(7.2, 3.6), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    lengths = np.concatenate([np.ones(0, np.uint32), *(split.lengths for split in splits)])
    first, last = (lengths.min(), lengths.max()) if len(lengths) else (1, 1)
    edges = np.geomspace(max(1, first), last + 1, 49)
    panels = figure.subplots(1, 2, sharex=True)
    for axes, what in zip(panels, ("documents", "tokens"), strict=True):
        for split, (color, line) in zip(splits, _STYLES, strict=True):
            if not len(split.lengths):
                continue
            weights = split.lengths if what == "tokens" else None
            found = np.histogram(split.lengths, edges, weights=weights)[0].astype(np.float64)
            axes.stairs(
                found / max(found.sum(), 1), edges, label=split.name, color=color, linestyle=line
            )
        axes.set(xscale="log", xlabel="tokens of the document", ylabel=f"share of {what}")
        axes.grid(alpha=0.2)
        axes.legend(fontsize=8, frameon=False)
    with new_file(out) as aside:
        figure.savefig(aside, format=out.suffix[1:].lower())
