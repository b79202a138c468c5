"""What was measured of a run's checkpoints, kept in the run.

evaluations/step-00000100.json   scores by name, each with where and when it was measured
evaluations/inspected-step-00000100.json   what `inspect` found
evaluations/tensorboard/         the same as scalars, histograms and tables, drawn anew from all
"""

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.tensorboard import SummaryWriter

from sparse_gpt.errors import ConfigError
from sparse_gpt.evaluate.checkpoint import Trained
from sparse_gpt.evaluate.inspect import Inspection
from sparse_gpt.files import locked, publish_text, replaced_folder, to_json
from sparse_gpt.provenance import provenance
from sparse_gpt.train.checkpoint.manifest import step_of, tag_of


def check_kept(trained: Trained) -> None:
    """Raises ConfigError, before anything is computed, where nothing can be kept in the run."""
    folder = trained.run / "evaluations"
    if not os.access(folder if folder.exists() else trained.run, os.W_OK | os.X_OK):
        raise ConfigError(f"{folder}: cannot be written; copy the run to where you may write")


def record(trained: Trained, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Add {task or data set: {metric: value}} of a checkpoint; what was there of them goes.

    Raises ConfigError where the run cannot be written.
    """
    with _to_draw(trained) as folder:
        path = folder / f"{tag_of(trained.step)}.json"
        before = json.loads(path.read_text()) if path.exists() else {}
        now = provenance(trained.device)
        own = {name: {"scores": dict(one), "provenance": now} for name, one in scores.items()}
        publish_text(path, to_json({**before, **own}) + "\n")


def record_inspection(trained: Trained, found: Inspection) -> None:
    """Keep what a checkpoint's blocks do. Raises ConfigError where the run cannot be written."""
    with _to_draw(trained) as folder:
        path = folder / f"inspected-{tag_of(trained.step)}.json"
        publish_text(path, to_json(asdict(found)) + "\n")


@contextmanager
def _to_draw(trained: Trained) -> Iterator[Path]:
    """The folder of evaluations, for this process alone; drawn anew at the end."""
    folder = trained.run / "evaluations"
    try:
        folder.mkdir(exist_ok=True)
        with locked(folder / ".lock", wait=True):
            yield folder
            _draw(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None


def _draw(folder: Path) -> None:
    with replaced_folder(folder / "tensorboard") as aside:
        board = SummaryWriter(str(aside))
        for path in sorted(folder.glob("inspected-step-*.json")):
            for layer in json.loads(path.read_text())["layers"]:
                _draw_layer(board, layer, step_of(path.stem.removeprefix("inspected-")))
        for path in sorted(folder.glob("step-*.json")):
            found: dict[str, Any] = json.loads(path.read_text())
            for name, one in found.items():
                for metric, value in one["scores"].items():
                    if value is None:  # it was no finite number
                        continue
                    tag = re.sub(r"[^\w/.-]+", "_", f"eval/{name}/{metric}")
                    board.add_scalar(tag, value, step_of(path.stem))
        board.close()


def _draw_layer(board: SummaryWriter, layer: dict[str, Any], step: int) -> None:
    """The sizes of a sparse FFN's parts, the spread of its blocks' loads, and a table of them."""
    name = f"inspect/layer_{layer['number']:02d}"
    for part, size in {"branch": layer["branch"], **layer["parts"]}.items():
        board.add_scalar(f"{name}/{part}", size, step)
    if not layer["blocks"]:
        return
    board.add_histogram(f"{name}/load", np.array([b["load"] for b in layer["blocks"]]), step)
    rows = [
        f"| {b['number']} | {b['load']:.2f} | {_words(b['tokens'])} | {_words(b['writes'])} |"
        for b in layer["blocks"]
    ]
    head = ["| block | load | tokens | writes |", "|---:|---:|---|---|"]
    board.add_text(f"{name}/blocks", "\n".join([*head, *rows]), step)


def _words(found: list[list[Any]]) -> str:
    """Tokens as code in a table of Markdown."""
    texts = (repr(text)[1:-1].replace("`", "'").replace("|", "\\|") for text, *_ in found)
    return " ".join(f"`{text}`" for text in texts)
