"""One arm trained with one seed, in pieces: a run that is killed goes on from its last checkpoint.

A finished run is a line of a JSON-lines file that is committed; its weights lie under `.repsep/evidence/` and are not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.evidence import data
from pipelines.training.memory import keep_freed_memory
from repsep_model import LossWeights, Segmentor, SegmentorConfig, build_segmentor, separation_report
from repsep_model.corruptions import corrupt, corruption_rng
from repsep_model.diagnostics import mean_report
from repsep_model.inference import segment_image
from repsep_model.metrics import BoundaryCounts, Calibration, ConfusionMatrix, Scores
from repsep_model.optim import Ema, parameter_groups
from repsep_model.robustness import FAST_GRID, Grid, retention
from repsep_model.training import StepSettings, TrainState, train_step
from repsep_model.transforms import Augmentation

WORK = Path(__file__).parents[2] / ".repsep/evidence"
RESULTS = Path(__file__).parents[1] / "results"
CHECKPOINT_EVERY = 100
CORRUPTED_EVERY = {"search": 8, "final": 4}
"""One in so many judged images is corrupted for the retention of an arm; the full grid is `robustness.py`'s."""
DIAGNOSED_EVERY = 10


@dataclass(frozen=True)
class Training:
    """How every arm of a study is trained: the same for all, so it is no part of an arm."""

    data: str
    study: data.Study
    steps: int
    backbone: str = "vit_tiny_patch16_224"
    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    crop: int = 192
    batch: int = 8
    lr: float = 3e-4
    """Of the backbone."""
    head_lr: float = 1e-3
    weight_decay: float = 0.05
    drop_path: float = 0.1
    warmup: int = 50
    ema: float = 0.99
    warm_steps: int = 1500
    """Steps in which the backbone that every arm begins with is trained, under a linear head; 0: none."""

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:8]


@dataclass(frozen=True)
class Arm:
    """What differs between models. `change` is entered around building, training and judging: a tried formulation."""

    name: str
    what: str
    config: Mapping[str, Any] = field(default_factory=dict)
    weights: Mapping[str, Any] = field(default_factory=dict)
    build: Callable[[SegmentorConfig], Any] = build_segmentor
    change: Callable[[], contextlib.AbstractContextManager[object]] = contextlib.nullcontext


BASELINE = Arm(
    "baseline", "backbone + linear head", {"local_pathway": False, "separation": "none", "cross_attention": 0}
)
WARM_SEED = 7


@dataclass(frozen=True)
class Run:
    """An arm, a seed, and how it is trained."""

    arm: Arm
    seed: int
    training: Training

    @property
    def key(self) -> tuple[str, str, int]:
        return (self.training.digest, self.arm.name, self.seed)

    @property
    def folder(self) -> Path:
        return (
            WORK / f"{self.training.data}-{self.training.study}-{self.training.digest}" / f"{self.arm.name}-{self.seed}"
        )


def warm(training: Training) -> Run:
    """The run that gives every arm its backbone."""
    return Run(BASELINE, WARM_SEED, replace(training, steps=training.warm_steps, lr=training.head_lr, warm_steps=0))


def prepare(training: Training) -> float:
    """The warm start; returns its CPU seconds."""
    torch.set_num_threads(1)
    keep_freed_memory()
    return _train(warm(training), data.read(training.data, training.study)[0])[1]


def perform(run: Run) -> dict[str, Any]:
    """Train and judge; returns the record. One thread, so that as many runs as there are cores go side by side."""
    torch.set_num_threads(1)
    keep_freed_memory()
    with run.arm.change():
        trained, judged = data.read(run.training.data, run.training.study)
        state, spent = _train(run, trained)
        model: Any = state.ema.model
        began = time.process_time()
        record = {
            "arm": run.arm.name,
            "seed": run.seed,
            "training": asdict(run.training) | {"digest": run.training.digest},
            "weights": {k: v for k, v in LossWeights(**run.arm.weights).to_dict().items() if v},
            "config": dict(run.arm.config),
            "revision": _revision(),
            "parameters": sum(p.numel() for p in model.for_inference().parameters()),
            "images": [len(trained), len(judged)],
        }
        record |= score(model, judged) | {"whole_miou": score(model, judged, whole=True)["miou"]}
        record |= robustness(model, judged.every(CORRUPTED_EVERY[run.training.study]), FAST_GRID)
        if isinstance(model, Segmentor):
            record["diagnostics"] = diagnose(model, judged.every(DIAGNOSED_EVERY))
        return record | {"train_cpu_s": round(spent), "judge_cpu_s": round(time.process_time() - began)}


