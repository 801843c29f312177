"""How good a model is on a dataset's split: per class and per image, on corrupted images too, beside a blind prior.

per_image.parquet      counts of every image: registration compares two models by a paired bootstrap over them
confusion.parquet      one confusion matrix for each corruption and severity
calibration.json       pixels, right ones and the sum of their confidence in each bin of confidence
diagnostics.json       how separate each map's representations are
unjudged.parquet       images that no figure counts, each with its reason; of a model there are none
worst/                 image, labels and prediction of the images with the lowest mIoU
evaluation.html        a page of all of it, with the worst images

Instead of a model an output of `repsep segment` may be judged (`evaluate.predictions`): then what needs confidences or
the model itself (calibration, corruptions, diagnostics) is absent, and an image without a mask is unjudged.
"""

from __future__ import annotations

import io
import json
from collections import Counter
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines import tracking, unsent
from pipelines.config import EvaluateConfig, Recipe
from pipelines.dataset import Dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.evaluation.job import drawn, measure
from pipelines.evaluation.measures import CLEAN, SEGMENTING, Measured, image_counts, mean_diagnostics
from pipelines.evaluation.page import evaluation_page, miou_of
from pipelines.evaluation.predictions import Predictions, open_predictions
from pipelines.models import FetchedModel, fetch_model
from pipelines.prepare import prepared_dataset
from pipelines.progress import say
from pipelines.stage import Receipt, StageRun, latest_receipt, run_stage
from repsep_model.checkpoint import load_classes
from repsep_model.images import UInt8
from repsep_model.metrics import Scores, boundary_scores_from_counts, reliability_from_counts, scores_from_counts
from repsep_model.robustness import retention

PACKAGES = ("pipelines", "repsep_model")
BY_DIGEST = {"model": None, "dataset": None}  # what they hold counts, not where they are
PRIOR_MASKS = 2000
UNJUDGED_SHOWN = 5
PER_IMAGE, CONFUSION, CALIBRATION, DIAGNOSTICS, UNJUDGED, PAGE = (
    "per_image.parquet",
    "confusion.parquet",
    "calibration.json",
    "diagnostics.json",
    "unjudged.parquet",
    "evaluation.html",
)
UNJUDGED_SCHEMA = pa.schema([("key", pa.string()), ("kind", pa.string()), ("reason", pa.string())])
OVERLAYS, WORST = "overlays", "worst"
COUNTS = ("intersection", "predicted", "labelled")
MEANS = ("miou", "macc", "aacc", "fwiou", "mdice")

Counts = dict[str, NDArray[np.int64]]
"""intersection, predicted and labelled pixels, each (images, K) int64."""


def evaluate(workspace: str, recipe: Recipe, instead: EvaluateConfig | None = None) -> Receipt:
    """Run the stage; with `instead` of the recipe's section it is not the latest (registration judges the champion)."""
    config = instead or recipe.evaluate
    dataset = prepared_dataset(workspace, recipe, config.dataset)
    if config.predictions is not None:
        return _evaluate_predictions(workspace, config, dataset, recipe, latest=instead is None)
    mlflow_run = None
    model_uri = config.model
    if model_uri is None:
        trained = latest_receipt(workspace, "train")
        unsent.send(recipe.tracking, trained)
        model_uri, mlflow_run = trained.results["model"], trained.results["mlflow_run"]
    with fetch_model(model_uri, recipe.tracking) as model:
        receipt = run_stage(
            "evaluate",
            workspace=workspace,
            config=config.model_copy(update=BY_DIGEST),
            inputs={"model": model.digest, "dataset": dataset.split_digest(config.split), "train": dataset.digest},
            packages=PACKAGES,
            latest=instead is None,
            body=lambda run: _evaluate(run, config, dataset, model, recipe, mlflow_run),
        )
    if receipt.cached:
        unsent.send(recipe.tracking, receipt)
    return receipt


def read_counts(receipt: Receipt) -> tuple[list[str], Counts]:
    """Keys and per-image counts of an evaluation."""
    with receipt.folder.open(PER_IMAGE) as handle:
        table = pq.read_table(handle)
    return table["key"].to_pylist(), {n: np.array(table[n].to_pylist(), np.int64) for n in COUNTS}


def _evaluate_predictions(
    workspace: str, config: EvaluateConfig, dataset: Dataset, recipe: Recipe, *, latest: bool
) -> Receipt:
    predictions = open_predictions(str(config.predictions), dataset, config.split)
    return run_stage(
        "evaluate",
        workspace=workspace,
        config=EvaluateConfig(split=config.split, overlays=config.overlays),  # the others have no effect
        inputs={
            "predictions": predictions.digest,
            "dataset": dataset.split_digest(config.split),
            "train": dataset.digest,
        },
        packages=PACKAGES,
        latest=latest,
        body=lambda run: _evaluate(run, config, dataset, predictions, recipe, None),
    )


