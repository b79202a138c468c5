"""The wheel, in a folder of somebody's who has a data, a launch and a config of their own."""

import subprocess
import sys

import pytest
import yaml
from ranks import ENVIRONMENT, ROOT, metrics
from wheel import install

FOREIGN = ("config", "data", "errors", "files", "launch", "model", "train")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder into which the wheel is installed, and nothing else."""
    return install(tmp_path_factory)


@pytest.fixture
def run(site, tmp_path):
    """Run a command there, with that folder first on PYTHONPATH; returns what it prints."""
    home = tmp_path / "home"
    for name in FOREIGN:
        (home / name).mkdir(parents=True)
        for path in (home / f"{name}.py", home / name / "__init__.py"):
            path.write_text(f"raise SystemExit('{path} is not ours to import')\n")
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{home}:{site}"}

    def run(*command):
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            env=environment, cwd=home, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def test_a_built_package_finds_its_run_files_by_name(tmp_path):
    """Far from the checkout, whose folder is not on the path."""
    build = [sys.executable, "setup.py", "--quiet", "build_py", "--build-lib", tmp_path / "site"]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    environment = {**ENVIRONMENT, "PYTHONPATH": str(tmp_path / "site")}

    command = [sys.executable, "-m", "sparse_gpt", "config", "show", "tiny-sparse"]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert f"{tmp_path}/site/sparse_gpt/configs/tiny-sparse.yaml:3" in done.stdout, done.stderr
    sweeps = {path.name for path in (tmp_path / "site/sparse_gpt/configs/sweeps").iterdir()}
    assert sweeps == {path.name for path in (ROOT / "configs/sweeps").iterdir()}


@pytest.mark.long
def test_everything_works_beside_names_like_ours(site, run, run_file, tmp_path):
    where = "import sparse_gpt, sparse_gpt.data, sparse_gpt.cli.main; print(sparse_gpt.__file__)"
    assert run("-c", where).startswith(str(site))
    novels = sorted((ROOT / "data/novels").glob("*.txt"))
    split = ("--separator", r"\nChapter ", "--held-out", "0.1")
    run("-m", "sparse_gpt", "prepare", *novels, *split, "--out", "shards", "--workers", "2")
    assert "train" in run("-m", "sparse_gpt", "shards", "info", "shards")

    assert "tiny-sparse" in run("-m", "sparse_gpt", "config", "show", "tiny-sparse")
    runs = {name: f"run_dir={tmp_path / name}" for name in ("cli", "deepspeed", "torchrun")}
    rank = ("sparse_gpt.train", "--config", run_file)
    run("-m", "sparse_gpt", "train", run_file, "--devices", "2", runs["cli"])
    launcher = ("-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--module")
    run(*launcher, *rank, runs["deepspeed"])
    run("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", *rank, runs["torchrun"])
    losses = [[row.get("train/loss") for row in metrics(tmp_path / name)] for name in runs]
    assert losses[0] == losses[1] == losses[2]

    run("-m", "sparse_gpt", "prove-resume", run_file, "--steps", "3", "--out", "proof")
    tree = yaml.safe_load(run_file.read_text())
    shared = {key: tree[key] for key in tree if key not in ("run_dir", "duration", "optimizer")}
    sweep = {
        "run": {**shared, "optimizer": {"width_transfer": True}},
        "families": {name: {"model.ffn": name} for name in ("default", "paper")},
        "baseline": "default",
        "sizes": {"d32": {"model.d_model": 32}},
        "budgets": [1e9],
        "lr": [3e-3],
    }
    (tmp_path / "two.yaml").write_text(yaml.safe_dump(sweep))
    run("-m", "sparse_gpt", "sweep", "run", tmp_path / "two.yaml", "--jobs", "2")
    assert "2 done" in run("-m", "sparse_gpt", "sweep", "status", tmp_path / "two.yaml")
