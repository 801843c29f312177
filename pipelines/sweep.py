"""Hyperparameter search with Ray Tune: loss weights x backbones x learning rate, early stopping by ASHA.

Trials are drawn up front from (seed, number), so the same recipe always tries the same points. Each trial is a Ray
Train run of its own, judged on a piece held out of train. The best and the default are then trained again with fresh
seeds on all of train and compared on val.
"""

from __future__ import annotations

import contextlib
import csv
import io
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import yaml
from matplotlib.figure import Figure
from ray import tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, FIFOScheduler

from pipelines import cluster, tracking
from pipelines.config import ModelConfig, Recipe, Section, SweepConfig, TrackingConfig, TrainConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.progress import say
from pipelines.stage import Receipt, StageRun, latest_receipt, run_stage
from pipelines.train import check_batch, check_model, fit, trainer
from pipelines.train_loop import LoopSettings
from repsep_model.losses import term_names

PACKAGES = ("pipelines", "repsep_model")
TABLE, PLOT, BEST = "trials.csv", "weights.png", "best.yaml"
SEARCH, CONFIRM = "search", "confirm"


@dataclass(frozen=True)
class Point:
    """One trial: its name and the train section that it runs."""

    name: str
    config: TrainConfig


@dataclass(frozen=True)
class Trial:
    """What became of a point."""

    point: Point
    miou: float
    steps: int
    error: str = ""


def sweep(workspace: str, recipe: Recipe) -> Receipt:
    """Run the stage: a table, a plot of which weights matter, and `best.yaml`, which `repsep train` takes unchanged."""
    config = recipe.sweep or SweepConfig()
    check_batch(recipe.train, config.runtime.workers_per_trial, "sweep.runtime.workers_per_trial")
    dataset = open_dataset(config.dataset or latest_receipt(workspace, "prepare").results["dataset"])
    unknown = sorted(set(config.search.loss) - set(term_names()))
    if unknown:
        raise UsageError(
            f"sweep.search.loss: there is no loss term {', '.join(unknown)}; known: {', '.join(term_names())}"
        )
    for inside in (True, False):
        dataset.split("train").held_out(config.holdout, 0, inside=inside)  # raises before a cluster is asked for
    for model in config.search.backbones:
        check_model(model, dataset.num_classes, recipe.train.augment.crop)
    return run_stage(
        "sweep",
        workspace=workspace,
        config=_Fixed(
            sweep=config.model_dump(mode="json", exclude={"runtime"}),
            train=recipe.train.model_dump(mode="json", exclude={"runtime"}),
        ),
        inputs={"dataset": dataset.digest},
        packages=PACKAGES,
        lease=True,
        begin=lambda: _begin(recipe),
        body=lambda run: _search(run, workspace, recipe, config, dataset),
    )


class _Fixed(Section):
    """What a sweep's result depends on: its own section and the train section that it starts from."""

    sweep: dict[str, Any]
    train: dict[str, Any]


def _begin(recipe: Recipe) -> dict[str, Any]:
    return {"mlflow_run": tracking.start_run(recipe.tracking, "sweep", tags={"repsep.stage": "sweep"})}


