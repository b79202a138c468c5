"""Results of a sweep as columns of numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]

_TEXT = ("family", "size", "trunk")


class ScalingError(ValueError):
    """The points cannot support what was asked; the message is one line that says what is missing.

    A `ValueError`, so that a caller who knows nothing of this package can still catch it.
    """


@dataclass(frozen=True, eq=False)
class Points:
    """Training results, one array of shape (points,) a column.

    family, size: str, the architecture and the name of the model size.
    trunk: str, the run a result was cooled down from; results of one trunk share its noise.
    seed: int. lr: the peak learning rate.
    budget: nominal training FLOPs of the grid, equal for the points of one isoFLOP curve.
    params, params_without_embeddings: learned numbers.
    forward_flops, forward_flops_without_logits: FLOPs of a forward pass, a token.
    training_flops, training_flops_without_logits: FLOPs of the whole run, forward and backward.
    tokens: tokens trained on. loss: validation loss, nats a token.
    device_seconds: seconds × devices of the whole run; NaN where it was not measured.

    Raises ScalingError for columns of different lengths.
    """

    family: NDArray[np.str_]
    size: NDArray[np.str_]
    trunk: NDArray[np.str_]
    seed: NDArray[np.int64]
    lr: Array
    budget: Array
    params: Array
    params_without_embeddings: Array
    forward_flops: Array
    forward_flops_without_logits: Array
    training_flops: Array
    training_flops_without_logits: Array
    tokens: Array
    loss: Array
    device_seconds: Array

    def __post_init__(self) -> None:
        shapes = {np.shape(getattr(self, name)) for name in _NAMES}
        if len(shapes) != 1 or len(shapes.pop()) != 1:
            raise ScalingError("the columns of the points are not 1-D arrays of one length")

    @classmethod
    def from_rows(cls, rows: Iterable[Mapping[str, Any]]) -> Points:
        """Points from one mapping a result, numbers or their text (as `csv.DictReader` gives).

        `device_seconds` may be absent; an empty or None number is NaN. Other keys are ignored.
        Raises ScalingError for an absent column or a text that is not a number.
        """
        table = list(rows)
        return cls(**{name: _column(table, name) for name in _NAMES})

    def __len__(self) -> int:
        return len(self.loss)

    def __getitem__(self, index: ArrayLike) -> Points:
        """The points of a boolean mask, a slice, or an array of indices."""
        chosen = index if isinstance(index, slice) else np.asarray(index)
        return Points(**{name: getattr(self, name)[chosen] for name in _NAMES})

    @property
    def families(self) -> tuple[str, ...]:
        """The families, in order of appearance."""
        return tuple(dict.fromkeys(self.family.tolist()))

    def rows(self) -> list[dict[str, Any]]:
        """One dict of plain values a point; `from_rows` is its inverse."""
        columns = [getattr(self, name).tolist() for name in _NAMES]
        return [dict(zip(_NAMES, row, strict=True)) for row in zip(*columns, strict=True)]


_NAMES = tuple(field.name for field in fields(Points))


def _column(table: list[Mapping[str, Any]], name: str) -> NDArray[Any]:
    """One column of a table, as text, integers or floats according to its name."""
    values: list[Any] = []
    for number, row in enumerate(table):
        if name not in row and name != "device_seconds":
            raise ScalingError(f"row {number} of the points has no column {name!r}")
        value = row.get(name)
        try:
            if name in _TEXT:
                values.append(str(value))
            elif name == "seed":
                values.append(int(row[name]))
            else:
                values.append(np.nan if value is None or value == "" else float(value))
        except (TypeError, ValueError):
            raise ScalingError(
                f"row {number} of the points: {name} is {value!r}, not a number"
            ) from None
    kind = np.str_ if name in _TEXT else np.int64 if name == "seed" else np.float64
    return np.array(values, dtype=kind)


def usable(points: Points) -> tuple[Points, list[str]]:
    """The points with a finite loss, and one line of text for each that was left out."""
    finite = np.isfinite(points.loss)
    left_out = points[~finite]
    lines = [
        f"{p['family']} {p['size']}, budget {p['budget']:.3g}, lr {p['lr']:.3g}, seed {p['seed']}: "
        f"left out, its loss is {p['loss']}"
        for p in left_out.rows()
    ]
    return points[finite], lines


def best_learning_rates(points: Points) -> Points:
    """For each (family, size, budget) only the learning rate with the lowest mean loss over seeds.

    Order is kept. Of equal means the smaller learning rate wins. Expects finite losses (`usable`).
    """
    losses: dict[tuple[Any, ...], dict[float, list[float]]] = {}
    for cell, lr, loss in zip(cells(points), points.lr.tolist(), points.loss, strict=True):
        losses.setdefault(cell, {}).setdefault(lr, []).append(float(loss))
    best = {
        cell: min(sorted(rates), key=lambda lr: float(np.mean(rates[lr])))
        for cell, rates in losses.items()
    }
    kept = [lr == best[cell] for cell, lr in zip(cells(points), points.lr.tolist(), strict=True)]
    return points[np.array(kept, dtype=bool)]


def cells(points: Points) -> list[tuple[str, str, float]]:
    """(family, size, budget) of each point: what differs within one is seed and learning rate."""
    return list(
        zip(points.family.tolist(), points.size.tolist(), points.budget.tolist(), strict=True)
    )


def seed_spread(mine: Points) -> float:
    """Standard deviation of loss over seeds, nats, pooled over the (size, budget) with several.

    NaN where none has several.
    """
    losses: dict[tuple[str, str, float], list[float]] = {}
    for cell, loss in zip(cells(mine), mine.loss.tolist(), strict=True):
        losses.setdefault(cell, []).append(loss)
    several = [group for group in losses.values() if len(group) > 1]
    if not several:
        return float("nan")
    squares = sum(len(group) * float(np.var(group)) for group in several)
    return math.sqrt(squares / sum(len(group) - 1 for group in several))
