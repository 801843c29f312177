"""How good a model is on a dataset's split: confusion over whole images, per class and per image, beside a blind prior.

The counts of every image are kept: registration compares two models by a paired bootstrap over them.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from numpy.typing import NDArray

from pipelines import cluster, tracking
from pipelines.config import EvaluateConfig, Recipe
from pipelines.dataset import Dataset, Split, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.models import FetchedModel, fetch_model, load_files
from pipelines.pictures import encoded, triptych
from pipelines.progress import Progress, say
from pipelines.stage import Receipt, StageRun, latest_receipt, run_stage
from repsep_model.checkpoint import load_classes
from repsep_model.images import UInt8
from repsep_model.inference import segment_image
from repsep_model.metrics import Scores, scores_from_counts

PACKAGES = ("pipelines", "repsep_model")
PRIOR_MASKS = 2000
PER_IMAGE, OVERLAYS = "per_image.parquet", "overlays"
COUNTS = ("intersection", "predicted", "labelled")
SEGMENTING = ("pixel_budget", "scales", "flip")

Counts = dict[str, NDArray[np.int64]]
"""intersection, predicted and labelled pixels, each (images, K) int64."""


def evaluate(workspace: str, recipe: Recipe, instead: EvaluateConfig | None = None) -> Receipt:
    """Run the stage; with `instead` of the recipe's section it is not the latest (registration judges the champion)."""
    config = instead or recipe.evaluate
    dataset = open_dataset(config.dataset or latest_receipt(workspace, "prepare").results["dataset"])
    mlflow_run = None
    model_uri = config.model
    if model_uri is None:
        trained = latest_receipt(workspace, "train").results
        model_uri, mlflow_run = trained["model"], trained["mlflow_run"]
    with fetch_model(model_uri, recipe.tracking) as model:
        return run_stage(
            "evaluate",
            workspace=workspace,
            config=config.model_copy(update={"model": None, "dataset": None}),  # their digests count, not their places
            inputs={"model": model.digest, "dataset": dataset.split_digest(config.split), "train": dataset.digest},
            packages=PACKAGES,
            latest=instead is None,
            body=lambda run: _evaluate(run, config, dataset, model, recipe, mlflow_run),
        )


def read_counts(receipt: Receipt) -> tuple[list[str], Counts]:
    """Keys and per-image counts of an evaluation."""
    with receipt.folder.open(PER_IMAGE) as handle:
        table = pq.read_table(handle)
    return table["key"].to_pylist(), {n: np.array(table[n].to_pylist(), np.int64) for n in COUNTS}


def _evaluate(
    run: StageRun,
    config: EvaluateConfig,
    dataset: Dataset,
    model: FetchedModel,
    recipe: Recipe,
    mlflow_run: str | None,
) -> None:
    _check_classes(dataset, model)
    keys, counts = _count_split(run, config, dataset, model)
    scores = scores_from_counts(*(counts[name].sum(axis=0) for name in COUNTS))
    prior = prior_scores(dataset, config.split)
    _write_per_image(run, keys, counts)
    per_class = dict(zip(dataset.class_names, (_number(v) for v in scores.iou), strict=True))
    run.results = {
        "model": model.uri,
        "model_digest": model.digest,
        "dataset": dataset.folder.uri,
        "evaluation": dataset.split_digest(config.split),
        "mlflow_run": mlflow_run,
        "split": config.split,
        **config.model_dump(mode="json", include=set(SEGMENTING)),
        "images": len(keys),
        **{name: _number(v) for name, v in scores.means().items()},
        "classes_scored": scores.classes_scored,
        "prior_miou": _number(prior.miou),
        "prior_aacc": _number(prior.aacc),
        "iou": per_class,
    }
    run.outputs = (
        [PER_IMAGE, *(f"{OVERLAYS}/{e.key}" for e in (run.folder / OVERLAYS).list())]
        if config.overlays
        else [PER_IMAGE]
    )
    if mlflow_run is not None:
        values = {f"eval/{n}": v for n, v in scores.means().items()} | {"eval/prior_miou": prior.miou}
        values |= {f"eval_iou/{n}": float(v) for n, v in zip(dataset.class_names, scores.iou, strict=True)}
        try:
            if tracking.run_exists(recipe.tracking, mlflow_run):
                tracking.RunLogger(tracking.tracking_uri(recipe.tracking), mlflow_run).metrics(values)
        except RepsepError as error:  # the receipt has them: no reason to lose an evaluation
            say(f"evaluate: warning: the scores are not in MLflow: {error}")


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
    counts = [
        _image_counts(_nearest(guess, m.shape), m, dataset.num_classes) for m in dataset.split(split).masks(10**9)
    ]
    return scores_from_counts(*np.sum(counts, axis=0))