def build(run: Run, num_classes: int) -> Any:
    """The arm's model with the seed's random weights."""
    torch.manual_seed(run.seed)
    how = run.training
    config = SegmentorConfig(
        backbone=how.backbone,
        backbone_args=how.backbone_args,
        num_classes=num_classes,
        drop_path=how.drop_path,
        window=how.crop,
        **run.arm.config,
    )
    return run.arm.build(config)


def trained(run: Run, num_classes: int) -> Any:
    """The moving average of a finished run, for inference. Enter `run.arm.change` around it and its use."""
    model = build(run, num_classes).eval()
    model.load_state_dict(torch.load(run.folder / "checkpoint.pt", weights_only=True)["ema"])
    return model


def _train(run: Run, samples: data.Samples) -> tuple[TrainState, float]:
    """Returns the trained state, and the CPU seconds of all pieces together."""
    how = run.training
    model = build(run, len(samples.classes)).train()
    if how.warm_steps:
        _take_backbone(model, warm(how).folder / "checkpoint.pt", how.warm_steps)
    groups = parameter_groups(
        model, lr=how.lr, weight_decay=how.weight_decay, layer_decay=1.0, head_lr_scale=how.head_lr / how.lr
    )
    state = TrainState(model, model, torch.optim.AdamW(groups, lr=how.lr), Ema(model, how.ema))
    settings = StepSettings(LossWeights(**run.arm.weights), how.steps, how.warmup, 1.0, True, run.seed)
    augmentation = Augmentation(crop=how.crop)
    file = run.folder / "checkpoint.pt"
    spent = _restore(state, file)
    began = time.process_time()
    run.folder.mkdir(parents=True, exist_ok=True)
    with (run.folder / "curve.jsonl").open("a") as curve:
        while state.step < how.steps:
            crops = data.batch(samples, state.step, how.batch, run.seed, augmentation)
            found = train_step(state, [crops], settings)
            if state.step % 20 == 0:
                curve.write(json.dumps({"step": state.step} | {k: round(v, 5) for k, v in found.items()}) + "\n")
                curve.flush()
            if state.step % CHECKPOINT_EVERY == 0 or state.step == how.steps:
                _keep(state, file, spent + time.process_time() - began)
    return state, spent + time.process_time() - began


def _take_backbone(model: Any, file: Path, steps: int) -> None:
    """The moving average of the warm start's backbone."""
    if not file.exists() or (held := torch.load(file, weights_only=True))["step"] != steps:
        raise SystemExit(f"{file} is missing or not at step {steps}: run the action `warm` first")
    parts = {
        name.removeprefix("backbone."): value for name, value in held["ema"].items() if name.startswith("backbone.")
    }
    model.backbone.load_state_dict(parts)


def _keep(state: TrainState, file: Path, spent: float) -> None:
    held = {
        "model": state.raw.state_dict(),
        "ema": state.ema.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "spent": spent,
    }
    torch.save(held, file.with_suffix(".part"))
    os.replace(file.with_suffix(".part"), file)


def _restore(state: TrainState, file: Path) -> float:
    if not file.exists():
        return 0.0
    held = torch.load(file, weights_only=True)  # written by `_keep`
    state.raw.load_state_dict(held["model"])
    state.ema.load_state_dict(held["ema"])
    state.optimizer.load_state_dict(held["optimizer"])
    state.step = held["step"]
    return float(held["spent"])


