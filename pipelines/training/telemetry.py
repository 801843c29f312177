"""What a person can see of a training: how fast it is, what it waits for, its curves and pictures, and a bar.

Only rank 0 shows anything. What goes to MLflow goes through a thread (patient_tracking.py), so that neither a slow
server nor one that is away costs a step.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import torch
from ray.experimental import tqdm_ray

from pipelines import counters
from pipelines.config import TrainConfig
from pipelines.patient_tracking import PatientLogger
from pipelines.pictures import Sample, encoded, stacked, triptych
from pipelines.progress import Progress
from pipelines.storage import Folder
from pipelines.tracking import MachineMonitor, RunLogger
from repsep_model.metrics import Scores

SAMPLES, SAMPLE_SIDE = 4, 384
"""Images of a validation's picture, and their larger side there."""


class Telemetry:
    """One rank's view of the training. `classes` is the dataset's list, `done` of `total` steps are behind us.

    `driver_bar`: a person watches the driver, which draws a bar for us; otherwise rank 0 writes lines. `unsent`: where
    what MLflow could not be given is kept.

        with telemetry.waiting():
            batch = next(batches)
        metrics = train_step(...)
        telemetry.step(metrics, state.step)
        with telemetry.paused():
            kept = []
            scores = validate(..., keep=telemetry.keep, kept=kept).scores()
            telemetry.validated(scores, state.step, kept)
    """

    def __init__(
        self,
        logger: RunLogger | None,
        config: TrainConfig,
        *,
        rank: int,
        world_size: int,
        classes: Sequence[dict[str, Any]],
        done: int,
        total: int,
        optimizer: torch.optim.Optimizer | None = None,
        driver_bar: bool = False,
        unsent: Folder | None = None,
    ) -> None:
        self.classes, self.log_every, self.optimizer = classes, config.runtime.log_every, optimizer
        self.clock = Clock(config.batch_size)
        first = rank == 0
        self.logger = PatientLogger(logger, unsent) if first and logger is not None else None
        self.machine = MachineMonitor() if self.logger is not None else None
        bar = DriverBar(total=total - done, unit="step") if first and driver_bar else None
        label = f"train: from step {done}" if bar is not None and done else "train: step"
        self.progress = Progress(label, total, done=done, bar=bar) if first else None
        self.miou: float | None = None

    @property
    def keep(self) -> int:
        """How many predictions of its share this rank's validation is to keep."""
        return SAMPLES if self.logger is not None else 0

    def waiting(self) -> contextlib.AbstractContextManager[None]:
        """Around the wait for a batch."""
        return self.clock.waiting()

    def paused(self) -> contextlib.AbstractContextManager[None]:
        """Around what is not training: validation, checkpoints."""
        return self.clock.paused()

    def rates(self) -> dict[str, float]:
        """images_per_s of all ranks and data_wait_share of this one, since it began."""
        return self.clock.rates()

    def step(self, metrics: dict[str, float], step: int) -> None:
        """After each step, with what it returned; each `log_every` steps it is logged."""
        self.clock.step()
        if self.progress is not None:  # rank 0, which counts for all
            counters.TRAIN_IMAGES.add(self.clock.batch_size)
            note = f"loss {metrics['loss']:.3f}" + ("" if self.miou is None else f", val mIoU {self.miou:.3f}")
            self.progress.advance(1, note)
        if self.logger is not None and self.machine is not None and step % self.log_every == 0:
            rates = learning_rates(self.optimizer) if self.optimizer is not None else {}
            self.logger.metrics(metrics | rates | self.clock.lap() | memory() | self.machine.sample(), step)

    def validated(self, scores: Scores, step: int, samples: Sequence[Sample]) -> None:
        """The scores over all ranks, each class's IoU, and a picture of this rank's first images."""
        self.miou = scores.miou
        if self.logger is None:
            return
        found = {f"val/{name}": value for name, value in scores.means().items()}
        found["val/classes_scored"] = scores.classes_scored
        found |= {f"val_iou/{c['name']}": float(v) for c, v in zip(self.classes, scores.iou, strict=True)}
        self.logger.metrics(found, step)
        if samples:
            colours = [c["color"] for c in self.classes]
            picture = stacked([triptych(sample, colours, side=SAMPLE_SIDE) for sample in samples])
            self.logger.file(encoded(picture, "PNG"), f"overlays/step-{step:06d}.png")

    def close(self) -> None:
        """The last attempt to write what is due, bounded in time; also when the training failed."""
        if self.progress is not None:
            self.progress.close()
        if self.logger is not None:
            self.logger.close()


class DriverBar(tqdm_ray.tqdm):
    """A bar that the driver draws: Ray reads its state from lines of this process.

    It has no place to begin at: a part that was done before would count as done in no time, and the time that is left
    would be wrong for minutes. NOTE Ray Train's `print` adds an empty line for each, so this writes past it.
    """

    def _dump_state(self, force_flush: bool = False) -> None:
        now = time.time()
        if force_flush or now - self._last_flush_time >= self._flush_interval_s:
            self._last_flush_time = now
            sys.stdout.write(json.dumps(self._get_state()) + "\n")
            sys.stdout.flush()


class Clock:
    """Images per second and the share of the time spent waiting for data; what is paused does not count."""

    def __init__(self, batch_size: int, now: Callable[[], float] = time.monotonic) -> None:
        self.batch_size, self.now = batch_size, now
        self.began = now()
        self.waited = self.left_out = 0.0
        self.steps = 0
        self._lap = (0.0, 0.0, 0)

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        began = self.now()
        try:
            yield
        finally:
            waited = self.now() - began
            self.waited += waited
            counters.TRAIN_DATA_WAIT.add(waited)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = self.now()
        try:
            yield
        finally:
            self.left_out += self.now() - began

    def step(self) -> None:
        """A step is done."""
        self.steps += 1

    def rates(self) -> dict[str, float]:
        """Since the beginning."""
        return self._rates((0.0, 0.0, 0))

    def lap(self) -> dict[str, float]:
        """Since the lap before: a curve of these shows when it became slow."""
        rates = self._rates(self._lap)
        self._lap = self._sofar()
        return rates

    def _rates(self, since: tuple[float, float, int]) -> dict[str, float]:
        worked, waited, steps = (a - b for a, b in zip(self._sofar(), since, strict=True))
        worked = max(worked, 1e-9)
        return {"images_per_s": steps * self.batch_size / worked, "data_wait_share": waited / worked}

    def _sofar(self) -> tuple[float, float, int]:
        return self.now() - self.began - self.left_out, self.waited, self.steps


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """The rates of the backbone's first and last layers, which layer decay sets apart; `lr` is that of our parts.

    `parameter_groups` puts ours last, in two groups.
    """
    backbone = [float(group["lr"]) for group in optimizer.param_groups[:-2]]
    return {"lr/backbone_first": min(backbone), "lr/backbone_last": max(backbone)} if backbone else {}


def memory() -> dict[str, float]:
    """GiB: resident in this process, and at the peak allocated on its GPU."""
    found = {"memory_gib": psutil.Process().memory_info().rss / 2**30}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        found["gpu_peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
    return found
