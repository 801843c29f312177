"""What every training worker runs.

A thin frame around repsep_model.training that distributes, checkpoints and reports.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
import warnings
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
import torch.distributed as dist
from ray.train.v2._internal.execution import context as ray_train_context
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pipelines import tracking
from pipelines.config import LossConfig, ModelConfig, TrainConfig
from pipelines.dataset import Dataset, Split, TrainLoader, open_dataset
from pipelines.progress import Progress
from repsep_model.checkpoint import save_segmentor
from repsep_model.config import SegmentorConfig
from repsep_model.inference import fill_colour
from repsep_model.losses import LossWeights
from repsep_model.optim import Ema, parameter_groups
from repsep_model.segmentor import Segmentor, build_segmentor
from repsep_model.training import NonFiniteLossError, StepSettings, TrainState, train_step, validate
from repsep_model.transforms import Augmentation, class_probabilities

STATE, BEST = "state.pt", "best"


def segmentor_config(model: ModelConfig, num_classes: int) -> SegmentorConfig:
    """The recipe's model section as the library's config."""
    return SegmentorConfig(num_classes=num_classes, **model.model_dump(exclude={"pretrained"}))


def loss_weights(loss: LossConfig) -> LossWeights:
    return LossWeights(**loss.model_dump())


@dataclass(frozen=True)
class LoopSettings:
    """What a worker is sent: plain values, so that any version of pickle carries them."""

    config: dict[str, Any]
    dataset: str
    tracking_uri: str
    mlflow_run: str | None

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self)}


def train_loop(settings: dict[str, Any]) -> str | None:
    """What every worker runs. Returns why training stopped early, or None."""
    config = TrainConfig.model_validate(settings["config"])
    ray_train_context.logger.setLevel(logging.WARNING)  # INFO prints every reported metric of every rank
    # Our norms leave channels-last strides on 1 x 1 convolutions; DDP copies those few gradients and says so each time.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
    worker = _Worker.start(config, open_dataset(settings["dataset"]))
    logger = (
        tracking.RunLogger(settings["tracking_uri"], settings["mlflow_run"])
        if worker.rank == 0 and settings["mlflow_run"]
        else None
    )
    state, steps = worker.state, worker.settings
    progress = Progress("train: step", config.steps, done=state.step)
    batches = worker.loader.steps(
        state.step,
        config.steps,
        batch_size=config.batch_size,
        micro_batch=config.micro_batch,
        rank=worker.rank,
        world_size=worker.world_size,
    )
    clock = _Clock()
    while state.step < config.steps:
        with clock.waiting():
            batch = next(batches)
        try:
            metrics = train_step(
                state, batch, steps, rank=worker.rank, world_size=worker.world_size, all_reduce=worker.all_reduce
            )
        except NonFiniteLossError as error:
            return str(error)  # every rank sees the same sums, so every rank stops here
        if worker.rank == 0:
            progress.advance(1, f"loss {metrics['loss']:.3f}")
            if logger is not None and state.step % config.runtime.log_every == 0:
                logger.metrics(metrics | clock.rates(config.batch_size), state.step)
        if state.step % config.validate_every == 0 or state.step == config.steps:
            with clock.paused():
                worker.validate_and_report(metrics | clock.rates(config.batch_size), logger)
    worker.loader.close()
    return None


class _Clock:
    """Images per second and the share of the time spent waiting for data; validation does not count."""

    def __init__(self) -> None:
        self.began = time.monotonic()
        self.waited = 0.0
        self.left_out = 0.0
        self.steps = 0

    def waiting(self) -> Any:
        return _Timer(self._wait)

    def paused(self) -> Any:
        return _Timer(self._pause)

    def rates(self, batch_size: int) -> dict[str, float]:
        worked = max(time.monotonic() - self.began - self.left_out, 1e-9)
        return {"images_per_s": self.steps * batch_size / worked, "data_wait_share": self.waited / worked}

    def _wait(self, seconds: float) -> None:
        self.waited += seconds
        self.steps += 1

    def _pause(self, seconds: float) -> None:
        self.left_out += seconds


class _Timer:
    def __init__(self, then: Any) -> None:
        self.then = then

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.then(time.monotonic() - self.began)


@dataclass
class _Worker:
    """One rank: its model, data and place in the group."""

    config: TrainConfig
    dataset: Dataset
    state: TrainState
    settings: StepSettings
    loader: TrainLoader
    validation: Split
    rank: int
    world_size: int
    best_miou: float = -1.0
    best_step: int = 0
    best: Path | None = None

    @classmethod
    def start(cls, config: TrainConfig, dataset: Dataset) -> _Worker:
        context = ray.train.get_context()
        rank, world_size = context.get_world_rank(), context.get_world_size()
        device = ray.train.torch.get_device()
        if device.type == "cpu":
            torch.set_num_threads(max(1, int(config.runtime.cpus_per_worker)))
        torch.manual_seed(config.seed)
        raw = (
            build_segmentor(segmentor_config(config.model, dataset.num_classes), config.model.pretrained)
            .to(device)
            .train()
        )
        model = (
            DistributedDataParallel(raw, device_ids=[device] if device.type == "cuda" else None)
            if world_size > 1
            else raw
        )
        groups = parameter_groups(
            raw,
            lr=config.lr,
            weight_decay=config.weight_decay,
            layer_decay=config.layer_decay,
            head_lr_scale=config.head_lr_scale,
        )
        state = TrainState(raw, model, torch.optim.AdamW(groups, lr=config.lr), Ema(raw, config.ema))
        settings = StepSettings(
            loss_weights(config.loss), config.steps, config.warmup_steps, config.clip, config.bf16, config.seed
        )
        training, validation = _splits(config, dataset)
        augmentation = Augmentation(**config.augment.model_dump())
        loader = TrainLoader(
            training,
            augmentation=augmentation,
            fill=fill_colour(raw),
            seed=config.seed,
            threads=config.runtime.loader_threads,
            class_probabilities=None
            if config.rare_class_temperature is None
            else class_probabilities(dataset.manifest["splits"]["train"]["pixels"], config.rare_class_temperature),
        )
        worker = cls(config, dataset, state, settings, loader, validation, rank, world_size)
        if (checkpoint := ray.train.get_checkpoint()) is not None:
            with checkpoint.as_directory() as directory:
                worker._restore(Path(directory))
        return worker

    def all_reduce(self, tensor: Tensor) -> None:
        if self.world_size > 1:
            dist.all_reduce(tensor)

    def validate_and_report(self, metrics: dict[str, float], logger: tracking.RunLogger | None) -> None:
        """Validate the moving average over all ranks, then checkpoint; the checkpoint holds the best model so far."""
        average: Segmentor = self.state.ema.model  # type: ignore[assignment]
        samples = (
            (image, mask)
            for _, image, mask in self.validation.share(self.rank, self.world_size, self.config.validate_images)
        )
        scores = validate(average, samples, bf16=self.config.bf16, all_reduce=self.all_reduce).scores()
        with tempfile.TemporaryDirectory() as temporary:
            directory = Path(temporary)
            if scores.miou > self.best_miou:
                self.best_miou, self.best_step = scores.miou, self.state.step
                self.best = None
            metrics = metrics | {f"val/{name}": value for name, value in scores.means().items()}
            metrics |= {
                "miou": scores.miou,
                "step": self.state.step,
                "best_miou": self.best_miou,
                "best_step": self.best_step,
            }
            metrics["parameters"] = sum(p.numel() for p in self.state.raw.parameters())
            checkpoint = None
            if self.rank == 0:
                self._save(directory, average)
                checkpoint = ray.train.Checkpoint.from_directory(directory)
                if logger is not None:
                    per_class = {
                        f"val_iou/{n}": float(v) for n, v in zip(self.dataset.class_names, scores.iou, strict=True)
                    }
                    logger.metrics(
                        {k: v for k, v in metrics.items() if k.startswith("val/")} | per_class, self.state.step
                    )
            ray.train.report(metrics, checkpoint=checkpoint)
        # A reported checkpoint is only safe once the controller has committed it: a worker lost before would lose it.
        ray.train.get_all_reported_checkpoints(consistency_mode=ray.train.CheckpointConsistencyMode.COMMITTED)

    def _save(self, directory: Path, average: Segmentor) -> None:
        state = self.state
        torch.save(
            {
                "step": state.step,
                "model": state.raw.state_dict(),
                "ema": state.ema.state_dict(),
                "optimizer": state.optimizer.state_dict(),
            },
            directory / STATE,
        )
        if self.best is None:
            self.best = Path(tempfile.mkdtemp(prefix="repsep-best-"))
            save_segmentor(average, self.best, classes=self.dataset.classes_file)
        (directory / BEST).mkdir()
        for file in self.best.iterdir():
            (directory / BEST / file.name).write_bytes(file.read_bytes())
        (directory / "best.json").write_text(json.dumps({"miou": self.best_miou, "step": self.best_step}))

    def _restore(self, directory: Path) -> None:
        saved = torch.load(directory / STATE, map_location=self.state.raw.mean.device, weights_only=True)
        self.state.raw.load_state_dict(saved["model"])
        self.state.ema.load_state_dict(saved["ema"])
        self.state.optimizer.load_state_dict(saved["optimizer"])
        self.state.step = saved["step"]
        best = json.loads((directory / "best.json").read_text())
        self.best_miou, self.best_step = best["miou"], best["step"]
        self.best = Path(tempfile.mkdtemp(prefix="repsep-best-"))
        for file in (directory / BEST).iterdir():
            (self.best / file.name).write_bytes(file.read_bytes())


def _splits(config: TrainConfig, dataset: Dataset) -> tuple[Split, Split]:
    if config.holdout == 0:
        return dataset.split("train"), dataset.split("val")
    full = dataset.split("train")
    return full.held_out(config.holdout, 0, inside=False), full.held_out(config.holdout, 0, inside=True)
