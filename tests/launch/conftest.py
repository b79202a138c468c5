"""What the tests of launch/ share: a run to stop in its midst, in a shell as users have."""

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from ranks import ENVIRONMENT, ROOT

from sparse_gpt.train.metrics_file import read_metrics

Wait = Callable[["subprocess.Popen[str]", Path], None]


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The environment of a shell in which sparse-gpt is installed, on a machine without a GPU."""
    python = Path(sys.executable).parent
    own = {"PATH": f"{python}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    return {name: value for name, value in (ENVIRONMENT | own).items() if name != "DS_ACCELERATOR"}


@pytest.fixture
def long_run_file(run_file: Path) -> Path:
    """`run_file` with 60 steps, some seconds."""
    run = yaml.safe_load(run_file.read_text())
    run_file.write_text(yaml.safe_dump(run | {"duration": {"steps": 60}}))
    return run_file


@pytest.fixture
def wait_for_steps() -> Wait:
    """Waits until a run that a process runs has done a few steps."""

    def wait(process: "subprocess.Popen[str]", run_dir: Path) -> None:
        while sum("train/loss" in row for row in read_metrics(run_dir)) < 3:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)

    return wait