def points(config: SweepConfig, base: TrainConfig) -> list[Point]:
    """The trials: the recipe's own settings first, then random ones. Off means that a term is left out."""
    found = [Point("default", base)]
    space = config.search
    for number in range(1, config.trials):
        rng = np.random.Generator(np.random.Philox(key=[config.seed, number]))
        loss = {}
        for term in sorted(space.loss):
            drawn, off = log_uniform(rng, space.loss[term]), rng.random() < space.off
            loss[term] = 0.0 if off else drawn
        model: ModelConfig = space.backbones[int(rng.integers(len(space.backbones)))]
        update = {"loss": base.loss.model_copy(update=loss), "model": model, "lr": log_uniform(rng, space.lr)}
        found.append(Point(f"trial-{number:03d}", base.model_copy(update=update)))
    judged = {"steps": config.steps, "validate_every": config.validate_every, "holdout": config.holdout}
    judged["warmup_steps"] = min(base.warmup_steps, config.steps // 4)
    return [Point(p.name, _for_trial(p.config.model_copy(update=judged), config)) for p in found]


def log_uniform(rng: np.random.Generator, limits: tuple[float, float]) -> float:
    """A draw that is uniform in the logarithm, to four digits, so that tables and recipes can hold it."""
    low, high = limits
    return float(f"{np.exp(rng.uniform(np.log(low), np.log(high))):.4g}")


def best_train(receipt: Receipt, base: TrainConfig) -> TrainConfig:
    """The train section of the sweep's best.yaml, with this recipe's runtime."""
    found = yaml.safe_load(receipt.folder.read(BEST)).get("train", {})  # left out where all is default
    return TrainConfig.model_validate(found | {"runtime": base.runtime.model_dump()})


def _for_trial(config: TrainConfig, sweep_config: SweepConfig) -> TrainConfig:
    runtime = config.runtime.model_copy(update={"workers": sweep_config.runtime.workers_per_trial})
    return config.model_copy(update={"runtime": runtime})


def _search(run: StageRun, workspace: str, recipe: Recipe, config: SweepConfig, dataset: Dataset) -> None:
    cluster.connect()
    uri = tracking.tracking_uri(recipe.tracking)
    for place, what in ((run.folder.uri, "the workspace"), (dataset.folder.uri, "the dataset"), (uri, "tracking.uri")):
        cluster.refuse_local(place, what)
    cluster.require(config.runtime.workers_per_trial * recipe.train.runtime.cpus_per_worker, "a trial of the sweep")
    if not tracking.run_exists(recipe.tracking, run.started["mlflow_run"]):  # the tracking store is another by now
        run.restart(_begin(recipe))
    parent = run.started["mlflow_run"]
    logger = tracking.RunLogger(uri, parent)
    logger.params({"sweep": config.model_dump(mode="json")})
    logger.dataset(dataset.folder.uri, dataset.manifest["name"], dataset.digest)
    trials = _tune(run, SEARCH, points(config, recipe.train), recipe, config, dataset, parent)
    finished = [t for t in trials if not t.error]
    if not finished:
        raise RepsepError(f"all {len(trials)} trials of the sweep failed; the first said: {trials[0].error}")
    best, default = max(finished, key=lambda t: t.miou), trials[0]
    confirmed = _confirm(run, best, default, recipe, config, dataset, parent)
    winner = best
    if confirmed.get("default", -1.0) >= confirmed.get("best", 0.0):
        winner = default
    run.results = {"dataset": dataset.folder.uri}
    _write_results(run, trials, winner, workspace, recipe, logger)
    logger.metrics({"best_miou": best.miou} | {f"confirm/{name}": value for name, value in confirmed.items()})
    logger.finish()
    run.outputs = [TABLE, PLOT, BEST]
    run.results |= {
        "trials": len(trials),
        "failed": len(trials) - len(finished),
        "stopped_early": sum(t.steps < config.steps for t in finished),
        "best": best.point.name,
        "best_miou": best.miou,
        "default_miou": default.miou if not default.error else None,
        "confirmed": confirmed,
        "winner": winner.point.name,
        "table": run.folder.uri_of(TABLE),
        "plot": run.folder.uri_of(PLOT),
        "best_yaml": run.folder.uri_of(BEST),
        "mlflow_run": parent,
    }
    say(table_text(trials))


def _confirm(
    run: StageRun, best: Trial, default: Trial, recipe: Recipe, config: SweepConfig, dataset: Dataset, parent: str
) -> dict[str, float]:
    """Mean mIoU on val of the best and the default, trained again on all of train with fresh seeds."""
    if config.confirm_seeds == 0 or best is default:
        return {}
    again = []
    for label, trial in (("best", best), ("default", default)):
        for number in range(config.confirm_seeds):
            update = {"seed": config.seed + 1000 + number, "holdout": 0.0, "validate_every": config.steps}
            again.append(Point(f"{label}-{number}", trial.point.config.model_copy(update=update)))
    trials = _tune(run, CONFIRM, again, recipe, config, dataset, parent)
    means = {}
    for label in ("best", "default"):
        scores = [t.miou for t in trials if t.point.name.startswith(label) and not t.error]
        if scores:
            means[label] = float(np.mean(scores))
    return means


def _tune(
    run: StageRun, name: str, what: list[Point], recipe: Recipe, config: SweepConfig, dataset: Dataset, parent: str
) -> list[Trial]:
    """Run points as Tune trials; after a crash the same call goes on where it was."""
    storage = f"{run.folder.uri}/ray"
    settings = {
        "dataset": dataset.folder.uri,
        "storage": f"{storage}/{name}-trials",
        "tracking": recipe.tracking.model_dump(),
        "tracking_uri": tracking.tracking_uri(recipe.tracking),
        "parent": parent,
    }
    # A trial's driver needs no CPU, its workers do the work; Tune refuses an empty request, so one byte it is.
    trainable = tune.with_resources(
        tune.with_parameters(_trial, settings=settings), tune.PlacementGroupFactory([{"memory": 1}])
    )
    if tune.Tuner.can_restore(f"{storage}/{name}"):
        tuner = tune.Tuner.restore(f"{storage}/{name}", trainable=trainable, restart_errored=True)
    else:
        scheduler = (
            ASHAScheduler(
                time_attr="step",
                max_t=config.steps,
                grace_period=config.validate_every,
                reduction_factor=config.reduction_factor,
            )
            if name == SEARCH
            else FIFOScheduler()
        )
        tuner = tune.Tuner(
            trainable,
            param_space={
                "point": tune.grid_search([{"name": p.name, "config": p.config.model_dump(mode="json")} for p in what])
            },
            tune_config=tune.TuneConfig(
                metric="miou", mode="max", scheduler=scheduler, max_concurrent_trials=_concurrent(config, recipe.train)
            ),
            run_config=tune.RunConfig(
                name=name,
                storage_path=storage,
                failure_config=tune.FailureConfig(max_failures=config.runtime.max_failures),
                callbacks=[_Narrator({p.name: number for number, p in enumerate(what)})],
                verbose=0,
            ),
        )
    by_name = {p.name: p for p in what}
    found = {}
    with contextlib.redirect_stdout(sys.stderr):  # Tune prints its settings; stdout is for the receipt
        results = tuner.fit()
    for result in results:  # type: ignore[attr-defined] # it is iterable through __getitem__
        point = by_name[result.config["point"]["name"]]
        metrics = result.metrics or {}
        if "best_miou" in metrics and result.error is None:
            found[point.name] = Trial(point, metrics["best_miou"], metrics["step"])
            _finish_child(recipe, parent, metrics["trial_id"])  # a trial stopped early could not do it itself
        else:
            found[point.name] = Trial(
                point, float("nan"), 0, str(result.error or "it reported nothing").strip().splitlines()[-1]
            )
    return [found[p.name] for p in what]


def _finish_child(recipe: Recipe, parent: str, trial_id: str) -> None:
    if (run_id := tracking.child_run(recipe.tracking, parent, "repsep.trial", trial_id)) is not None:
        tracking.RunLogger(tracking.tracking_uri(recipe.tracking), run_id).finish()


def _trial(config: dict[str, Any], settings: Mapping[str, Any]) -> None:
    """One trial, in a process of its own: a Ray Train run that reports to Tune, with a child run in MLflow."""
    point = config["point"]
    where = TrackingConfig.model_validate(settings["tracking"]).model_copy(update={"uri": settings["tracking_uri"]})
    trial_id = tune.get_context().get_trial_id()
    run_id = tracking.child_run(where, settings["parent"], "repsep.trial", trial_id)
    if run_id is None:
        run_id = tracking.start_run(
            where, point["name"], tags={"repsep.trial": trial_id, "repsep.stage": "sweep"}, parent=settings["parent"]
        )
    logger = tracking.RunLogger(settings["tracking_uri"], run_id)
    logger.params({"train": point["config"]})
    loop = LoopSettings(point["config"], settings["dataset"], settings["tracking_uri"], run_id)
    try:
        fit(trainer(loop, storage=settings["storage"], name=trial_id, callbacks=[TuneReportCallback()]))
    except BaseException:
        logger.finish("FAILED")
        raise
    logger.finish()


class _Narrator(tune.Callback):
    """Says what each trial has reached; Tune's own tables are made for a notebook."""

    def __init__(self, numbers: Mapping[str, int]) -> None:
        self.numbers = numbers

    def on_trial_result(
        self, iteration: int, trials: list[Any], trial: Any, result: dict[str, Any], **info: Any
    ) -> None:
        if "miou" in result:
            self._say(trial, f"step {result['step']}, mIoU {result['miou']:.4f}")

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "failed")

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **info: Any) -> None:
        self._say(trial, "done")

    def _say(self, trial: Any, what: str) -> None:
        name = trial.config["point"]["name"]
        say(f"sweep: {name} ({self.numbers[name] + 1}/{len(self.numbers)}): {what}")


