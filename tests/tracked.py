"""What the trackers of a run hold, each read back by its own means: {tag: [(place, value)]}."""

import csv
import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

INSTALLED = [name for name in ("wandb", "mlflow", "csv") if name == "csv" or find_spec(name)]
Series = dict[str, list[tuple[int, float]]]


def in_tensorboard(run_dir: Path) -> Series:
    board = EventAccumulator(str(run_dir / "tensorboard"), {"scalars": 0})
    board.Reload()
    return {
        tag: [(event.step, event.value) for event in board.Scalars(tag)]
        for tag in board.Tags()["scalars"]
    }


def in_csv(run_dir: Path) -> Series:
    with (run_dir / "metrics.csv").open(newline="") as file:
        return _by_tag(dict(row) for row in csv.DictReader(file))


def in_wandb(run_dir: Path) -> Series:
    """Of the one run that is in its folder."""
    [path] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    return _by_tag({**row, "step": row["_step"]} for row in _wandb_history(path))


def in_mlflow(run_dir: Path) -> Series:
    """Of the one run that is in its file."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{run_dir}/mlflow.db")
    [experiment] = [each for each in client.search_experiments() if each.name == "sparse-gpt"]
    [run] = client.search_runs([experiment.experiment_id])
    series = {}
    for tag in run.data.metrics:
        points = client.get_metric_history(run.info.run_id, tag)
        points.sort(key=lambda point: (point.step, point.timestamp))
        series[tag] = [(point.step, point.value) for point in points]
    return series


READ_BACK = {"csv": in_csv, "mlflow": in_mlflow, "wandb": in_wandb}


def _by_tag(rows: Iterator[dict[str, Any]]) -> Series:
    series = defaultdict(list)
    for row in rows:
        for tag, value in row.items():
            if "/" in tag and value != "":
                axis = float(row["gflops"]) if tag.startswith("compute/") else row["step"]
                series[tag].append((round(float(axis)), float(value)))
    return dict(series)


def _wandb_history(path: Path) -> Iterator[dict[str, Any]]:
    """The rows in a file of W&B's: a log of LevelDB's, of one protobuf a record."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 32768 - at % 32768) < 7:  # of the block; no record begins there
            at += left
            continue
        _, size, kind = struct.unpack_from("<IHB", data, at)  # whole, first, middle, last: 1 to 4
        piece = data[at + 7 : at + 7 + size]
        part = part + piece if kind in (3, 4) else piece
        at += 7 + size
        if kind in (1, 4):
            items = Record.FromString(part).history.item
            if items:
                yield {
                    item.key or ".".join(item.nested_key): json.loads(item.value_json)
                    for item in items
                }
