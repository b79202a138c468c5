"""Where trackers keep a run: a CSV file, Weights & Biases, MLflow.

`update` gets all rows that are final, again and again, and adds what the store does not hold yet.
The packages are imported when a run asks for them.
"""

import csv
import io
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from sparse_gpt.files import publish_text
from sparse_gpt.train.metrics_file import Row

Points = Callable[[Row], Iterator[tuple[str, float, int]]]  # tag, value, place on its own axis

_PROJECT = "sparse-gpt"
_TAG = "sparse_gpt.id"  # of MLflow's runs


@dataclass(frozen=True)
class Run:
    """What a store is told of a run: an id that stays through its starts, its name, its folder, and
    settings and costs as nested mappings."""

    id: str
    name: str
    folder: Path
    settings: Mapping[str, Any]


class Store:
    """Any method may raise whatever its package does, `update` also in the midst; `open` is then
    called again before the next `update`."""

    packages: ClassVar[tuple[str, ...]] = ()
    advice = ""
    """What to do where it does not open."""

    def __init__(self, run: Run, points: Points) -> None:
        self.run, self.points = run, points

    def open(self) -> None:
        """Find the run there and what it holds, or begin it."""

    def update(self, rows: Sequence[Row]) -> None:
        """Hold these rows, which are those of before and maybe more."""

    def close(self, finished: bool) -> None:
        """End the run there, as finished or as stopped."""


class Csv(Store):
    """`metrics.csv`: a line a row, a column a tag, in the order of their first appearance."""

    def update(self, rows: Sequence[Row]) -> None:
        """Write it anew, whole."""
        own = ("step", "tokens", "gflops", "time")
        lines = [
            {key: row[key] for key in own} | {tag: value for tag, value, _ in self.points(row)}
            for row in rows
        ]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(dict.fromkeys(key for line in lines for key in line)))
        writer.writeheader()
        writer.writerows(lines)
        publish_text(self.run.folder / "metrics.csv", text.getvalue())


class Wandb(Store):
    """A run of Weights & Biases; its files are in the run's folder, in `wandb/`.

    Online it is resumed, and its server says from which step on. Offline no run can be resumed:
    each start draws all rows anew and drops what the start before it left, so that there is one
    folder to `wandb sync`.
    """

    packages = ("wandb",)
    advice = "wandb login, or WANDB_MODE=offline to keep it in the run's folder"

    def open(self) -> None:
        """Raises also where nobody is logged in: a rank asks nothing."""
        import wandb

        quiet = wandb.Settings(silent=True, console="off")
        mode = wandb.setup(settings=quiet).settings.mode
        if mode == "online" and not wandb.login(prompt=False):
            raise PermissionError("nobody is logged in")
        self._there = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            name=os.environ.get("WANDB_NAME", self.run.name),
            id=self.run.id,
            resume="allow",
            dir=str(self.run.folder),
            config=dict(self.run.settings),
            settings=quiet,
        )
        self._there.define_metric("compute/*", step_metric="gflops")
        self._next = self._there.starting_step
        if self._there.offline:
            own = Path(self._there.dir).parent
            for folder in own.parent.glob(f"offline-run-*-{self.run.id}"):
                if folder != own:
                    shutil.rmtree(folder)

    def update(self, rows: Sequence[Row]) -> None:
        """Add the steps that it has not."""
        for row in rows:
            if row["step"] >= self._next:
                values = {tag: value for tag, value, _ in self.points(row)}
                values |= {"tokens": row["tokens"], "gflops": row["gflops"]}
                values["_timestamp"] = row["time"]
                self._there.log(values, step=row["step"], commit=True)
                self._next = row["step"] + 1

    def close(self, finished: bool) -> None:
        """Waits until all is sent, and W&B's own process has ended."""
        import wandb

        self._there.finish(exit_code=0 if finished else 1)
        wandb.teardown()


class Mlflow(Store):
    """A run of MLflow, on the server of MLFLOW_TRACKING_URI or else in `mlflow.db` in the run's
    folder. It is found again by a tag; the store says which points it holds."""

    packages = ("mlflow", "sqlalchemy")
    advice = "is MLFLOW_TRACKING_URI right? Without it the run's folder has it"

    def open(self) -> None:
        """Raises after a minute or so where a server does not answer."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")  # seconds
        from mlflow import MlflowClient

        for name in ("mlflow", "alembic"):  # which tell of tables
            logging.getLogger(name).setLevel(logging.WARNING)
        folder, uri = self.run.folder.absolute(), os.environ.get("MLFLOW_TRACKING_URI")
        self._client = MlflowClient(uri or f"sqlite:///{folder}/mlflow.db")
        place = self._experiment(None if uri else (folder / "mlartifacts").as_uri())
        found = self._client.search_runs([place], f"tags.`{_TAG}` = '{self.run.id}'")
        if found:
            self._id = found[0].info.run_id
            self._client.update_run(self._id, status="RUNNING")
        else:
            tags, name = {_TAG: self.run.id}, self.run.name
            self._id = self._client.create_run(place, tags=tags, run_name=name).info.run_id
        self._describe(self._client.get_run(self._id).data.params)

    def _experiment(self, artifacts: str | None) -> str:
        """Its id; it is made where there is none."""
        from mlflow.exceptions import MlflowException

        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        found = self._client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self._client.create_experiment(name, artifacts))
            except MlflowException:  # maybe another run was quicker
                found = self._client.get_experiment_by_name(name)
                if found is None:
                    raise
        return str(found.experiment_id)

    def _describe(self, known: Mapping[str, str]) -> None:
        """Give the run its parameters. MLflow lets none change: those of its first start stay."""
        from mlflow.entities import Param

        told = {_mlflow_name(key): str(value) for key, value in flat(self.run.settings).items()}
        missing = iter([Param(k, v[:_LONGEST]) for k, v in told.items() if k not in known])
        while part := list(islice(missing, 100)):  # as many as MLflow takes at a time
            self._client.log_batch(self._id, params=part)

    def update(self, rows: Sequence[Row]) -> None:
        """Add the points that come after the last of their tag."""
        from mlflow.entities import Metric

        held = self._client.get_run(self._id).data.to_proto().metrics
        last = {metric.key: (metric.step, metric.timestamp) for metric in held}
        points = (
            Metric(_mlflow_name(tag), value, round(row["time"] * 1e3), place)
            for row in rows
            for tag, value, place in self.points(row)
        )
        new = (p for p in points if (p.step, p.timestamp) > last.get(p.key, (-1, 0)))
        while part := list(islice(new, 1000)):  # as many as MLflow takes at a time
            self._client.log_batch(self._id, metrics=part)

    def close(self, finished: bool) -> None:
        """Say how it ended."""
        self._client.set_terminated(self._id, "FINISHED" if finished else "KILLED")


STORES: dict[str, type[Store]] = {"csv": Csv, "mlflow": Mlflow, "wandb": Wandb}

_LONGEST = 6000  # characters of a value that MLflow takes


def _mlflow_name(name: str) -> str:
    """MLflow refuses other characters in names."""
    return re.sub(r"[^\w\-. :/]", "_", name)


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings as HParams and MLflow take them: dotted names, plain values."""
    plain: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            plain |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            plain[prefix + key] = value if isinstance(value, bool | int | float) else str(value)
    return plain
