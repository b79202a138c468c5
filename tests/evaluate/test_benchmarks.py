"""Tasks of lm-eval, really run: ours and its own GPT-2 on the export agree on every request."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from one_rank import train_here, world  # noqa: F401 - fixtures
from ranks import ENVIRONMENT, ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytest.importorskip("lm_eval")
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager

from sparse_gpt.evaluate.benchmarks import Adapter
from sparse_gpt.evaluate.checkpoint import load_trained

TASKS = {
    "ours_choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "{{start}}",
        "doc_to_choice": "{{[good, bad]}}",
        "doc_to_target": 0,
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    },
    "ours_word": {
        "output_type": "loglikelihood",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{good}}",
        "metric_list": [{"metric": "perplexity"}, {"metric": "acc"}],
    },
    "ours_text": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{start}}{{good}} {{start}}{{bad}}",
        "metric_list": [{"metric": "bits_per_byte"}, {"metric": "word_perplexity"}],
    },
    "ours_writing": {
        "output_type": "generate_until",
        "doc_to_text": "{{start}}",
        "doc_to_target": "{{good}}",
        "generation_kwargs": {"until": ["\n", "."], "max_gen_toks": 8, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}
DOCUMENTS = [
    {"start": "Anne Elliot was a woman of", "good": " sense", "bad": " xylophones and of trains"},
    {"start": "Sir Walter had", "good": " no son", "bad": " 7"},
    {"start": "She", "good": " was", "bad": " zinc"},
    {"start": "It is a truth that a long sentence " * 4, "good": " ends", "bad": " never"},
]


@pytest.fixture(scope="module")
def local_tasks(tmp_path_factory):
    """A task of each kind on local documents."""
    folder = tmp_path_factory.mktemp("tasks")
    lines = "".join(json.dumps(document) + "\n" for document in DOCUMENTS)
    (folder / "documents.jsonl").write_text(lines)
    files = {"data_files": {"test": str(folder / "documents.jsonl")}}
    for name, task in TASKS.items():
        shared = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": files,
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({**shared, **task}))
    return folder


THEIRS = """
import json, sys
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
path, folder, tasks = sys.argv[1:]
found = simple_evaluate(
    model="hf", model_args={"pretrained": path}, device="cpu", batch_size=1,
    tasks=tasks.split(","), task_manager=TaskManager(include_path=folder, include_defaults=False),
    log_samples=True, bootstrap_iters=0,
)["samples"]
print("FOUND" + json.dumps({t: [one["resps"] for one in found[t]] for t in found}))
"""


def answers_of_theirs(model, tasks):
    done = subprocess.run(
        [sys.executable, "-c", THEIRS, str(model), str(tasks), ",".join(TASKS)],
        env={**ENVIRONMENT, "HF_HUB_OFFLINE": "1"}, capture_output=True, text=True, timeout=300,
        cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND")]
    return json.loads(line.removeprefix("FOUND"))


def answers_of_ours(run, tasks):
    found = simple_evaluate(
        model=Adapter(load_trained(str(run)), 3, devices=[torch.device("cpu")] * 2),
        tasks=list(TASKS),
        task_manager=TaskManager(include_path=tasks, include_defaults=False),
        log_samples=True,
        bootstrap_iters=0,
    )["samples"]
    return json.loads(json.dumps({task: [one["resps"] for one in found[task]] for task in found}))


def test_every_request_is_answered_as_by_lm_evals_own_model(
    command,
    train_here,  # noqa: F811
    local_tasks,
    tmp_path,
):
    train_here("duration.steps=8", "model.ffn=dense")
    run, export = tmp_path / "run", tmp_path / "export"
    assert command("export", str(run), "--out", str(export)).returncode == 0
    ours, theirs = answers_of_ours(run, local_tasks), answers_of_theirs(export, local_tasks)
    assert ours.keys() == theirs.keys() == TASKS.keys()
    for task in TASKS:
        for mine, own in zip(ours[task], theirs[task], strict=True):
            assert _close(mine, own), (task, mine, own)


def _close(a, b):
    if isinstance(a, list):
        return len(a) == len(b) and all(_close(x, y) for x, y in zip(a, b, strict=True))
    return a == pytest.approx(b, abs=1e-4) if isinstance(a, float) else str(a) == str(b)


def test_scores_are_shown_kept_and_drawn(command, run, local_tasks):
    words = ("--tasks", "ours_choice,ours_word", "--include-path", str(local_tasks))
    done = command("evaluate", f"{run}@2", str(run), *words, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["held_out"] == []
    assert found["tasks"].keys() == {f"{run}@2", f"{run}@4"}
    scores = found["tasks"][f"{run}@4"]
    assert 0 <= scores["ours_choice"]["acc"] <= 1
    kept = json.loads((run / "evaluations/step-00000004.json").read_text())
    assert kept["ours_word"]["scores"] == scores["ours_word"]
    assert kept["ours_word"]["provenance"]["versions"]["torch"]
    assert command("evaluate", str(run)).returncode == 0  # joins them
    kept = json.loads((run / "evaluations/step-00000004.json").read_text())
    assert len(kept) == 3
    board = EventAccumulator(str(run / "evaluations/tensorboard")).Reload()
    steps = [event.step for event in board.Scalars("eval/ours_choice/acc")]
    assert steps == [2, 4]
    table = command("evaluate", str(run), *words).stdout
    assert f"{scores['ours_choice']['acc']:.4f}" in table


def test_a_task_that_is_not_there_is_told_with_the_nearest(command, run, local_tasks):
    done = command(
        "evaluate", str(run), "--tasks", "ours_choise", "--include-path", str(local_tasks)
    )
    assert (done.returncode, done.stderr) == (
        2,
        "error: --tasks: there is no task 'ours_choise'; did you mean 'ours_choice'?\n",
    )
    assert not (run / "evaluations").exists()
