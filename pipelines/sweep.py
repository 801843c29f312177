"""Hyperparameter search with Ray Tune: the stage. Loss weights, models and learning rates, early stopping by ASHA.

Each trial is a Ray Train run of its own, judged on a piece held out of train. The best and the default are then trained
again with fresh seeds on all of train and compared on val, which no trial has seen.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import yaml

from pipelines import cluster, tracking
from pipelines.config import Recipe, Section, SweepConfig, TrainConfig
from pipelines.dataset import Dataset
from pipelines.errors import RepsepError, StoppedError, UsageError
from pipelines.prepare import prepared_dataset
from pipelines.progress import say
from pipelines.stage import Receipt, StageRun, run_stage
from pipelines.sweeping.comparison import Comparison, compare, confirmation_points
from pipelines.sweeping.importance import importances
from pipelines.sweeping.page import page_of, weights_plot
from pipelines.sweeping.points import check_space, default_point, models_of, points, searched
from pipelines.sweeping.records import FINISHED, Trial
from pipelines.sweeping.trials import Place, run_confirmation, run_search
from pipelines.train import check_batch, check_model
from repsep_model.losses import term_names

PACKAGES = ("pipelines", "repsep_model")
TABLE, PLOT, PAGE = "trials.csv", "weights.png", "index.html"
BEST, FOUND = "best.yaml", "found.yaml"


def sweep(workspace: str, recipe: Recipe, before: Callable[[], None] | None = None) -> Receipt:
    """Run the stage: a page with what was tried and what it showed, and `best.yaml`, which `repsep train` takes.

    `found.yaml` is the best of the search in the same form; where the default stays, it is not `best.yaml`.
    `before` may refuse it by raising; it is not called where the stage is done.
    """
    config = recipe.sweep or SweepConfig()
    check_batch(recipe.train, config.runtime.workers_per_trial, "sweep.runtime.workers_per_trial")
    check_space(config.search, term_names())
    if recipe.train.init_from is not None:
        raise UsageError("train.init_from: a sweep does not fine-tune; leave it out here and set it in best.yaml")
    dataset = prepared_dataset(workspace, recipe, config.dataset)
    for inside in (True, False):
        dataset.split("train").held_out(config.holdout, 0, inside=inside)  # raises before a cluster is asked for
    for model in (recipe.train.model, *models_of(config.search)):
        check_model(model, dataset.num_classes, recipe.train.augment.crop, recipe.train.runtime.grad_checkpointing)
    return run_stage(
        "sweep",
        workspace=workspace,
        config=fixed_settings(recipe),
        inputs={"dataset": dataset.digest},
        packages=PACKAGES,
        lease=True,
        begin=lambda: _begin(recipe),
        before=before,
        body=lambda run: _search(run, workspace, recipe, config, dataset),
    )


class _Fixed(Section):
    """What a sweep's result depends on: its own section and the train section that it starts from."""

    sweep: dict[str, Any]
    train: dict[str, Any]


def fixed_settings(recipe: Recipe) -> Section:
    config = recipe.sweep or SweepConfig()
    return _Fixed(
        sweep=config.model_dump(mode="json", exclude={"runtime"}),
        train=recipe.train.model_dump(mode="json", exclude={"runtime"}),
    )


def best_train(receipt: Receipt, base: TrainConfig) -> TrainConfig:
    """The train section of the sweep's best.yaml, with this recipe's runtime."""
    found = yaml.safe_load(receipt.folder.read(BEST)).get("train", {})  # left out where all is default
    return TrainConfig.model_validate(found | {"runtime": base.runtime.model_dump()})


def _begin(recipe: Recipe) -> dict[str, Any]:
    return {"mlflow_run": tracking.start_run(recipe.tracking, "sweep", tags={"repsep.stage": "sweep"})}


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
    where = Place(run.folder.uri, dataset.folder.uri, recipe.tracking.model_copy(update={"uri": uri}), parent)
    base = recipe.train
    try:
        trials = run_search(run, where, points(config, base) if config.search.method == "random" else [], config, base)
        default = next(t for t in trials if t.point.name == default_point(config, base).name)
        # Also where the default leads in the search: whether something beats it is what the sweep is for.
        best = max((t for t in trials if t is not default and not t.failed), key=lambda t: t.rank, default=default)
        compared = None
        if config.confirm_seeds and best is not default:
            again = confirmation_points(best.point, default.point, config)
            compared = compare(run_confirmation(where, again, config, base))
    except BaseException as error:
        logger.finish("KILLED" if isinstance(error, StoppedError) else "FAILED")
        raise
    if compared is None:
        winner = max(default, best, key=lambda trial: trial.rank)
    else:
        winner = best if compared.found_is_better else default
    run.results = _results(run, trials, best, default, winner, compared, dataset, parent)
    _write(run, workspace, recipe, config, trials, best, winner, compared, dataset)
    try:
        _log(logger, run, best, winner, compared)
    except RepsepError as error:  # MLflow is away, the sweep is done
        say(f"sweep: warning: {error}")
    logger.finish()
    say(table_text(trials, config))
    if compared is not None:
        say(f"sweep: {compared.verdict}")
    say(f"sweep: {run.folder.uri_of(PAGE)}")


