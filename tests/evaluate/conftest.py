"""A run of 4 steps, with checkpoints after 2 and 4."""

from collections.abc import Callable
from pathlib import Path

import pytest
from one_rank import train_here, world  # noqa: F401 - fixtures


@pytest.fixture
def run(train_here: Callable[..., None], tmp_path: Path) -> Path:  # noqa: F811
    train_here("duration.steps=4", "checkpoint.every=2", "eval.every=2")
    return tmp_path / "run"
