"""Distributed training with Ray Train: the stage. What every worker runs is in train_loop.py."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines import cluster, tracking
from pipelines.config import ModelConfig, Recipe, TrainConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.progress import say
from pipelines.stage import Receipt, StageRun, latest_receipt, run_stage
from pipelines.train_loop import BEST, LoopSettings, segmentor_config, train_loop
from repsep_model.segmentor import build_segmentor

PACKAGES = ("pipelines", "repsep_model")


def train(workspace: str, recipe: Recipe) -> Receipt:
    """Run the stage: `<train>/model/` becomes the moving average with the best in-loop mIoU (the earliest on ties)."""
    config = recipe.train
    check_batch(config, config.runtime.workers, "train.runtime.workers")
    dataset = open_dataset(config.dataset or latest_receipt(workspace, "prepare").results["dataset"])
    check_model(config.model, dataset.num_classes, config.augment.crop)
    return run_stage(
        "train",
        workspace=workspace,
        config=config,
        inputs={"dataset": dataset.digest},
        packages=PACKAGES,
        lease=True,
        begin=lambda: _begin(recipe),
        body=lambda run: _fit(run, recipe, dataset),
    )


def _begin(recipe: Recipe) -> dict[str, Any]:
    return {"mlflow_run": tracking.start_run(recipe.tracking, "train", tags={"repsep.stage": "train"})}


def check_batch(config: TrainConfig, workers: int, key: str) -> None:
    """A worker without an image would wait for the others for ever: UsageError."""
    if config.batch_size < workers:
        raise UsageError(
            f"train.batch_size={config.batch_size} is less than {key}={workers}: each worker needs an image a step"
        )


def check_model(model: ModelConfig, num_classes: int, crop: int) -> None:
    """Build it once without memory: a wrong backbone is a UsageError before a cluster is asked for."""
    try:
        with torch.device("meta"):
            side = build_segmentor(segmentor_config(model, num_classes)).fixed_window
    except ValueError as error:
        raise UsageError(f"train.model.backbone: {error}") from error
    if side is not None and crop > side:
        say(
            f"train: warning: {model.backbone} sees {side} x {side} pixels at once, a crop of {crop} goes to it in "
            "tiles that know nothing of each other; set train.model.backbone_args: {img_size: ...} or a smaller crop"
        )


def trainer(settings: LoopSettings, *, storage: str, name: str, callbacks: list[Any] | None = None) -> Any:
    """A TorchTrainer over `train_loop`; the same (storage, name) resumes. gloo on CPU, NCCL on GPUs."""
    runtime = TrainConfig.model_validate(settings.config).runtime
    use_gpu = cluster.has_gpu() if runtime.gpu is None else runtime.gpu
    return ray.train.torch.TorchTrainer(
        train_loop,  # type: ignore[arg-type] # Ray hands what the loop returns to the driver, its hint says None
        train_loop_config=settings.to_dict(),
        scaling_config=ray.train.ScalingConfig(
            num_workers=runtime.workers,
            use_gpu=use_gpu,
            resources_per_worker={"CPU": runtime.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            checkpoint_config=ray.train.CheckpointConfig(num_to_keep=2),
            failure_config=ray.train.FailureConfig(max_failures=runtime.max_failures),
            callbacks=callbacks or [],
        ),
    )


def fit(fitted: Any) -> tuple[dict[str, Any], Any]:
    """Run a trainer: its last metrics and checkpoint. Raises RepsepError with the first worker's reason."""
    try:
        result = fitted.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        reason = next(iter(failures.values()), error)
        raise RepsepError(f"training failed: {type(reason).__name__}: {reason}") from error
    if (stopped := result.return_value) is not None:
        raise RepsepError(f"training stopped: {stopped}")
    return result.metrics, result.checkpoint


def _fit(run: StageRun, recipe: Recipe, dataset: Dataset) -> None:
    config = recipe.train
    cluster.connect()
    uri = tracking.tracking_uri(recipe.tracking)
    for place, what in ((run.folder.uri, "the workspace"), (dataset.folder.uri, "the dataset"), (uri, "tracking.uri")):
        cluster.refuse_local(place, what)
    cluster.require(config.runtime.workers * config.runtime.cpus_per_worker, "train.runtime.workers")
    if not tracking.run_exists(recipe.tracking, run.started["mlflow_run"]):  # the tracking store is another by now
        run.restart(_begin(recipe))
    logger = tracking.RunLogger(uri, run.started["mlflow_run"])
    logger.params({"train": config.model_dump(mode="json")})
    logger.dataset(dataset.folder.uri, dataset.manifest["name"], dataset.digest)
    began = time.monotonic()
    settings = LoopSettings(config.model_dump(mode="json"), dataset.folder.uri, uri, run.started["mlflow_run"])
    try:
        metrics, checkpoint = fit(trainer(settings, storage=f"{run.folder.uri}/ray", name="run"))
    except BaseException:
        logger.finish("FAILED")
        raise
    with checkpoint.as_directory() as directory:
        (run.folder / "model").upload(Path(directory) / BEST)
    logger.finish()
    run.outputs = [f"model/{entry.key}" for entry in (run.folder / "model").list()]
    run.results = {
        "model": run.folder.uri_of("model"),
        "mlflow_run": run.started["mlflow_run"],
        "steps": metrics["step"],
        "miou": metrics["best_miou"],
        "best_step": metrics["best_step"],
        "parameters_millions": round(metrics["parameters"] / 1e6, 2),
        "images_per_s": round(metrics["images_per_s"], 2),
        "train_seconds": round(time.monotonic() - began, 1),
    }
