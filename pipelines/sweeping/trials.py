"""Points as Ray Tune trials, each a Ray Train run of its own with a child run in MLflow."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback

from pipelines import cluster, tracking
from pipelines.config import SweepConfig, TrackingConfig, TrainConfig
from pipelines.errors import RepsepError, StoppedError, StorageError, UsageError
from pipelines.patient_tracking import patiently
from pipelines.progress import say
from pipelines.stage import StageRun
from pipelines.storage import Folder
from pipelines.sweeping.halving import FairHalving
from pipelines.sweeping.placement import orphans_removed
from pipelines.sweeping.points import Point, TpeSpace
from pipelines.sweeping.records import FINISHED, Records, Trial
from pipelines.train import fit, trainer
from pipelines.training.checkpoint_folder import CheckpointFolder
from pipelines.training.loop import LoopSettings

SEARCH, CONFIRM = "search", "confirm"
VARIABLE = "MLFLOW_TRACKING_URI"
RETRY = "_RETRY"
"""Present where all trials failed: the next run tries them again instead of failing with what is recorded."""


@dataclass(frozen=True)
class Place:
    """Where a sweep's trials write, and what they need to know of it."""

    folder: str
    dataset: str
    tracking: TrackingConfig
    parent: str

    def records(self, search: str) -> Records:
        return Records(f"{self.folder}/trials/{search}")


def run_search(run: StageRun, place: Place, what: list[Point], config: SweepConfig, base: TrainConfig) -> list[Trial]:
    """The trials of the search in the order of their numbers; `what` are the points where they are known beforehand."""
    records = place.records(SEARCH)
    scheduler = FairHalving(records, config)
    if config.search.method == "random":
        search, samples = None, 1
    else:
        search, samples = _optuna(TpeSpace(config, base), config.seed), config.trials
    again = run.folder.read_if_present(RETRY) is not None
    trials = _run(place, SEARCH, what, config, base, scheduler=scheduler, search=search, samples=samples, again=again)
    if all(trial.failed for trial in trials):
        run.folder.write(RETRY, b"")
        raise RepsepError(f"all {len(trials)} trials of the sweep failed; the first said: {trials[0].error}")
    return trials


def run_confirmation(place: Place, what: list[Point], config: SweepConfig, base: TrainConfig) -> list[Trial]:
    """The points, all to their last step."""
    return _run(place, CONFIRM, what, config, base)


def _optuna(space: TpeSpace, seed: int) -> Any:
    try:
        import optuna  # noqa: F401
    except ImportError as error:
        raise UsageError("sweep.search.method: tpe needs Optuna: pip install 'repsep[sweep-tpe]'") from error
    from ray.tune.search.optuna import OptunaSearch

    return OptunaSearch(space, metric="miou", mode="max", seed=seed)


def _run(
    place: Place,
    name: str,
    what: list[Point],
    config: SweepConfig,
    base: TrainConfig,
    *,
    scheduler: Any = None,
    search: Any = None,
    samples: int = 1,
    again: bool = False,
) -> list[Trial]:
    """Run points as trials; after a crash the same call goes on where it was. Raises StoppedError on Ctrl-C."""
    storage, records = f"{place.folder}/ray", place.records(name)
    # A trial's driver needs no CPU, its workers do the work; Tune refuses an empty request, so one byte it is.
    trainable = tune.with_resources(
        tune.with_parameters(_trial, place=place, name=name), tune.PlacementGroupFactory([{"memory": 1}])
    )
    if _can_restore(f"{storage}/{name}"):
        tuner = tune.Tuner.restore(f"{storage}/{name}", trainable=trainable, restart_errored=again)
    else:
        space = {"point": tune.grid_search([point.to_dict() for point in what])} if search is None else None
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                scheduler=scheduler,
                search_alg=search,
                num_samples=samples,
                max_concurrent_trials=concurrent_trials(config, base),
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=storage,
                failure_config=tune.FailureConfig(max_failures=config.runtime.max_failures),
                callbacks=[Recorder(records, name, config.steps, len(what) if search is None else samples)],
                verbose=0,
            ),
        )
    # Tune prints its settings; stdout is for the receipt
    with _tracked(place), contextlib.redirect_stdout(sys.stderr), orphans_removed(), cluster.stoppable("the sweep"):
        results = tuner.fit()
        tried = [result.config["point"] for result in results]  # type: ignore[attr-defined] # by __getitem__
        found = [records.read(Point.from_dict(point)) for point in tried]
        if not all(trial.ended for trial in found):
            raise StoppedError("the sweep was stopped; the same command again goes on where it was")
        for trial in found:
            close_child(records, trial)
            if not trial.failed:
                _remove_checkpoints(f"{storage}/{name}-trials/{trial.point.key}")
    return sorted(found, key=lambda trial: (len(trial.point.name), trial.point.name))


def _remove_checkpoints(uri: str) -> None:
    """Of a trial that ended: nothing goes on from them."""
    checkpoints = CheckpointFolder(uri)
    try:
        for name in checkpoints.names():
            checkpoints.remove(name)
    except StorageError as error:
        say(f"warning: checkpoints of a trial were not removed: {error}")