def _results(
    run: StageRun,
    trials: list[Trial],
    best: Trial,
    default: Trial,
    winner: Trial,
    compared: Comparison | None,
    dataset: Dataset,
    parent: str,
) -> dict[str, Any]:
    return {
        "dataset": dataset.folder.uri,
        "trials": len(trials),
        "failed": sum(t.failed for t in trials),
        "stopped_early": sum(not t.failed and t.ended != FINISHED for t in trials),
        "best": best.point.name,
        "best_miou": best.miou,
        "default_miou": None if default.failed else default.miou,
        "confirmed": None if compared is None else asdict(compared) | {"verdict": compared.verdict},
        "winner": winner.point.name,
        "page": run.folder.uri_of(PAGE),
        "table": run.folder.uri_of(TABLE),
        "plot": run.folder.uri_of(PLOT),
        "best_yaml": run.folder.uri_of(BEST),
        "mlflow_run": parent,
    }


def _write(
    run: StageRun,
    workspace: str,
    recipe: Recipe,
    config: SweepConfig,
    trials: list[Trial],
    best: Trial,
    winner: Trial,
    compared: Comparison | None,
    dataset: Dataset,
) -> None:
    rows = [row(t, config) for t in trials]
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    usable = [t for t in trials if not t.failed]
    first = min(t.steps for t in usable)
    usable = [t for t in usable if t.at(first) == t.at(first)]  # a crash may have lost the report of that step
    found = importances([searched(t.point.config, config.search) for t in usable], [t.at(first) for t in usable])
    page = page_of(trials, best, winner, compared, found, first, config, dataset, run.folder.uri)
    run.folder.write(TABLE, text.getvalue().encode())
    run.folder.write(PLOT, weights_plot(trials, config))
    run.folder.write(PAGE, page.encode())
    for name, trial in ((BEST, winner), (FOUND, best)):
        run.folder.write(name, recipe_with(trial, workspace, recipe, dataset.folder.uri))
    run.outputs = [TABLE, PLOT, PAGE, BEST, FOUND]
    run.results["importances"] = [asdict(importance) for importance in found]


def _log(logger: tracking.RunLogger, run: StageRun, best: Trial, winner: Trial, compared: Comparison | None) -> None:
    for name in (TABLE, BEST, FOUND, PAGE):
        logger.text(run.folder.read(name).decode(), name)
    logger.metrics({"best_miou": best.miou})
    logger.tags({"repsep.best": best.point.name, "repsep.winner": winner.point.name})
    if compared is not None:
        named = {"difference": compared.difference, "low": compared.low, "high": compared.high}
        logger.metrics({f"confirm/{name}": value for name, value in named.items() if value is not None})
        logger.tags({"repsep.confirmed": compared.verdict})


def recipe_with(trial: Trial, workspace: str, recipe: Recipe, dataset: str) -> bytes:
    """A recipe that trains as this one says, for its number of steps, with the trial's model, weights and rate."""
    chosen = trial.point.config
    update = {"model": chosen.model, "loss": chosen.loss, "lr": chosen.lr, "dataset": dataset}
    section = recipe.train.model_copy(update=update).model_dump(mode="json", exclude_defaults=True)
    # A database's password stays in the environment: the file lies in the workspace and in MLflow.
    secret = {"uri"} if tracking.shown(recipe.tracking.uri or "") != (recipe.tracking.uri or "") else set()
    where = recipe.tracking.model_dump(exclude_defaults=True, exclude=secret)
    values = {"workspace": workspace, "tracking": where, "train": section}
    return yaml.safe_dump({k: v for k, v in values.items() if v}, sort_keys=False).encode()


def row(trial: Trial, config: SweepConfig) -> dict[str, Any]:
    """A line of the table."""
    found = {"trial": trial.point.name, "mIoU": "" if trial.failed else f"{trial.miou:.4f}", "steps": trial.steps}
    return found | {"ended": trial.ended} | searched(trial.point.config, config.search)


def table_text(trials: list[Trial], config: SweepConfig) -> str:
    """The trials as a plain-text table, best first."""
    rows = [row(t, config) for t in sorted(trials, key=lambda t: t.rank, reverse=True)]
    rows = [r | {"ended": r["ended"][:60]} for r in rows]
    widths = {name: max(len(name), *(len(str(r[name])) for r in rows)) for name in rows[0]}
    lines = ["  ".join(name.ljust(width) for name, width in widths.items())]
    lines += ["  ".join(str(r[name]).ljust(width) for name, width in widths.items()) for r in rows]
    return "\n".join(lines)
