"""What was measured of a run's checkpoints, kept in the run.

evaluations/step-00000100.json   scores by name, each with where and when it was measured
evaluations/tensorboard/         the same as scalars, drawn anew from all of them
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sparse_gpt.errors import ConfigError
from sparse_gpt.evaluate.checkpoint import Trained
from sparse_gpt.files import locked, publish_text, replaced_folder
from sparse_gpt.provenance import provenance
from sparse_gpt.train.checkpoint.manifest import step_of, tag_of


def record(trained: Trained, scores: Mapping[str, Mapping[str, float]]) -> None:
    """Add {task or data set: {metric: value}} of a checkpoint; what was there of them goes.

    Raises ConfigError where the run cannot be written.
    """
    folder = trained.run / "evaluations"
    try:
        folder.mkdir(exist_ok=True)
        with locked(folder / ".lock", wait=True):
            path = folder / f"{tag_of(trained.step)}.json"
            before = json.loads(path.read_text()) if path.exists() else {}
            now = provenance(trained.device)
            own = {name: {"scores": dict(one), "provenance": now} for name, one in scores.items()}
            publish_text(path, json.dumps({**before, **own}, indent=1) + "\n")
            _draw(folder)
    except OSError as error:
        raise ConfigError(f"{folder}: cannot be written: {error.strerror}") from None


def _draw(folder: Path) -> None:
    with replaced_folder(folder / "tensorboard") as aside:
        board = SummaryWriter(str(aside))
        for path in sorted(folder.glob("step-*.json")):
            found: dict[str, Any] = json.loads(path.read_text())
            for name, one in found.items():
                for metric, value in one["scores"].items():
                    tag = re.sub(r"[^\w/.-]+", "_", f"eval/{name}/{metric}")
                    board.add_scalar(tag, value, step_of(path.stem))
        board.close()
