"""The block at a run's start, and what it says at its end."""

import shlex
from dataclasses import dataclass

import pytest
import torch
from ranks import sparse_gpt

from sparse_gpt.config.load import load_config
from sparse_gpt.model.costs import model_report
from sparse_gpt.train.announce import beginning, ending


@dataclass
class Alone:
    size: int
    device: torch.device


def rows(folder, *lines):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))


def test_a_start_says_what_it_is_and_a_resume_where_it_goes_on(run_file, capsys):
    run = load_config(run_file)
    beginning(run, Alone(1, torch.device("cpu")), model_report(run.model), 0)
    said = capsys.readouterr().out
    assert f"{run.run_dir}: from the beginning" in said
    assert "of them active for a token" in said
    assert "1 rank, cpu, fp32" in said
    assert "16 steps of 512 tokens, 8,192 tokens" in said
    assert "(ETA) is in each line" in said
    rows(run_file.parent / "run", '{"step": 4, "perf/step_ms": 500}')
    beginning(run, Alone(1, torch.device("cpu")), model_report(run.model), 4)
    said = capsys.readouterr().out
    assert "resuming from step 4 of 16" in said
    assert "about 6 seconds left" in said


def test_epochs_are_said_with_the_steps_they_are(run_file, capsys):
    run = load_config(run_file, ["duration={epochs: 1.5}"])
    beginning(run, Alone(1, torch.device("cpu")), model_report(run.model), 0)
    said = capsys.readouterr().out
    assert f"{run.total_steps:,} steps of 512 tokens" in said
    assert "tokens, 1.5 times the data\n" in said


def test_an_end_names_best_and_last_loss(run_file, tmp_path, capsys):
    run = load_config(run_file)
    assert ending(run, tmp_path / "none") is None
    rows(tmp_path / "run", *(f'{{"step": {s}, "val/loss": {v}}}' for s, v in ((8, 3), (16, 4))))
    assert ending(run, tmp_path / "run") == 4.0
    assert "validation loss 4.0000, best 3.0000 at step 8" in capsys.readouterr().out


def test_an_end_in_nan_is_not_said_to_be_done(run_file, tmp_path, capsys):
    rows(tmp_path / "run", '{"step": 16, "val/loss": null}')
    assert str(ending(load_config(run_file), tmp_path / "run")) == "nan"
    assert capsys.readouterr().out == ""


@pytest.mark.long
def test_the_commands_at_the_end_work_as_they_stand(run_file):
    done = sparse_gpt("train", run_file)
    assert done.returncode == 0, done.stderr
    lines = [line.split("next ")[-1].strip() for line in done.stdout.splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("sparse-gpt")]
    assert [words[1] for words in commands] == ["generate", "evaluate", "compare"]
    for words in commands:
        after = sparse_gpt(*words[1:])
        assert after.returncode == 0, after.stderr