def _can_restore(uri: str) -> bool:
    """NOTE Tune's own answer is not enough: killed before its first snapshot, an experiment cannot be restored."""
    return bool(tune.Tuner.can_restore(uri)) and any(
        entry.key.startswith("experiment_state") for entry in Folder(uri).list()
    )


def _trial(values: dict[str, Any], place: Place, name: str) -> None:
    """One trial, in a process of its own: a Ray Train run that reports to Tune, with a child run in MLflow."""
    point, records = Point.from_dict(values["point"]), place.records(name)
    known = records.read(point)
    if known.ended and not known.failed:  # it ended after Tune's last snapshot
        tune.report(
            {"step": known.steps, "miou": known.curve[-1][1], "best_step": known.steps, "best_miou": known.miou}
        )
        return
    run_id = patiently(lambda: _child(place, f"{name}/{point.key}", point))
    records.write_run(point, {"mlflow_run": run_id})
    uri = tracking.tracking_uri(place.tracking)
    try:
        settings = LoopSettings(point.config.model_dump(mode="json"), place.dataset, uri, run_id)
        storage = f"{place.folder}/ray/{name}-trials"
        metrics = fit(trainer(settings, storage=storage, name=point.key, callbacks=[TuneReportCallback()]))
    except Exception as error:
        reason = str(error) if isinstance(error, RepsepError) else f"{type(error).__name__}: {error}"
        records.write_run(point, {"mlflow_run": run_id, "error": reason})
        raise
    # A trial that was resumed at its last step has reported nothing yet.
    tune.report({key: metrics[key] for key in ("step", "miou", "best_step", "best_miou")})


def _child(place: Place, tag: str, point: Point) -> str:
    """The trial's run in MLflow with its parameters: the one that it had before a crash, or a new one."""
    run_id = tracking.child_run(place.tracking, place.parent, "repsep.trial", tag)
    if run_id is None:
        tags = {"repsep.trial": tag, "repsep.stage": "sweep"}
        run_id = tracking.start_run(place.tracking, point.name, tags=tags, parent=place.parent)
    uri = tracking.tracking_uri(place.tracking)
    tracking.RunLogger(uri, run_id).params({"train": point.config.model_dump(mode="json")})
    return run_id


class Recorder(tune.Callback):
    """Keeps the records, closes the child runs and says what each trial has reached: Tune's tables are for notebooks.

    NOTE Tune stores it in a file, so it holds no tracking URI, which may hold a password: see `_tracked`.
    """

    def __init__(self, records: Records, name: str, steps: int, total: int) -> None:
        self.records, self.name, self.steps, self.total = records, name, steps, total

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        point = Point.from_dict(trial.config["point"])
        seen = self.records.read(point)
        if seen.ended and not seen.failed:
            return
        found = self.records.add(point, result)
        if found.steps != seen.steps:
            self._say(trial, f"step {result['step']}, mIoU {result['miou']:.4f}")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        point = Point.from_dict(trial.config["point"])
        seen = self.records.read(point)
        if not seen.ended or seen.failed:
            how = FINISHED if seen.steps >= self.steps else f"stopped early at step {seen.steps} by ASHA"
            self._end(trial, how if seen.curve else "failed: it ended without a result")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        point = Point.from_dict(trial.config["point"])
        reason = self.records.run_of(point).get("error") or _last_line(trial.get_error())
        self._end(trial, f"failed: {reason}")

    def on_trial_recover(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "failed, it is tried again")

    def _end(self, trial: Any, how: str) -> None:
        ended = self.records.end(Point.from_dict(trial.config["point"]), how)
        self._say(trial, how)
        close_child(self.records, ended)

    def _say(self, trial: Any, what: str) -> None:
        say(f"{self.name}: {trial.config['point']['name']} (of {self.total}): {what}")


@contextlib.contextmanager
def _tracked(place: Place) -> Iterator[None]:
    """For the time of the block this process finds the tracking server without being told."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = tracking.tracking_uri(place.tracking)
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def close_child(records: Records, trial: Trial) -> None:
    """Its child run in MLflow gets the curve and how it ended: a trial that was stopped could not do that itself."""
    run = records.run_of(trial.point)
    if "mlflow_run" not in run or records.is_closed(trial):
        return
    logger = tracking.RunLogger(tracking.tracking_uri(TrackingConfig()), run["mlflow_run"])
    try:
        for step, miou in trial.curve:
            logger.metrics({"sweep/miou": miou}, step)
        logger.tags({"repsep.ended": trial.ended[:5000]})
    except RepsepError as error:  # MLflow is away: the record is kept, and the end of the sweep tries again
        say(f"warning: {error}")
        return
    logger.finish("FAILED" if trial.failed else "FINISHED")
    records.close(trial)


def _last_line(error: object) -> str:
    return tracking.shown((str(error).strip().splitlines() or ["its process died"])[-1])


def concurrent_trials(config: SweepConfig, base: TrainConfig) -> int:
    """How many trials the cluster holds at once."""
    if config.runtime.max_concurrent_trials is not None:
        return config.runtime.max_concurrent_trials
    workers, there = config.runtime.workers_per_trial, ray.cluster_resources()
    fits = there.get("CPU", 1) // (workers * base.runtime.cpus_per_worker)
    if cluster.has_gpu() if base.runtime.gpu is None else base.runtime.gpu:
        fits = min(fits, there.get("GPU", 0) // workers)
    return max(1, int(fits))
