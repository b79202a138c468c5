"""What the stores hold, however they were given it. After a kill: test_loop.py."""

import math
import time

import pytest
from tracked import READ_BACK

from sparse_gpt.train.trackers.stores import STORES, Run, flat

ROWS = [
    {"step": step, "tokens": 512 * step, "gflops": 0.3 * step, "time": 1e9 + step, "train/loss": x}
    for step, x in enumerate([math.nan, 4.0, 3.5, 3.25, 3.0])
]
ROWS[3]["val/loss/A+B & Ä"] = 2.5
SETTINGS = {"model": {"d_model": 32, "ffn": {"preset": "x" * 7000}}, "data": {"a/b&c": [1, 2]}}


def points(row):
    for tag, value in row.items():
        if "/" in tag:
            yield tag, value, row["step"]
    yield "compute/train_loss", row["train/loss"], round(row["gflops"])


@pytest.fixture
def store(tmp_path, monkeypatch):
    """Opens the one of a name; each time as a new start of the same run does."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)

    def opened(name):
        if name != "csv":
            pytest.importorskip(name)
        made = STORES[name](Run("0" * 32, "runs/small", tmp_path, SETTINGS), points)
        made.open()
        return made

    return opened


@pytest.mark.parametrize("name", STORES)
def test_each_point_is_there_once_whatever_was_there_before(store, tmp_path, name):
    first = store(name)
    first.update(ROWS[:2])
    first.update(ROWS[:3])
    first.close(finished=False)
    if name == "wandb":
        time.sleep(1.1)  # its folders have the second in their names
    second = store(name)
    second.update(ROWS[:4])
    second.update(ROWS)
    second.close(finished=True)
    found = READ_BACK[name](tmp_path)
    assert found["train/loss"][1:] == [(1, 4.0), (2, 3.5), (3, 3.25), (4, 3.0)]
    assert found["train/loss"][0][0] == 0
    assert math.isnan(found["train/loss"][0][1])
    assert found["compute/train_loss"][1:] == [(0, 4.0), (1, 3.5), (1, 3.25), (1, 3.0)]
    (tag,) = found.keys() - {"train/loss", "compute/train_loss"}
    assert tag == ("val/loss/A_B _ Ä" if name == "mlflow" else "val/loss/A+B & Ä")
    assert found[tag] == [(3, 2.5)]


def test_mlflow_knows_a_run_again_and_keeps_its_first_parameters(store, tmp_path):
    first = store("mlflow")
    client, run_id = first._client, first._id
    run = client.get_run(run_id)
    assert run.data.params["model.d_model"] == "32"
    assert run.data.params["data.a/b_c"] == "[1, 2]"
    assert (run.info.run_name, run.info.status) == ("runs/small", "RUNNING")
    first.run.settings["model"]["d_model"] = 64
    again = store("mlflow")
    assert again._id == run_id
    assert client.get_run(run_id).data.params["model.d_model"] == "32"
    again.close(finished=True)
    assert client.get_run(run_id).info.status == "FINISHED"


def test_settings_become_plain_values_with_dotted_names():
    assert flat({"a": {"b": 1, "c": {"d": None, "e": [2]}}, "f": True}) == {
        "a.b": 1,
        "a.c.e": "[2]",
        "f": True,
    }
