"""launch/README.md tells of every file there, and all scripts are such."""

import os
import re
import subprocess

from ranks import ROOT

LAUNCH = ROOT / "launch"


def test_it_names_each_file_and_no_other():
    linked = set(re.findall(r"\]\(([\w.]+)\)", (LAUNCH / "README.md").read_text()))
    files = {path.name for path in LAUNCH.iterdir() if path.is_file()} - {"README.md"}
    assert linked == files


def test_scripts_are_bash():
    for name in ("torchrun.sh", "slurm.sbatch"):
        subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    assert os.access(LAUNCH / "torchrun.sh", os.X_OK)
