import json
import subprocess
import sys
from importlib.metadata import version

import pytest
from ranks import ROOT, sparse_gpt

from sparse_gpt.config.load import load_config
from sparse_gpt.config.reference import run_schema


def test_show_prints_a_run_file_that_says_where_its_values_are_from(tmp_path):
    arguments = ("config", "show", "configs/tiny-sparse.yaml", "optimizer.lr=1e-3")
    done = sparse_gpt(*arguments)
    assert done.returncode == 0, done.stderr
    lines = dict(line.split("  # ") for line in done.stdout.splitlines() if "#" in line)
    origins = {line.strip(): origin for line, origin in lines.items()}
    assert origins["lr: 0.001"] == "override"
    assert origins["micro_batch: 4"] == "configs/tiny-dense.yaml:4"
    assert origins["blocks: 64"] == "preset default (configs/tiny-sparse.yaml:3)"
    assert origins["seed: 0"] == "default"
    (tmp_path / "shown.yaml").write_text(done.stdout)
    shown = load_config(tmp_path / "shown.yaml")
    assert shown == load_config(ROOT / "configs/tiny-sparse.yaml", ["optimizer.lr=1e-3"])

    found = json.loads(sparse_gpt(*arguments, "--json").stdout)
    assert found["optimizer.lr"] == {"value": 1e-3, "from": "override"}
    assert found["batch.micro_batch"] == {"value": 4, "from": "configs/tiny-dense.yaml:4"}
    assert len(found) == sum(" # " in line for line in done.stdout.splitlines())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: {preset: tiny", "run.yaml:1: is not YAML"),
        (f"base: {ROOT}/configs/tiny-dense.yaml\nbatsh: {{}}", "batsh: unknown key; did you mean"),
        ("base: run.yaml", "inherits from itself"),
        (None, "No such file"),
    ],
)
def test_show_refuses_a_bad_file_in_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "run.yaml").write_text(text)
    done = sparse_gpt("config", "show", tmp_path / "run.yaml")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_schema_prints_the_schema():
    done = sparse_gpt("config", "schema")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == run_schema()


def test_version():
    done = sparse_gpt("--version")
    assert (done.returncode, done.stdout) == (0, f"sparse-gpt {version('sparse-gpt')}\n")


@pytest.mark.parametrize(
    "arguments",
    [["--version"], ["config", "schema"], ["config", "show", "configs/tiny-sparse.yaml"]],
    ids=lambda arguments: " ".join(arguments[:2]),
)
def test_what_only_reads_and_prints_does_without_torch(arguments):
    code = (
        "import sys\nfrom sparse_gpt.cli.main import main\n"
        f"sys.argv = ['sparse-gpt', *{arguments!r}]\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "False\n")
