import json
import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_gpt.errors import ConfigError, told
from sparse_gpt.train.metrics_file import MetricsFile, read_metrics


@pytest.fixture
def opened(tmp_path):
    """Opens the record of a run in a folder; what it draws is `loss`."""

    def open_at(step, run_dir=tmp_path):
        def draw(board, row):
            board.add_scalar("loss", row["loss"], row["step"])

        return MetricsFile(run_dir, step, lambda board: None, draw)

    return open_at


def row(step):
    return {"step": step, "loss": 9.0 - step}


def drawn(run_dir):
    board = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0})
    board.Reload()
    return [event.step for event in board.Scalars("loss")]


def test_rows_are_there_at_once_and_drawn(opened, tmp_path):
    assert read_metrics(tmp_path) == []
    record = opened(0)
    for step in range(3):
        record.add(row(step))
        assert read_metrics(tmp_path) == [row(each) for each in range(step + 1)]
    record.close()
    assert drawn(tmp_path) == [0, 1, 2]


def test_what_is_no_number_comes_back_and_other_readers_take_the_file(opened, tmp_path):
    record = opened(0)
    record.add({"step": 0, "loss": math.nan, "val/loss": 4.0})
    record.add({"step": 1, "loss": math.inf})
    record.close()
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert [math.isnan(row["loss"]) for row in read_metrics(tmp_path)] == [True, True]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(opened, tmp_path):
    record = opened(0)
    for step in range(6):
        record.add(row(step))
    record.close()
    record = opened(3)
    record.add(row(4) | {"loss": 1.5})
    record.close()
    assert [each["step"] for each in read_metrics(tmp_path)] == [0, 1, 2, 3, 4]
    assert read_metrics(tmp_path)[-1]["loss"] == 1.5
    assert drawn(tmp_path) == [0, 1, 2, 3, 4]
    opened(0).close()
    assert read_metrics(tmp_path) == []


def test_a_rewind_goes_on_in_the_same_record(opened, tmp_path):
    record = opened(0)
    for step in range(5):
        record.add(row(step))
    record.rewind(2)
    record.add(row(3))
    record.close()
    assert [each["step"] for each in read_metrics(tmp_path)] == [0, 1, 2, 3]
    assert drawn(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize("step", ["-1", str(2**70), "1.0", "true", "null"])
def test_a_row_whose_step_cannot_be_is_named(tmp_path, step):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 0}}\n{{"step": {step}}}\n')
    with pytest.raises(ConfigError, match=r"metrics\.jsonl:2: is no row \(.*step"):
        read_metrics(tmp_path)


@pytest.mark.parametrize("torn", ['{"step": 3, "lo', "{", "\0\0\0"])
def test_a_line_that_a_kill_has_torn_is_no_row(opened, tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(row(step)) + "\n" for step in range(3)) + torn)
    assert read_metrics(tmp_path) == [row(0), row(1), row(2)]
    record = opened(2)
    record.add(row(3))
    record.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == list(map(row, range(4)))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # TensorBoard's
def test_rows_wait_for_room_on_a_full_disk(opened, small_disk, capsys):
    """None is lost, none is there in part or twice, and it is said, not for every row."""
    run_dir, step = small_disk.folder / "run", 0
    run_dir.mkdir()
    record = opened(0, run_dir)
    record.add(row(0))
    assert capsys.readouterr().err == ""
    while len(read_metrics(run_dir)) == step + 1:  # TensorBoard's files may be out of room before
        small_disk.fill()
        record.add(row(step := step + 1))
    warning = f"warning: {run_dir}: the record cannot be written (No space left on device)"
    said = capsys.readouterr().err.splitlines()
    assert said
    assert all(line.startswith(warning) for line in said)
    record.add(row(step + 1))
    assert read_metrics(run_dir) == [row(each) for each in range(step)]
    small_disk.empty()
    record.add(row(step + 2))
    record.close()
    assert read_metrics(run_dir) == [row(each) for each in range(step + 3)]
    assert drawn(run_dir) == list(range(step + 3))
    assert capsys.readouterr().err == ""


def test_a_linked_folder_shows_no_step_twice_after_a_resume(opened, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/notes").write_text("mine")
    (tmp_path / "run/tensorboard").symlink_to(tmp_path / "disk")
    for start in (0, 2, 3):
        file = opened(start, tmp_path / "run")
        for step in range(start + 1, 5):
            file.add(row(step))
        file.close()
        board = EventAccumulator(str(tmp_path / "disk"), {"scalars": 0})
        board.Reload()
        assert [event.step for event in board.Scalars("loss")] == [1, 2, 3, 4]
    assert (tmp_path / "disk/notes").read_text() == "mine"
    assert (tmp_path / "run/tensorboard").is_symlink()


@pytest.mark.parametrize("name", ["tensorboard", "metrics.jsonl"])
def test_a_place_that_cannot_hold_the_record_is_named(opened, tmp_path, name):
    if name == "tensorboard":
        (tmp_path / name).symlink_to(tmp_path / "gone/gone")
    else:
        (tmp_path / name).mkdir()
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the name is what counts
        opened(0)
    assert str(tmp_path / name) in told(refused.value)
