"""Distributed training with Ray Train: the stage. What every worker runs is in training/."""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from ray.train.v2.api.exceptions import TrainingFailedError

from pipelines import cluster, tracking
from pipelines.config import ModelConfig, Recipe, TrainConfig
from pipelines.dataset import Dataset
from pipelines.errors import RepsepError, StoppedError, UsageError
from pipelines.models import FetchedModel, fetch_model
from pipelines.prepare import prepared_dataset
from pipelines.progress import on_terminal, say
from pipelines.stage import Receipt, StageRun, run_stage
from pipelines.training.checkpoint_folder import BEST, CheckpointFolder, DamagedCheckpointError, step_of
from pipelines.training.loop import train_loop
from pipelines.training.worker import LoopSettings, segmentor_config
from repsep_model.finetune import init_from
from repsep_model.pretrained import CheckpointError
from repsep_model.segmentor import build_segmentor

PACKAGES = ("pipelines", "repsep_model")


def train(workspace: str, recipe: Recipe, before: Callable[[], None] | None = None) -> Receipt:
    """Run the stage: `<train>/model/` becomes the moving average with the best in-loop mIoU (the earliest on ties).

    `before` may refuse it by raising; it is not called where the stage is done.
    """
    config = recipe.train
    check_batch(config, config.runtime.most_workers, "train.runtime.workers")
    dataset = prepared_dataset(workspace, recipe, config.dataset)
    check_model(config.model, dataset.num_classes, config.augment.crop, config.runtime.grad_checkpointing)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(fetch_model(config.init_from, recipe.tracking)) if config.init_from else None
        if source is not None:
            check_init(config.model, source, dataset, config.augment.crop)
        return run_stage(
            "train",
            workspace=workspace,
            config=config,
            inputs={"dataset": dataset.digest} | ({"init": source.digest} if source else {}),
            packages=PACKAGES,
            lease=True,
            begin=lambda: _begin(recipe),
            before=before,
            body=lambda run: _fit(run, recipe, dataset, source),
        )


def _begin(recipe: Recipe) -> dict[str, Any]:
    return {"mlflow_run": tracking.start_run(recipe.tracking, "train", tags={"repsep.stage": "train"})}


def check_batch(config: TrainConfig, workers: int, key: str) -> None:
    """A worker without an image would wait for the others for ever: UsageError."""
    if config.batch_size < workers:
        raise UsageError(
            f"train.batch_size={config.batch_size} is less than {key}={workers}: each worker needs an image a step"
        )


def check_model(model: ModelConfig, num_classes: int, crop: int, grad_checkpointing: bool = False) -> None:
    """Build it once without memory: a wrong backbone is a UsageError before a cluster is asked for."""
    try:
        with torch.device("meta"):
            built = build_segmentor(segmentor_config(model, num_classes, crop))
        built.set_grad_checkpointing(grad_checkpointing)
    except ValueError as error:
        raise UsageError(f"train.model.backbone: {error}") from error
    side = built.fixed_window
    if side is not None and crop > side:
        say(
            f"train: warning: {model.backbone} sees {side} x {side} pixels at once, a crop of {crop} goes to it in "
            "tiles that know nothing of each other; set train.model.backbone_args: {img_size: ...} or a smaller crop"
        )


def check_init(model: ModelConfig, source: FetchedModel, dataset: Dataset, crop: int) -> None:
    """Say what training will start from; a model of another architecture is a UsageError before a cluster is asked."""
    with torch.device("meta"):
        built = build_segmentor(segmentor_config(model, dataset.num_classes, crop))
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*copying from a non-meta parameter")  # only names and shapes
            report = init_from(built, source.directory, dataset.class_names)
    except (ValueError, CheckpointError) as error:
        raise UsageError(f"train.init_from: {error}") from error
    say(f"train: starts from {source.uri}: {report}")