def score(model: Any, samples: data.Samples, *, whole: bool = False) -> dict[str, Any]:
    """mIoU and what goes with it. By windows of the training crop, single scale, unless `whole`."""
    confusion = ConfusionMatrix(len(samples.classes))
    boundary, calibration = BoundaryCounts(len(samples.classes)), Calibration()
    for image, mask in samples:
        found = _segment(model, image, whole=whole)
        labels, predictions = torch.from_numpy(mask), torch.from_numpy(found.labels)
        confusion.update(labels, predictions)
        boundary.update(labels, predictions)
        calibration.update(labels, predictions, torch.from_numpy(found.confidence))
    scores = confusion.scores()
    return {
        "miou": scores.miou,
        "aacc": scores.aacc,
        "boundary_miou": boundary.scores().miou,
        "ece": calibration.ece(),
        "iou": by_class(samples.classes, scores),
    }


def by_class(classes: Sequence[str], scores: Scores) -> dict[str, float]:
    """The IoU of each class, in five digits."""
    return dict(zip(classes, [round(float(v), 5) for v in scores.iou], strict=True))


def _segment(model: Any, image: Any, *, whole: bool = False) -> Any:
    # A plain ViT's positions were learned on crops: one pixel over the budget sends an image through windows.
    budget = image.shape[0] * image.shape[1] if whole else model.config.window**2
    return segment_image(model, image, pixel_budget=budget, dtype=torch.bfloat16)


def robustness(model: Any, samples: data.Samples, grid: Grid) -> dict[str, Any]:
    """Retention over the grid, and the mIoU at each point of it, on these images."""
    found = {point: scores.miou for point, scores in corrupted(model, samples, grid).items()}
    kept = retention(score(model, samples)["miou"], found)
    return {
        "retention": kept.overall,
        "retention_by_category": {k: round(v, 5) for k, v in kept.categories.items()},
        "corrupted_miou": float(np.mean(list(found.values()))),
        "grid": {f"{name}/{severity}": round(value, 5) for (name, severity), value in found.items()},
    }


def corrupted(model: Any, samples: data.Samples, grid: Grid) -> dict[tuple[str, int], Scores]:
    """Scores at each point of the grid."""
    found = {}
    for name, severity in grid:
        confusion = ConfusionMatrix(len(samples.classes))
        for key, (image, mask) in zip(samples.names, samples, strict=True):
            spoilt = corrupt(image, name, severity, corruption_rng(key, name, severity))
            confusion.update(torch.from_numpy(mask), torch.from_numpy(_segment(model, spoilt).labels))
        found[name, severity] = confusion.scores()
    return found


def diagnose(model: Segmentor, samples: data.Samples) -> dict[str, dict[str, float]]:
    """Each map's measures (`repsep_model.diagnostics`)."""
    reports = [
        separation_report(model, torch.from_numpy(image).permute(2, 0, 1)[None], torch.from_numpy(mask)[None])
        for image, mask in samples
    ]
    return {
        name: {k: round(v, 4) for k, v in asdict(measures).items()}
        for name, measures in mean_report(reports).maps.items()
    }


def finished(file: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """Records by run."""
    if not file.exists():
        return {}
    records = [json.loads(line) for line in file.read_text().splitlines()]
    return {(r["training"]["digest"], r["arm"], r["seed"]): r for r in records}


def perform_all(runs: Sequence[Run], file: Path, jobs: int) -> Iterator[dict[str, Any]]:
    """Those that the file does not have yet, `jobs` at a time, in order; each is appended when it is done."""
    done = finished(file)
    waiting = [run for run in runs if run.key not in done]
    file.parent.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        futures = {pool.submit(perform, run): run for run in waiting}
        for future in as_completed(futures):
            if (error := future.exception()) is not None:  # the others go on
                print(f"{futures[future].key} failed: {type(error).__name__}: {error}", flush=True)
                continue
            record = future.result()
            with file.open("a") as lines:
                lines.write(json.dumps(record) + "\n")
            yield record


def _revision() -> str:
    root = Path(__file__).parents[2]
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=root, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True).stdout
    return commit.stdout.strip() + ("+" if changed.strip() else "")
