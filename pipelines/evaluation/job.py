"""Evaluation by Ray Data: each row group of the split goes to an actor that holds the model."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
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
from pipelines.models import FetchedModel, load_files
from pipelines.progress import Progress

RETRIES = 3
"""How often a row group goes again whose worker was lost."""


def measure(config: EvaluateConfig, dataset: Dataset, model: FetchedModel) -> Measured:
    """All images of the split. Raises RepsepError if some did not come through."""
    cluster.connect(dashboard=False)
    cluster.refuse_local(dataset.folder.uri, "the dataset")
    split = dataset.split(config.split)
    files, found = ray.put(model.files()), dict[int, Measured]()
    progress = Progress("evaluate: image", len(split))
    trouble = ""
    for _ in range(RETRIES):
        left = [group for group in range(split.num_groups) if len(split.rows(group)) and group not in found]
        if not left:
            break
        try:
            for part in _round(left, files, dataset.folder.uri, config):
                group = int(np.searchsorted(split.starts, part.first, side="right")) - 1
                if group not in found:
                    found[group] = part
                    progress.advance(len(part.keys))
        except ray.exceptions.RayError as error:  # a worker or a node was lost: what is left goes again
            trouble = f"{type(error).__name__}: {str(error).strip()[-800:]}"
    if len(parts := list(found.values())) < sum(1 for g in range(split.num_groups) if len(split.rows(g))):
        raise RepsepError(f"the evaluation came to no end. {trouble}")
    return together(parts)


def drawn(config: EvaluateConfig, dataset: Dataset, model: FetchedModel, keys: Mapping[str, int]) -> dict[str, bytes]:
    """Image, labels and prediction of these images, by key; `keys` says the row group of each."""
    if not keys:
        return {}
    gpus = 1 if cluster.has_gpu() else 0
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=RETRIES)(_draw)
    found: dict[str, bytes] = ray.get(task.remote(ray.put(model.files()), dataset.folder.uri, config, dict(keys)))
    return found


def _draw(files: Mapping[str, bytes], dataset: str, config: EvaluateConfig, keys: dict[str, int]) -> dict[str, bytes]:
    judge = _judge(files, dataset, config)
    return {key: judge.picture(key, group) for key, group in keys.items()}


def _judge(files: Mapping[str, bytes], dataset: str, config: EvaluateConfig) -> Judge:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    return Judge(load_files(files).to(device), open_dataset(dataset), config)


def _round(groups: list[int], files: Any, dataset: str, config: EvaluateConfig) -> Iterator[Measured]:
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    actors = min(len(groups), gpus or max(1, int(there.get("CPU", 1))))
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    # Ray 2.60 deprecates every way to give an actor's options and names no other yet.
    warnings.filterwarnings("ignore", message="`ray_remote_args", category=RayDeprecationWarning)
    data = ray.data.from_items([{"group": group} for group in groups], override_num_blocks=len(groups))
    measured = data.map_batches(
        JudgeActor,
        fn_constructor_args=(files, dataset, config),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
        num_cpus=1 if gpus else max(0.5, 1 - 0.5 / actors),
        num_gpus=1 if gpus else 0,
    )
    for row in measured.iter_rows():
        yield Measured.from_bytes(row["measured"])


class JudgeActor:
    """The model's process."""

    def __init__(self, files: Any, dataset: str, config: EvaluateConfig) -> None:
        self.judge = _judge(ray.get(files), dataset, config)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[bytes]]:
        return {"measured": [self.judge(int(group)).to_bytes() for group in batch["group"]]}