def _count_split(
    run: StageRun, config: EvaluateConfig, dataset: Dataset, model: FetchedModel
) -> tuple[list[str], Counts]:
    """Each of several Ray tasks takes every n-th image; the counts come back by key: their number cannot matter."""
    cluster.connect()
    cluster.refuse_local(dataset.folder.uri, "the dataset")
    gpus = int(ray.cluster_resources().get("GPU", 0))
    workers = gpus or max(1, int(ray.cluster_resources().get("CPU", 1)))
    files: Any = ray.put(model.files())
    task = ray.remote(num_cpus=1, num_gpus=1 if gpus else 0, max_retries=3)(_evaluate_share)
    pending = [task.remote(files, dataset.folder.uri, config, rank, workers) for rank in range(workers)]
    found: dict[str, Any] = {}
    progress = Progress("evaluate: image", len(dataset.split(config.split)))
    while pending:
        done, pending = ray.wait(pending)
        for key, number, counts, picture in ray.get(done[0]):
            found[key] = counts
            if picture is not None:
                run.folder.write(f"{OVERLAYS}/{number:03d}.jpg", picture)
        progress.advance(len(found) - progress.done)
    keys = sorted(found)
    stacked = np.stack([found[key] for key in keys])
    return keys, {name: stacked[:, i] for i, name in enumerate(COUNTS)}


def _evaluate_share(
    files: Mapping[str, bytes], dataset_uri: str, config: EvaluateConfig, rank: int, workers: int
) -> list[Any]:
    """(key, number, (3, K) counts, picture or None) of this share's images."""
    dataset = open_dataset(dataset_uri)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    model = load_files(files).to(device)
    part: Split = dataset.split(config.split)
    every = max(1, len(part) // config.overlays) if config.overlays else 0
    segmenting: dict[str, Any] = config.model_dump(include=set(SEGMENTING))
    found = []
    first, _ = part.share_of(len(part), rank, workers)
    for number, (key, image, mask) in enumerate(part.share(rank, workers), first):
        labels = segment_image(model, image, **segmenting).labels
        shown = bool(config.overlays) and number % every == 0 and number // every < config.overlays
        picture = encoded(triptych((image, mask, labels), dataset.colours), "JPEG") if shown else None
        found.append((key, number, _image_counts(labels, mask, dataset.num_classes), picture))
    return found


def _image_counts(predicted: UInt8, mask: UInt8, num_classes: int) -> NDArray[np.int64]:
    """(3, K): intersection, predicted and labelled pixels among the labelled ones."""
    valid = mask < num_classes
    predicted, mask = predicted[valid], mask[valid]
    right = np.bincount(mask[predicted == mask], minlength=num_classes)
    return np.stack([right, np.bincount(predicted, minlength=num_classes), np.bincount(mask, minlength=num_classes)])


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


def _write_per_image(run: StageRun, keys: list[str], counts: Counts) -> None:
    out = io.BytesIO()
    pq.write_table(pa.table({"key": keys} | {name: [row.tolist() for row in counts[name]] for name in COUNTS}), out)
    run.folder.write(PER_IMAGE, out.getvalue())


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if np.isnan(value) else round(float(value), 6)
