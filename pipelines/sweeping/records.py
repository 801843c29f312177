"""What became of each trial, in a file of its own: a trial that ended is never run again, whatever crashed.

    <search>/<key>.json      written by the sweep: the in-loop mIoU at each step, and how it ended
    <search>/<key>.run.json  written by the trial: its MLflow run, and why it failed
    <search>/<key>.closed    written by the sweep: its MLflow run has been told how it ended

Ray Tune keeps its own record, but writes it every 10 s or so, and it forgets the scheduler's.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipelines.storage import Folder
from pipelines.sweeping.points import Point

FINISHED = "finished"


@dataclass(frozen=True)
class Trial:
    """A point with its (step, mIoU) at each validation and how it ended; `ended` is empty while it goes on."""

    point: Point
    curve: tuple[tuple[int, float], ...] = ()
    ended: str = ""

    @property
    def failed(self) -> bool:
        return self.ended.startswith("failed")

    @property
    def error(self) -> str:
        return self.ended.removeprefix("failed: ") if self.failed else ""

    @property
    def steps(self) -> int:
        return self.curve[-1][0] if self.curve else 0

    @property
    def miou(self) -> float:
        """The best so far, what `repsep train` would keep; NaN where there is none."""
        return max((miou for _, miou in self.curve), default=float("nan"))

    def at(self, step: int) -> float:
        """The mIoU at a step; NaN where it was not validated there."""
        return dict(self.curve).get(step, float("nan"))

    @property
    def rank(self) -> tuple[bool, int, float]:
        """A better trial has a greater one: those that failed are last, those that went further are ahead."""
        return (not self.failed, self.steps, self.miou)


@dataclass(frozen=True)
class Records:
    """The records of one search; a URI and no more, so that it can lie in Tune's files."""

    uri: str

    @property
    def folder(self) -> Folder:
        return Folder(self.uri)

    def read(self, point: Point) -> Trial:
        data = self.folder.read_if_present(f"{point.key}.json")
        if data is None:
            return Trial(point)
        values = json.loads(data)
        return Trial(point, tuple((int(step), float(miou)) for step, miou in values["curve"]), values["ended"])

    def write(self, trial: Trial) -> None:
        values = {"name": trial.point.name, "curve": trial.curve, "ended": trial.ended}
        self.folder.write(f"{trial.point.key}.json", json.dumps(values).encode())

    def add(self, point: Point, metrics: dict[str, Any]) -> Trial:
        """A validation's result. The best one so far is in it too: a crash may have lost the report of that step."""
        before = self.read(point)
        curve = dict(before.curve) | {metrics["best_step"]: metrics["best_miou"], metrics["step"]: metrics["miou"]}
        found = Trial(point, tuple(sorted(curve.items())), before.ended)
        self.write(found)
        return found

    def end(self, point: Point, how: str) -> Trial:
        found = Trial(point, self.read(point).curve, how)
        self.write(found)
        return found

    def run_of(self, point: Point) -> dict[str, Any]:
        """What the trial itself wrote: `mlflow_run`, and `error` if it failed."""
        return json.loads(self.folder.read_if_present(f"{point.key}.run.json") or b"{}")

    def write_run(self, point: Point, values: dict[str, Any]) -> None:
        self.folder.write(f"{point.key}.run.json", json.dumps(values).encode())

    def is_closed(self, trial: Trial) -> bool:
        return self.folder.read_if_present(f"{trial.point.key}.closed") == trial.ended.encode()

    def close(self, trial: Trial) -> None:
        self.folder.write(f"{trial.point.key}.closed", trial.ended.encode())
