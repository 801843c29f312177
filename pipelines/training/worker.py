"""One rank: its model, its share of the data, its place in the group, and what it keeps."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.train
import ray.train.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipelines import tracking
from pipelines.config import LossConfig, ModelConfig, TrainConfig
from pipelines.dataset import Dataset, Split, open_dataset
from pipelines.errors import RepsepError
from pipelines.shard_cache import ShardCache
from pipelines.stage import digest_of
from pipelines.storage import Folder
from pipelines.train_loader import TrainLoader
from pipelines.training.checkpoint_folder import BEST, Record
from pipelines.training.checkpoints import Checkpoints, CheckpointsFailedError
from pipelines.training.parallel import DataParallel, FullySharded, Group, Strategy
from pipelines.training.preemption import PreemptionNotice
from pipelines.training.telemetry import Telemetry
from repsep_model.checkpoint import load_segmentor, save_segmentor
from repsep_model.config import SegmentorConfig
from repsep_model.finetune import init_from
from repsep_model.inference import fill_colour
from repsep_model.losses import LossWeights
from repsep_model.optim import parameter_groups
from repsep_model.segmentor import Segmentor, build_segmentor
from repsep_model.training import NonFiniteLossError, StepSettings, TrainState, train_step, validate
from repsep_model.transforms import Augmentation, class_probabilities

KEYS_SAID = 8


@dataclass(frozen=True)
class LoopSettings:
    """What a worker is sent: plain values, so that any version of pickle carries them."""

    config: dict[str, Any]
    dataset: str
    tracking_uri: str
    mlflow_run: str | None
    init: str | None = None
    """Folder of the segmentor to start from."""
    driver_bar: bool = False
    """Whether a person watches the driver's terminal."""


def segmentor_config(model: ModelConfig, num_classes: int, crop: int) -> SegmentorConfig:
    """The recipe's model section as the library's config, for training on crops of that side."""
    given = model.model_dump(exclude={"pretrained"})
    return SegmentorConfig(num_classes=num_classes, **given | {"window": model.window or crop})


def loss_weights(loss: LossConfig) -> LossWeights:
    return LossWeights(**loss.model_dump())