def _evaluate(
    run: StageRun,
    config: EvaluateConfig,
    dataset: Dataset,
    judged: FetchedModel | Predictions,
    recipe: Recipe,
    mlflow_run: str | None,
) -> None:
    if isinstance(judged, FetchedModel):
        _check_classes(dataset, judged)
    measured = measure(config, dataset, judged)
    if not measured.keys:
        first = measured.unjudged[0]
        raise RepsepError(
            f"no image of the split {config.split} could be judged; the first, {first.key}: {first.reason}"
        )
    counts = dict(zip(COUNTS, measured.counts.transpose(1, 0, 2), strict=True))
    scores = scores_from_counts(*(counts[name].sum(axis=0) for name in COUNTS))
    edges = boundary_scores_from_counts(*measured.boundary.sum(axis=0))
    pixels, right = measured.calibration
    reliability = reliability_from_counts(pixels, right, measured.confidence) if pixels.any() else None
    corrupted = {point: miou_of(matrix) for point, matrix in measured.confusion.items() if point != CLEAN}
    kept = retention(scores.miou, corrupted) if corrupted else None
    prior = prior_scores(dataset, config.split)
    diagnostics = mean_diagnostics(measured.diagnostics)
    _write_per_image(run, measured.keys, counts, measured.boundary)
    _write_confusion(run, measured, dataset.class_names)
    bins = {"pixels": pixels.tolist(), "right": right.tolist(), "confidence": measured.confidence.tolist()}
    run.folder.write(CALIBRATION, json.dumps(bins, indent=1).encode())
    run.folder.write(DIAGNOSTICS, json.dumps(_without_nan(diagnostics), indent=1).encode())
    for number, picture in measured.pictures.items():
        run.folder.write(f"{OVERLAYS}/{number:03d}.jpg", picture)
    run.folder.write(UNJUDGED, _parquet(pa.Table.from_pylist([vars(u) for u in measured.unjudged], UNJUDGED_SCHEMA)))
    run.results = {
        **_about(judged, config),
        "dataset": dataset.folder.uri,
        "evaluation": dataset.split_digest(config.split),
        "mlflow_run": mlflow_run,
        "split": config.split,
        "images": len(measured.keys),
        "unjudged": dict(Counter(image.kind for image in measured.unjudged)),
        **{name: _number(v) for name, v in scores.means().items()},
        "boundary_miou": _number(edges.miou),
        "ece": None if reliability is None else _number(reliability.ece),
        "classes_scored": scores.classes_scored,
        "retention": None if kept is None else _number(kept.overall),
        "retention_by_category": {} if kept is None else {k: _number(v) for k, v in kept.categories.items()},
        "prior_miou": _number(prior.miou),
        "prior_aacc": _number(prior.aacc),
        "iou": _by_class(dataset, scores.iou),
        "boundary_iou": _by_class(dataset, edges.iou),
    }
    for image in measured.unjudged[:UNJUDGED_SHOWN]:
        say(f"evaluate: warning: {image.key} is not judged, {image.kind}: {image.reason}")
    worst = _worst(config, dataset, judged, measured)
    for number, (_, _, picture) in enumerate(worst):
        run.folder.write(f"{WORST}/{number:03d}.jpg", picture)
    run.results["worst"] = [
        {"key": key, "miou": _number(miou), "picture": f"{WORST}/{number:03d}.jpg"}
        for number, (key, miou, _) in enumerate(worst)
    ]
    page = evaluation_page(dataset, measured, run.results, reliability, diagnostics, worst)
    run.folder.write(PAGE, page.encode())
    run.results["page"] = run.folder.uri_of(PAGE)
    pictures = [*(f"{OVERLAYS}/{n:03d}.jpg" for n in measured.pictures), *(w["picture"] for w in run.results["worst"])]
    run.outputs = [PER_IMAGE, CONFUSION, CALIBRATION, DIAGNOSTICS, UNJUDGED, PAGE, *pictures]
    if mlflow_run is not None:
        _log(recipe, mlflow_run, run, page)


def _about(judged: FetchedModel | Predictions, config: EvaluateConfig) -> dict[str, Any]:
    """What was judged and in which way."""
    if isinstance(judged, Predictions):
        made_by = {"model": judged.version, "model_digest": judged.model_digest}
        return made_by | {"predictions": judged.folder.uri, "corruptions": "none"}
    ways = config.model_dump(mode="json", include={*SEGMENTING, "corruptions"})
    return {"model": judged.uri, "model_digest": judged.digest, "predictions": None} | ways