def _concurrent(config: SweepConfig, base: TrainConfig) -> int:
    """How many trials the cluster holds at once."""
    if config.runtime.max_concurrent_trials is not None:
        return config.runtime.max_concurrent_trials
    workers, there = config.runtime.workers_per_trial, ray.cluster_resources()
    fits = there.get("CPU", 1) // (workers * base.runtime.cpus_per_worker)
    if cluster.has_gpu() if base.runtime.gpu is None else base.runtime.gpu:
        fits = min(fits, there.get("GPU", 0) // workers)
    return max(1, int(fits))


def table_text(trials: list[Trial]) -> str:
    """The trials as a plain-text table, best first."""
    rows = [_row(t) for t in sorted(trials, key=lambda t: -t.miou if t.miou == t.miou else 1.0)]
    widths = {name: max(len(name), *(len(str(row[name])) for row in rows)) for name in rows[0]}
    lines = ["  ".join(name.ljust(width) for name, width in widths.items())]
    lines += ["  ".join(str(row[name]).ljust(width) for name, width in widths.items()) for row in rows]
    return "\n".join(lines)


def _row(trial: Trial) -> dict[str, Any]:
    config = trial.point.config
    weights = {name: getattr(config.loss, name) for name in term_names()}
    shown = {
        f"w.{name}": value
        for name, value in weights.items()
        if name in ("local", "coarse", "attention", "identity", "region", "patch")
    }
    miou = f"{trial.miou:.4f}" if not trial.error else trial.error[:40]
    return {
        "trial": trial.point.name,
        "mIoU": miou,
        "steps": trial.steps,
        "backbone": config.model.backbone,
        "lr": config.lr,
    } | shown


def _write_results(
    run: StageRun, trials: list[Trial], winner: Trial, workspace: str, recipe: Recipe, logger: tracking.RunLogger
) -> None:
    rows = [_row(t) for t in trials]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    run.folder.write(TABLE, text.getvalue().encode())
    run.folder.write(PLOT, _plot(trials))
    base = recipe.train
    chosen = winner.point.config
    update = {"model": chosen.model, "loss": chosen.loss, "lr": chosen.lr, "dataset": run.results["dataset"]}
    section = base.model_copy(update=update).model_dump(mode="json", exclude_defaults=True)
    # A database's password stays in the environment: the file lies in the workspace and in MLflow.
    secret = {"uri"} if tracking.shown(recipe.tracking.uri or "") != (recipe.tracking.uri or "") else set()
    where = recipe.tracking.model_dump(exclude_defaults=True, exclude=secret)
    found = {"workspace": workspace, "tracking": where, "train": section}
    run.folder.write(BEST, yaml.safe_dump({k: v for k, v in found.items() if v}, sort_keys=False).encode())
    for name in (TABLE, BEST):
        logger.text(run.folder.read(name).decode(), name)


def _plot(trials: list[Trial]) -> bytes:
    """mIoU against each weight that was searched, one colour for each backbone."""
    finished = [t for t in trials if not t.error]
    terms = [n for n in term_names() if len({getattr(t.point.config.loss, n) for t in finished}) > 1] or ["local"]
    figure = Figure(figsize=(3 * len(terms), 3), layout="constrained")
    for axes, term in zip(np.atleast_1d(figure.subplots(1, len(terms), sharey=True)), terms, strict=True):
        for backbone in sorted({t.point.config.model.backbone for t in finished}):
            mine = [t for t in finished if t.point.config.model.backbone == backbone]
            axes.scatter([getattr(t.point.config.loss, term) for t in mine], [t.miou for t in mine], label=backbone)
        axes.set(title=f"w.{term}", xlabel="weight")
        axes.set_xscale("symlog", linthresh=0.01)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("mIoU on the held-out piece")
    figure.axes[0].legend(fontsize="x-small")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return out.getvalue()
