"""What every training worker runs: a frame around repsep_model.training that validates, keeps and reports."""

from __future__ import annotations

import logging
import warnings
from typing import Any

from ray.train.v2._internal.execution import context as ray_train_context

from pipelines.training.checkpoints import CheckpointsFailedError
from pipelines.training.memory import keep_freed_memory
from pipelines.training.worker import LoopSettings, Worker
from repsep_model.training import NonFiniteLossError

__all__ = ["LoopSettings", "train_loop"]


def train_loop(settings: LoopSettings, checkpoints_uri: str) -> dict[str, Any]:
    """Train, or go on training, to the last step. Returns the last `metrics`, or why it `stopped` early.

    Whoever has seen the same number of steps has the same weights: whatever killed the run before, and on the CPU to
    the bit.
    """
    _quieten()
    keep_freed_memory()
    try:
        worker = Worker(settings, checkpoints_uri)
    except CheckpointsFailedError as error:
        return {"stopped": str(error)}
    config, state, telemetry, batches = worker.config, worker.state, worker.telemetry, worker.batches()
    try:
        while state.step < config.steps:
            with telemetry.waiting():
                batch = next(batches)
            metrics = worker.step(batch)
            telemetry.step(metrics, state.step)
            with telemetry.paused():
                if worker.is_validation_due():
                    worker.validate(metrics)
                if worker.is_checkpoint_due():
                    worker.save()
        worker.finish()
    except NonFiniteLossError as error:  # every rank sees the same sums, so every rank stops here
        return {"stopped": worker.explained(error)}
    except CheckpointsFailedError as error:
        return {"stopped": str(error)}
    finally:
        worker.close()
    return {"metrics": worker.metrics}


def _quieten() -> None:
    ray_train_context.logger.setLevel(logging.WARNING)  # INFO prints every reported metric of every rank
    # Our norms leave channels-last strides on 1 x 1 convolutions; DDP copies those few gradients and says so each time.
    warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides|FSDP2-wrapped module")
    warnings.filterwarnings("ignore", message="find_unused_parameters=True was specified")  # parallel.py says why
