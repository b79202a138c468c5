"""`sparse-gpt init`: the file that it writes trains as it is, and nobody's file is replaced."""

import os
import pty
import sys

import pytest
import yaml

from sparse_gpt.config.load import load_config
from sparse_gpt.plan.plan import make_plan
from sparse_gpt.plan.starter import SIZES


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("devices", [1, 3])
def test_each_size_is_a_run_without_warnings(command, tmp_path, size, devices):
    file = tmp_path / "new.yaml"
    done = command("init", file, "--data", "shards/none", "--size", size, "--devices", devices)
    assert done.returncode == 0, done.stderr
    run = load_config(file)
    assert run.model.vocab_size == 50257
    assert run.grad_accum(devices) > 0
    assert make_plan(run, devices).warnings == []
    assert f"sparse-gpt train {file} --devices {devices}" in done.stdout
    assert "sparse-gpt prepare YOUR_TEXT --out shards/none" in done.stdout
    assert "\t" not in file.read_text()


def test_shards_give_the_vocabulary_and_the_length(command, tmp_path, shards):
    done = command("init", tmp_path / "new.yaml", "--data", shards, "--size", "d48")
    assert "prepare" not in done.stdout
    run = load_config(tmp_path / "new.yaml")
    assert run.model.vocab_size == 1024
    assert run.optimizer.lr == 4e-3
    assert run.optimizer.width_transfer
    assert "4 times the data's" in (tmp_path / "new.yaml").read_text()


def test_a_budget_has_its_size(command, tmp_path, shards):
    for budget, width in (("2e12", 48), ("3.2e13", 96)):  # as in docs/scaling.md
        file = tmp_path / f"{width}.yaml"
        command("init", file, "--data", shards, "--budget", budget)
        run = load_config(file)
        assert (run.model.d_model, run.duration.flops) == (width, float(budget))


def test_text_is_to_be_prepared(command, tmp_path):
    (tmp_path / "my books").mkdir()
    done = command("init", tmp_path / "new.yaml", "--data", tmp_path / "my books")
    assert f"sparse-gpt prepare '{tmp_path}/my books' --out 'shards/my books'" in done.stdout
    assert yaml.safe_load((tmp_path / "new.yaml").read_text())["data"]["path"] == "shards/my books"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--size", "d49", "--data", "x"], "--size d49: known are d32"),
        (["--budget", "-1", "--data", "x"], "--budget -1: give training FLOPs"),
        (["--budget", "inf", "--data", "x"], "--budget inf: give training FLOPs"),
        ([], "--data is missing"),
    ],
)
def test_what_cannot_be_is_one_line_and_no_file(refused, tmp_path, options, message):
    assert message in refused("init", tmp_path / "new.yaml", *options)
    assert not (tmp_path / "new.yaml").exists()


def test_a_file_that_is_there_stays(refused, tmp_path):
    (tmp_path / "mine.yaml").write_text("mine")
    assert "is there already" in refused("init", tmp_path / "mine.yaml", "--data", "x")
    (tmp_path / "link.yaml").symlink_to("nowhere")
    assert "is there already" in refused("init", tmp_path / "link.yaml", "--data", "x")
    assert (tmp_path / "mine.yaml").read_text() == "mine"


def test_on_a_terminal_it_asks(tmp_path):
    child, terminal = pty.fork()
    if child == 0:
        words = [sys.executable, "-m", "sparse_gpt", "init", str(tmp_path / "asked.yaml")]
        os.execv(sys.executable, words)
    for question, answer in (("Data", "shards/x"), ("Size", "d32"), ("Devices", "2"), ("FLOP", "")):
        said = b""
        while question.encode() not in said or b"]: " not in said:
            said += os.read(terminal, 1000)
        os.write(terminal, f"{answer}\n".encode())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    os.close(terminal)
    run = load_config(tmp_path / "asked.yaml")
    assert (run.data.path, run.model.d_model, run.batch.micro_batch) == ("shards/x", 32, 8)