class Worker:
    """What `train_loop` works with; at the last whole checkpoint if there is one, else at the start."""

    def __init__(self, settings: LoopSettings, checkpoints_uri: str) -> None:
        self.config = config = TrainConfig.model_validate(settings.config)
        self.dataset = dataset = open_dataset(settings.dataset)
        self.group = group = _group()
        if group.device.type == "cpu":
            torch.set_num_threads(max(1, int(config.runtime.cpus_per_worker)))
        self.strategy: Strategy = FullySharded(group) if config.parallel == "fsdp" else DataParallel(group)
        self.state = _state(config, dataset, group, self.strategy, settings.init)
        weights = loss_weights(config.loss)
        self.step_settings = StepSettings(
            weights, config.steps, config.warmup_steps, config.clip, config.bf16, config.seed
        )
        training, self.validation = _splits(config, dataset)
        self.loader = _loader(config, dataset, training, self.state.raw)
        self.model_digest = digest_of({"model": self.state.raw.config.to_dict(), "parallel": config.parallel})
        self.best_miou, self.best_step = -1.0, 0
        self.best: Segmentor | None = None
        """The best model so far, in rank 0's memory: a full disk costs a checkpoint, not the run."""
        self.metrics: dict[str, float] = {}
        """What was reported last."""
        self.checkpoints = Checkpoints(checkpoints_uri, group, self.strategy.writers)
        self.checkpoints.restore(self._read)
        self.notice = PreemptionNotice(group, self.state.step)
        logged = group.rank == 0 and settings.mlflow_run is not None
        self.logger = tracking.RunLogger(settings.tracking_uri, str(settings.mlflow_run)) if logged else None
        self.telemetry = Telemetry(
            self.logger,
            config,
            rank=group.rank,
            world_size=group.world_size,
            classes=dataset.manifest["classes"],
            done=self.state.step,
            total=config.steps,
            optimizer=self.state.optimizer,
            driver_bar=settings.driver_bar,
            unsent=Folder(checkpoints_uri.rpartition("/ray/")[0] or checkpoints_uri),  # the stage's own
        )

    def batches(self) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """This rank's micro-batches of each step that is left."""
        return self.loader.steps(
            self.state.step,
            self.config.steps,
            batch_size=self.config.batch_size,
            micro_batch=self.config.micro_batch,
            rank=self.group.rank,
            world_size=self.group.world_size,
        )

    def step(self, batch: Sequence[tuple[Tensor, Tensor]]) -> dict[str, float]:
        """One optimizer step of all ranks. Raises NonFiniteLossError on all of them."""
        group = self.group
        return train_step(
            self.state,
            batch,
            self.step_settings,
            rank=group.rank,
            world_size=group.world_size,
            all_reduce=group.all_reduce,
        )

    def is_validation_due(self) -> bool:
        return self.state.step % self.config.validate_every == 0 or self.state.step == self.config.steps

    def is_checkpoint_due(self) -> bool:
        """With each validation and each `checkpoint_every` steps, if the one before is uploaded by then: a slow store
        makes them fewer, not the steps slower. At once when a machine is to be taken away.
        """
        every = self.config.runtime.checkpoint_every
        regular = self.is_validation_due() or (every is not None and self.state.step % every == 0)
        return self.notice.came(self.state.step) or (regular and not self.checkpoints.is_uploading())

    def validate(self, metrics: dict[str, float]) -> None:
        """Validate the moving average, each image on one rank; the best so far (the earliest on ties) is kept."""
        average, step, kept = self.strategy.whole_average(self.state), self.state.step, []  # type: ignore[var-annotated]
        self.group.spread_first(average.buffers())  # a BatchNorm's statistics are each rank's own
        share = self.validation.share(self.group.rank, self.group.world_size, self.config.validate_images)
        scores = validate(
            average,
            ((image, mask) for _, image, mask in share),
            bf16=self.config.bf16,
            all_reduce=self.group.all_reduce,
            keep=self.telemetry.keep,
            kept=kept,
        ).scores()
        if self.best_step == 0 or scores.miou > self.best_miou:
            self.best_miou, self.best_step = scores.miou, step
            if self.group.rank == 0:
                self.best = average.for_inference().cpu()
        self.telemetry.validated(scores, step, kept)
        self.metrics = metrics | self.telemetry.rates() | {f"val/{n}": v for n, v in scores.means().items()}
        self.metrics |= {"step": step, "miou": scores.miou, "best_miou": self.best_miou, "best_step": self.best_step}
        self.metrics["workers"] = self.group.world_size
        self.metrics["parameters"] = sum(p.numel() for p in self.state.raw.parameters())
        ray.train.report(self.metrics)

    def save(self) -> None:
        """A checkpoint, uploaded behind the next steps. Raises CheckpointsFailedError."""
        record = Record(
            step=self.state.step,
            best_miou=self.best_miou,
            best_step=self.best_step,
            metrics=self.metrics,
            model=self.model_digest,
            world_size=self.group.world_size,
            writers=self.strategy.writers,
        )
        self.checkpoints.save(record, self._write)

    def finish(self) -> None:
        """Wait until the last step's checkpoint is whole: what comes out of training is taken from it."""
        while not self.checkpoints.settle() or self.checkpoints.last_step != self.state.step:
            self.save()
        self.checkpoints.close()

    def explained(self, error: NonFiniteLossError) -> str:
        """What a person needs to look into it, in one paragraph and as tags of the run."""
        keys = self.loader.keys(error.step, self.config.batch_size)
        with contextlib.suppress(CheckpointsFailedError):  # the numbers are the reason that counts
            self.checkpoints.settle()
        last = self.checkpoints.last_uri
        where = "there is no checkpoint from before it"
        if last is not None:
            where = f"the last good checkpoint is {last}, of step {self.checkpoints.last_step}"
        if self.logger is not None:
            tags = {"step": str(error.step), "keys": " ".join(keys)[:5000], "last_good_checkpoint": last or "none"}
            with contextlib.suppress(RepsepError):  # MLflow is away: the message below says it all
                self.logger.tags({f"repsep.not_finite.{name}": value for name, value in tags.items()})
        more = f" and {len(keys) - KEYS_SAID} more" if len(keys) > KEYS_SAID else ""
        return f"{error}. The images of that step: {', '.join(keys[:KEYS_SAID])}{more}; {where}"

    def close(self) -> None:
        self.telemetry.close()
        self.loader.close()

    def _write(self, folder: Path) -> None:
        self.strategy.write(self.state, folder)
        if self.best is not None:
            try:
                save_segmentor(self.best, folder / BEST, classes=self.dataset.classes_file)
            except SafetensorError as error:  # how it says that a disk is full
                raise OSError(str(error)) from error

    def _read(self, folder: Path, record: Record) -> None:
        if record.model != self.model_digest:
            raise CheckpointsFailedError(f"{self.checkpoints.store.folder.uri} holds checkpoints of another model")
        self.strategy.read(self.state, folder)
        self.state.step, self.metrics = record.step, record.metrics
        self.best_miou, self.best_step = record.best_miou, record.best_step
        if self.group.rank == 0 and record.best_step:
            self.best = load_segmentor(folder / BEST)


