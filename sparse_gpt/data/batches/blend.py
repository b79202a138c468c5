"""Several data sets read as one, each with a fixed share of the samples.

order.py deals the samples out. A source's own order is keyed by the hash of its training tokens,
and the sources are sorted by it, so that neither where the folders are nor the order in which they
are given matters, and a source keeps its permutations when others join or leave.
"""

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np

from sparse_gpt.data.batches import order
from sparse_gpt.data.shards.manifest import Manifest
from sparse_gpt.data.shards.reader import Dataset, open_shards
from sparse_gpt.errors import DataError


@dataclass(frozen=True)
class Source:
    """One data set of a blend."""

    folder: str  # as it was given
    name: str  # the last part of it, or as many as tell it from the others
    dataset: Dataset
    quota: int  # its samples in each cycle of the blend's
    key: int  # of its order


@dataclass(frozen=True)
class Blend:
    """What `Batches` takes in place of one split: the training splits of its sources.

    hash  names what is read: of the sources' manifests and quotas
    """

    sources: tuple[Source, ...]
    hash: str

    @classmethod
    def of_one(cls, dataset: Dataset) -> "Blend":
        """A data set by itself, with its own hash, in the order that `Batches` gives its split."""
        folder = dataset.train.folder
        return cls((Source(str(folder), folder.name, dataset, 1, key=0),), dataset.manifest.hash)

    @property
    def quotas(self) -> order.Int64s:
        """(sources,)"""
        return np.array([source.quota for source in self.sources], np.int64)

    @property
    def vocab_size(self) -> int:
        """Of the vocabulary that the sources share."""
        return int(self.sources[0].dataset.manifest.tokenizer["vocab_size"])

    @property
    def vocab_hash(self) -> str:
        """Of that vocabulary: sha256, hex."""
        return str(self.sources[0].dataset.manifest.tokenizer["vocab_hash"])

    @property
    def epoch_tokens(self) -> int:
        """Tokens of training after which the first source has been read once."""
        length = int(self.quotas.sum())
        return min(s.dataset.train.n_tokens * length // s.quota for s in self.sources)


def open_blend(weights: Mapping[str, float]) -> Blend:
    """Open the folders of shards that `weights` names; a share is a weight over their sum.

    Raises DataError where `open_shards` does, where a weight is not above 0 or too small for one
    sample a cycle, for a data set that is given twice, and for one with another vocabulary or
    another dtype of tokens than the others, which it names.
    """
    if not weights:
        raise DataError("a blend needs at least one folder of shards")
    for folder, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise DataError(f"{folder}: its weight in the blend is {weight}; it must be above 0")
    datasets = {folder: open_shards(folder) for folder in weights}
    _check_alike(datasets, "vocabulary", lambda manifest: str(manifest.tokenizer["vocab_hash"]))
    _check_alike(datasets, "dtype of tokens", lambda manifest: manifest.dtype)
    folders = sorted(datasets, key=lambda folder: datasets[folder].train.hash)
    for folder, other in zip(folders[1:], folders, strict=False):
        if datasets[folder].train.hash == datasets[other].train.hash:
            raise DataError(
                f"{folder}: has the same training tokens as {other}; give one of them, with the "
                "sum of the weights"
            )
    quotas = order.cycle_quotas([weights[folder] for folder in folders]).tolist()
    if 0 in quotas:
        raise DataError(
            f"{folders[quotas.index(0)]}: its weight is under one sample in {sum(quotas):,}; raise "
            "it, or leave it out"
        )
    names = _unique_names(folders)
    keys = {folder: int(datasets[folder].train.hash[:16], 16) for folder in folders}
    sources = tuple(
        Source(folder, names[folder], datasets[folder], quota, keys[folder])
        for folder, quota in zip(folders, quotas, strict=True)
    )
    content = [[source.dataset.manifest.hash, source.quota] for source in sources]
    return Blend(sources, sha256(json.dumps(content).encode()).hexdigest())


def _check_alike(datasets: Mapping[str, Dataset], what: str, of: Callable[[Manifest], str]) -> None:
    found = {folder: of(dataset.manifest) for folder, dataset in datasets.items()}
    [(usual, count)] = Counter(found.values()).most_common(1)
    for folder, value in found.items():
        if value != usual:
            raise DataError(
                f"{folder}: has another {what}: {value[:12]}, where {count} of {len(found)} "
                f"sources have {usual[:12]}; prepare it as those, or leave it out of the blend"
            )


def _unique_names(folders: list[str]) -> dict[str, str]:
    parts = {folder: Path(os.path.abspath(folder)).parts for folder in folders}
    lengths = range(1, max(map(len, parts.values())) + 1)
    tries = ({f: "/".join(whole[-n:]) for f, whole in parts.items()} for n in lengths)
    return next(names for names in tries if len(set(names.values())) == len(folders))