def _log(recipe: Recipe, mlflow_run: str, run: StageRun, page: str) -> None:
    results = run.results
    names = (*MEANS, "boundary_miou", "ece", "retention", "prior_miou")
    values = {f"eval/{name}": results[name] for name in names if results[name] is not None}
    values |= {f"eval_iou/{name}": iou for name, iou in results["iou"].items() if iou is not None}
    try:
        if tracking.run_exists(recipe.tracking, mlflow_run):
            logger = tracking.RunLogger(tracking.tracking_uri(recipe.tracking), mlflow_run)
            logger.metrics(values)
            logger.text(page, PAGE)
            logger.finish_if_running()
    except RepsepError as error:  # no reason to lose an evaluation
        unsent.keep(run.folder, mlflow_run, metrics=tracking.measured(values, 0), files={PAGE: page.encode()})
        say(f"evaluate: warning: the scores are not in MLflow, they are kept for it: {error}")


def _worst(
    config: EvaluateConfig, dataset: Dataset, judged: FetchedModel | Predictions, measured: Measured
) -> list[tuple[str, float, bytes]]:
    """Key, mIoU and picture of the images with the lowest mIoU."""
    mious = np.array([scores_from_counts(*image).miou for image in measured.counts])
    order = np.argsort(np.where(np.isnan(mious), np.inf, mious), kind="stable")[: 2 * config.overlays]
    starts = dataset.split(config.split).starts
    numbers = {measured.keys[i]: measured.numbers[i] for i in order.tolist()}
    groups = {key: int(np.searchsorted(starts, number, side="right")) - 1 for key, number in numbers.items()}
    pictures = drawn(config, dataset, judged, groups)
    return [(measured.keys[i], float(mious[i]), pictures[measured.keys[i]]) for i in order.tolist()]


def prior_scores(dataset: Dataset, split: str) -> Scores:
    """What knowing only the position gives: the commonest class of train at each pixel position, no image read.

    Where sizes differ, masks are brought to the commonest one (nearest); of more than 2,000 train masks an even
    sample is taken.
    """
    sizes: Counter[tuple[int, ...]] = Counter()
    masks = list(dataset.split("train").masks(PRIOR_MASKS))
    sizes.update(m.shape for m in masks)
    height, width = sizes.most_common(1)[0][0]
    votes = np.zeros((dataset.num_classes, height, width), np.int32)
    for mask in masks:
        resized = _nearest(mask, (height, width))
        for k in np.unique(resized):
            if k < dataset.num_classes:
                votes[k] += resized == k
    guess = votes.argmax(axis=0).astype(np.uint8)
    counts = [image_counts(_nearest(guess, m.shape), m, dataset.num_classes) for m in dataset.split(split).masks(10**9)]
    return scores_from_counts(*np.sum(counts, axis=0))


def _nearest(mask: UInt8, size: tuple[int, ...]) -> UInt8:
    if mask.shape == size:
        return mask
    rows = (np.arange(size[0]) + 0.5) * (mask.shape[0] / size[0])
    columns = (np.arange(size[1]) + 0.5) * (mask.shape[1] / size[1])
    return mask[rows.astype(np.int64)][:, columns.astype(np.int64)]


def _check_classes(dataset: Dataset, model: FetchedModel) -> None:
    own = [c["name"] for c in load_classes(model.directory)["classes"]]
    if own != dataset.class_names:
        raise UsageError(
            f"the model knows the classes {own}, the dataset {dataset.folder.uri} has {dataset.class_names}; "
            "they must be the same"
        )


def _write_per_image(run: StageRun, keys: list[str], counts: Counts, boundary: NDArray[np.int64]) -> None:
    columns = {name: counts[name] for name in COUNTS}
    columns |= {"boundary_intersection": boundary[:, 0], "boundary_union": boundary[:, 1]}
    table = pa.table({"key": keys} | {name: [row.tolist() for row in v] for name, v in columns.items()})
    run.folder.write(PER_IMAGE, _parquet(table))


def _write_confusion(run: StageRun, measured: Measured, names: list[str]) -> None:
    """A row for each corruption, severity (clean, 0 first) and class of the labels; a column for each prediction."""
    rows = [
        {"corruption": name, "severity": severity, "label": label}
        | {f"predicted {k} {predicted}": int(counts[k]) for k, predicted in enumerate(names)}
        for (name, severity), matrix in measured.confusion.items()
        for label, counts in zip(names, matrix, strict=True)
    ]
    run.folder.write(CONFUSION, _parquet(pa.Table.from_pylist(rows)))


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out)
    return out.getvalue()


def _by_class(dataset: Dataset, values: NDArray[np.float64]) -> dict[str, float | None]:
    return dict(zip(dataset.class_names, (_number(v) for v in values), strict=True))


def _without_nan(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    return _number(value) if isinstance(value, float) else value


def _number(value: float) -> float | None:
    return None if np.isnan(value) else round(float(value), 6)
