"""Evaluation by Ray Data: each row group of the split goes to an actor that holds the model, or reads masks."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import ray
import torch
from ray.util.annotations import RayDeprecationWarning

from pipelines import cluster
from pipelines.config import EvaluateConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import RepsepError
from pipelines.evaluation.measures import Judge, Measured, together
from pipelines.evaluation.predictions import MaskJudge, Place, Predictions
from pipelines.models import FetchedModel, load_files
from pipelines.progress import Progress
from pipelines.storage import Folder

RETRIES = 3
"""How often a row group goes again whose worker was lost."""

MakeJudge = Callable[[], Judge | MaskJudge]
"""What a worker calls to have a judge of its own."""


def measure(config: EvaluateConfig, dataset: Dataset, judged: FetchedModel | Predictions) -> Measured:
    """All images of the split. Raises RepsepError if some did not come through."""
    cluster.connect(dashboard=False)
    cluster.refuse_local(dataset.folder.uri, "the dataset")
    if isinstance(judged, Predictions):
        cluster.refuse_local(judged.folder.uri, "evaluate.predictions")
    split = dataset.split(config.split)
    make, found = _maker(config, dataset, judged), dict[int, Measured]()
    gpu = isinstance(judged, FetchedModel) and cluster.has_gpu()
    progress = Progress("evaluate: image", len(split))
    trouble = ""
    for _ in range(RETRIES):
        left = [group for group in range(split.num_groups) if len(split.rows(group)) and group not in found]
        if not left:
            break
        try:
            for part in _round(left, make, gpu):
                group = int(np.searchsorted(split.starts, part.first, side="right")) - 1
                if group not in found:
                    found[group] = part
                    progress.advance(len(part.keys) + len(part.unjudged))
        except ray.exceptions.RayError as error:  # a worker or a node was lost: what is left goes again
            trouble = f"{type(error).__name__}: {str(error).strip()[-800:]}"
    if len(parts := list(found.values())) < sum(1 for g in range(split.num_groups) if len(split.rows(g))):
        raise RepsepError(f"the evaluation came to no end. {trouble}")
    return together(parts)


def drawn(
    config: EvaluateConfig, dataset: Dataset, judged: FetchedModel | Predictions, keys: Mapping[str, int]
) -> dict[str, bytes]:
    """Image, labels and prediction of these images, by key; `keys` says the row group of each."""
    if not keys:
        return {}
    gpus = 1 if isinstance(judged, FetchedModel) and cluster.has_gpu() else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_draw)
    found: dict[str, bytes] = ray.get(task.remote(_maker(config, dataset, judged), dict(keys)))
    return found


def _draw(make: MakeJudge, keys: dict[str, int]) -> dict[str, bytes]:
    judge = make()
    return {key: judge.picture(key, group) for key, group in keys.items()}


def _maker(config: EvaluateConfig, dataset: Dataset, judged: FetchedModel | Predictions) -> MakeJudge:
    if isinstance(judged, Predictions):
        places = ray.put(judged.places)
        return functools.partial(_mask_judge, judged.folder.uri, places, dataset.folder.uri, config)
    return functools.partial(_model_judge, ray.put(judged.files()), dataset.folder.uri, config)


def _model_judge(files: Any, dataset: str, config: EvaluateConfig) -> Judge:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    return Judge(load_files(ray.get(files)).to(device), open_dataset(dataset), config)


def _mask_judge(predictions: str, places: Any, dataset: str, config: EvaluateConfig) -> MaskJudge:
    torch.set_num_threads(1)
    found: dict[str, Place] = ray.get(places)
    return MaskJudge(Folder(predictions), found, open_dataset(dataset), config)


def _round(groups: list[int], make: MakeJudge, gpu: bool) -> Iterator[Measured]:
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if gpu else 0
    actors = min(len(groups), gpus or max(1, int(there.get("CPU", 1))))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Ray 2.60 deprecates every way to give an actor's options and names no other yet.
    warnings.filterwarnings("ignore", message="`ray_remote_args", category=RayDeprecationWarning)
    data = ray.data.from_items([{"group": group} for group in groups], override_num_blocks=len(groups))
    measured = data.map_batches(
        JudgeActor,
        fn_constructor_args=(make,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=1 if gpus else max(0.5, 1 - 0.5 / actors),
        num_gpus=1 if gpus else 0,
    )
    for row in measured.iter_rows():
        yield Measured.from_bytes(row["measured"])


class JudgeActor:
    """The judge's process."""

    def __init__(self, make: MakeJudge) -> None:
        self.judge = make()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"measured": [self.judge(int(group)).to_bytes() for group in batch["group"]]}
