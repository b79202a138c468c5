"""What a tracker is given, and that none stops or delays a run."""

import threading

import pytest

from sparse_gpt.config.load import load_config
from sparse_gpt.errors import ConfigError
from sparse_gpt.files import to_json
from sparse_gpt.train.trackers import follow
from sparse_gpt.train.trackers.follow import Trackers, check_trackers
from sparse_gpt.train.trackers.stores import STORES, Store


class Noted(Store):
    """Keeps the steps that it was given in a list of the test, and fails as often as told."""

    def __init__(self, run, points, said, refusals=0, failures=0):
        super().__init__(run, points)
        self.said, self.refusals, self.failures = said, refusals, failures

    def open(self):
        self.said.append(f"open {self.run.id}")
        if self.refusals:
            self.refusals -= 1
            raise PermissionError("who are you?\nTraceback")

    def update(self, rows):
        if self.failures:
            self.failures -= 1
            raise OSError("no route to host")
        self.said.append([row["step"] for row in rows])

    def close(self, finished):
        self.said.append(finished)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Opens the trackers of a run with rows of steps 0 to 8; what its tracker was told."""
    monkeypatch.setattr(follow, "_LOOKS", 0.01)
    rows = [{"step": step, "train/loss": 9.0 - step} for step in range(9)]
    (tmp_path / "metrics.jsonl").write_text("".join(to_json(row, None) + "\n" for row in rows))
    said = []

    def opened(**fails):
        monkeypatch.setitem(STORES, "csv", lambda run, points: Noted(run, points, said, **fails))
        return Trackers(["csv"], tmp_path, {}, lambda row: iter(()))

    return opened, said


def checkpoint(folder, step):
    (folder / f"checkpoints/step-{step:08}").mkdir(parents=True)


def until(condition):
    for _ in range(1000):
        if condition():
            return
        threading.Event().wait(0.01)
    pytest.fail("it never came")


def test_rows_come_once_a_checkpoint_keeps_their_step_and_the_id_stays(run, tmp_path):
    opened, said = run
    trackers = opened()
    threading.Event().wait(0.1)
    identity = (tmp_path / "tracker-id").read_text()
    assert said == [f"open {identity}"]
    checkpoint(tmp_path, 4)
    until(lambda: said[1:] == [[0, 1, 2, 3, 4]])
    checkpoint(tmp_path, 6)
    trackers.close(finished=False)
    assert said[-2:] == [[0, 1, 2, 3, 4, 5, 6], False]
    said.clear()
    opened().close(finished=True)
    assert said == [f"open {identity}", [0, 1, 2, 3, 4, 5, 6], True]


def test_a_new_run_that_is_not_let_in_is_refused_and_leaves_no_id(run, tmp_path):
    opened, _ = run
    with pytest.raises(ConfigError, match=r"^log.trackers: csv: who are you\?; $"):
        opened(refusals=1)
    assert not (tmp_path / "tracker-id").exists()


def test_a_known_run_goes_on_is_told_once_and_gets_all_later(run, tmp_path, capsys):
    opened, said = run
    opened().close(finished=False)
    said.clear()
    trackers = opened(refusals=2)
    for step in (2, 4, 6):
        checkpoint(tmp_path, step)
        threading.Event().wait(0.1)
    trackers.close(finished=True)
    assert said[-2:] == [[0, 1, 2, 3, 4, 5, 6], True]
    [warning] = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: log.trackers: csv: who are you?; training goes on")


def test_a_store_that_fails_in_the_midst_is_opened_again(run, tmp_path, capsys):
    opened, said = run
    trackers = opened(failures=1)
    checkpoint(tmp_path, 1)
    until(lambda: said[1:] == [] and "no route" in capsys.readouterr().err)
    checkpoint(tmp_path, 3)
    trackers.close(finished=True)
    assert [type(each) for each in said] == [str, str, list, bool]
    assert said[2] == [0, 1, 2, 3]
    assert capsys.readouterr().err == ""


def test_a_store_that_hangs_is_left_behind(run, tmp_path, monkeypatch, capsys):
    opened, _ = run
    monkeypatch.setattr(follow, "_END_WAITS", 0.1)
    never = threading.Event()
    monkeypatch.setattr(Noted, "update", lambda self, rows: never.wait())
    trackers = opened()
    checkpoint(tmp_path, 1)
    trackers.close(finished=True)
    never.set()
    assert "it has not taken all, 0.1 seconds after the end" in capsys.readouterr().err


def test_an_id_that_is_not_ours_is_named(run, tmp_path):
    opened, _ = run
    (tmp_path / "tracker-id").write_text("' or 1=1")
    with pytest.raises(ConfigError, match="tracker-id: is no id of ours; remove it"):
        opened()


def test_a_missing_package_is_one_line(run_file, monkeypatch):
    monkeypatch.setattr(follow, "find_spec", lambda name: None)
    check_trackers(load_config(run_file, ["log.trackers=[csv]"]).log)
    for name in ("wandb", "mlflow"):
        with pytest.raises(ConfigError, match=rf"{name} needs .*: pip install 'sparse-gpt\[{name}"):
            check_trackers(load_config(run_file, [f"log.trackers=[csv, {name}]"]).log)
