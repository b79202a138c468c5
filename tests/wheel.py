"""The wheel as it is installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from ranks import ROOT


def install(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make the wheel, and a folder into which it is installed and nothing else."""
    wheels, site = tmp_path_factory.mktemp("wheels"), tmp_path_factory.mktemp("site")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "--wheel-dir", wheels, ROOT], check=True)
    [wheel] = wheels.glob("*.whl")
    with zipfile.ZipFile(wheel) as content:
        [top] = [name for name in content.namelist() if name.endswith("top_level.txt")]
        assert content.read(top).decode().split() == ["sparse_gpt"]
    subprocess.run([*pip, "install", "--no-deps", "--target", site, wheel], check=True)
    return site