def _group() -> Group:
    context = ray.train.get_context()
    return Group(
        rank=context.get_world_rank(),
        world_size=context.get_world_size(),
        node_rank=context.get_node_rank(),
        local_rank=context.get_local_rank(),
        device=ray.train.torch.get_device(),
    )


def _state(config: TrainConfig, dataset: Dataset, group: Group, strategy: Strategy, init: str | None) -> TrainState:
    """The same on every rank: weights come from the seed, or from `init`."""
    torch.manual_seed(config.seed)
    raw = build_segmentor(
        segmentor_config(config.model, dataset.num_classes, config.augment.crop), config.model.pretrained
    )
    if init is not None:
        with tempfile.TemporaryDirectory(prefix="repsep-init-") as temporary:
            folder = Folder(init)
            for entry in folder.list():
                (Path(temporary) / entry.key).write_bytes(folder.read(entry.key))
            init_from(raw, temporary, dataset.class_names)
    raw = raw.to(group.device).train()
    model, ema = strategy.spread(raw, config.ema, compiled=config.compile)
    raw.set_grad_checkpointing(config.runtime.grad_checkpointing)
    groups = parameter_groups(
        raw,
        lr=config.lr,
        weight_decay=config.weight_decay,
        layer_decay=config.layer_decay,
        head_lr_scale=config.head_lr_scale,
    )
    return TrainState(raw, model, torch.optim.AdamW(groups, lr=config.lr), ema)


def _splits(config: TrainConfig, dataset: Dataset) -> tuple[Split, Split]:
    cache = ShardCache.of(config.runtime.cache_gib)
    full = dataset.split("train", cache)
    if config.holdout == 0:
        return full, dataset.split("val", cache)
    return full.held_out(config.holdout, 0, inside=False), full.held_out(config.holdout, 0, inside=True)


def _loader(config: TrainConfig, dataset: Dataset, training: Split, raw: Segmentor) -> TrainLoader:
    temperature, pixels = config.rare_class_temperature, dataset.manifest["splits"]["train"]["pixels"]
    return TrainLoader(
        training,
        augmentation=Augmentation(**config.augment.model_dump()),
        fill=fill_colour(raw),
        seed=config.seed,
        threads=config.runtime.loader_threads,
        class_probabilities=None if temperature is None else class_probabilities(pixels, temperature),
    )