def trainer(settings: LoopSettings, *, storage: str, name: str, callbacks: list[Any] | None = None) -> Any:
    """A TorchTrainer over `train_loop`; the same (storage, name) resumes. gloo on CPU, NCCL on GPUs."""
    runtime = TrainConfig.model_validate(settings.config).runtime
    use_gpu = cluster.has_gpu() if runtime.gpu is None else runtime.gpu
    uri = settings.tracking_uri

    def loop(given: dict[str, Any]) -> dict[str, Any]:
        return train_loop(LoopSettings(**given | {"tracking_uri": uri}), f"{storage}/{name}")

    # Ray shows and stores the loop's config, so no password is in it; what a function holds only goes to the workers.
    open_to_all = dataclasses.replace(settings, tracking_uri=tracking.shown(uri))
    return ray.train.torch.TorchTrainer(
        loop,  # type: ignore[arg-type] # Ray hands what the loop returns to the driver, its hint says None
        train_loop_config=dataclasses.asdict(open_to_all),
        scaling_config=ray.train.ScalingConfig(
            num_workers=runtime.workers,  # type: ignore[arg-type] # the hint is that of Ray's first version
            use_gpu=use_gpu,
            resources_per_worker={"CPU": runtime.cpus_per_worker} | ({"GPU": 1} if use_gpu else {}),
        ),
        run_config=ray.train.RunConfig(
            name=name,
            storage_path=storage,
            failure_config=ray.train.FailureConfig(max_failures=runtime.max_failures),
            callbacks=callbacks or [],
        ),
    )


def fit(fitted: Any) -> dict[str, Any]:
    """Run a trainer: its last metrics. Raises RepsepError with the first worker's reason."""
    try:
        with cluster.stoppable("training"):
            result = fitted.fit()
    except TrainingFailedError as error:
        failures = getattr(error, "worker_failures", {})
        reason = next(iter(failures.values()), error)
        raise RepsepError(f"training failed: {type(reason).__name__}: {reason}") from error
    if (stopped := result.return_value.get("stopped")) is not None:
        raise RepsepError(f"training stopped: {stopped}")
    metrics: dict[str, Any] = result.return_value["metrics"]
    return metrics


def _fit(run: StageRun, recipe: Recipe, dataset: Dataset, source: FetchedModel | None) -> None:
    config = recipe.train
    cluster.connect()
    uri = tracking.tracking_uri(recipe.tracking)
    for place, what in ((run.folder.uri, "the workspace"), (dataset.folder.uri, "the dataset"), (uri, "tracking.uri")):
        cluster.refuse_local(place, what)
    cluster.require(config.runtime.least_workers * config.runtime.cpus_per_worker, "train.runtime.workers")
    if not tracking.run_exists(recipe.tracking, run.started["mlflow_run"]):  # the tracking store is another by now
        run.restart(_begin(recipe))
    logger = tracking.RunLogger(uri, run.started["mlflow_run"])
    logger.params({"train": config.model_dump(mode="json")})
    logger.dataset(dataset.folder.uri, dataset.manifest["name"], dataset.digest)
    if source is not None:  # here it stays as it is, whatever becomes of it there
        (run.folder / "init").upload(source.directory)
    began = time.monotonic()
    settings = LoopSettings(
        config.model_dump(mode="json"),
        dataset.folder.uri,
        uri,
        run.started["mlflow_run"],
        init=run.folder.uri_of("init") if source is not None else None,
        driver_bar=on_terminal(),
    )
    try:
        metrics = fit(trainer(settings, storage=f"{run.folder.uri}/ray", name="run"))
        _take_best(run, CheckpointFolder(f"{run.folder.uri}/ray/run"), int(metrics["step"]))
    except BaseException as error:
        logger.finish("KILLED" if isinstance(error, StoppedError) else "FAILED")
        raise
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
        "data_wait_share": round(metrics["data_wait_share"], 4),
        "workers": metrics["workers"],
        "train_seconds": round(time.monotonic() - began, 1),
    }


def _take_best(run: StageRun, checkpoints: CheckpointFolder, last_step: int) -> None:
    """The stage's model comes out of the last step's checkpoint, which training waited for."""
    reason = "it is gone"
    for name in checkpoints.names():
        if step_of(name) == last_step:
            with tempfile.TemporaryDirectory(prefix="repsep-model-") as temporary:
                try:
                    checkpoints.fetch(name, Path(temporary), below=f"{BEST}/")
                except DamagedCheckpointError as error:
                    reason = str(error)
                    continue
                (run.folder / "model").upload(Path(temporary) / BEST)
                return
    raise RepsepError(f"the checkpoint of the last step cannot be used: {reason}; the same command again mends it")
