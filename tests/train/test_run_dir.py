import subprocess
import sys

import pytest
from ranks import ROOT

from sparse_gpt.errors import ConfigError
from sparse_gpt.train.run_dir import held, hold


def test_a_held_run_is_refused_until_its_process_ends(tmp_path):
    run_dir = tmp_path / "run"
    assert not held(run_dir)
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, pathlib; from sparse_gpt.train.run_dir import hold; "
            "hold(pathlib.Path(sys.argv[1])); print('held', flush=True); sys.stdin.read()",
            str(run_dir),
        ],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert holder.stdout.readline() == b"held\n"
    assert held(run_dir)
    with pytest.raises(ConfigError, match="another process trains this run"):
        hold(run_dir)
    holder.kill()
    holder.wait()
    assert not held(run_dir)
