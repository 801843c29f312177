"""Does the training loader keep up? Runs what is claimed of it and prints one table.

    PYTHONPATH=. python benchmarks/loader.py [--data folder] [--rounds 3]

The loader against a plain loop that decodes and augments the same bytes; scaling only the crop against scaling all of
the image; training steps that the loader feeds against the same steps on batches that are in memory. Everything is
measured in turns in one process, in CPU seconds of the process (others may share the cores) and by the clock; the best
of the rounds counts. On CamVid if it lies at ../shared/data/camvid, else on generated scenes.
Exit code 1 if a line fails.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from torchvision.transforms import InterpolationMode

from pipelines.config import PrepareConfig
from pipelines.dataset import Dataset, Split, open_dataset
from pipelines.prepare import prepare
from pipelines.train_loader import TrainLoader
from pipelines.training.memory import keep_freed_memory
from repsep_model import LossWeights, SegmentorConfig, build_segmentor
from repsep_model.images import UInt8, decode_image, decode_mask
from repsep_model.optim import Ema, parameter_groups
from repsep_model.training import StepSettings, TrainState, train_step
from repsep_model.transforms import Augmentation, augment, sample_rng

CAMVID = Path(__file__).parents[2] / "shared/data/camvid"
CROP, BATCH, THREADS = 192, 8, 2
FILL = (124, 116, 104)
HOW = Augmentation(crop=CROP)
TINY: dict[str, Any] = {"backbone_args": {"depth": 4, "embed_dim": 48, "num_heads": 3}, "width": 16}


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    goal: str
    found: str
    kept: bool


@dataclass(frozen=True)
class Spent:
    """What something took, in seconds of the process's CPU and by the clock."""

    cpu: float
    wall: float

    @classmethod
    def by(cls, work: Callable[[], object]) -> Spent:
        cpu, wall = time.process_time(), time.perf_counter()
        work()
        return cls(time.process_time() - cpu, time.perf_counter() - wall)


def best(rounds: int, *works: Callable[[], object]) -> list[Spent]:
    """Each work's least, all measured in turns."""
    found: list[list[Spent]] = [[Spent.by(work) for work in works] for _ in range(rounds)]
    return [Spent(min(s.cpu for s in turns), min(s.wall for s in turns)) for turns in zip(*found, strict=True)]


def loader_alone(split: Split, rounds: int) -> Iterator[Line]:
    """An epoch (at most 384 images) from the shards, against a loop over the same bytes in memory."""
    steps = min(384, len(split)) // BATCH
    tables = [split.read(group) for group in range(split.num_groups)]
    data = [(row["image"].as_py(), row["mask"].as_py()) for table in tables for row in _rows(table)][: steps * BATCH]

    def plain() -> None:
        for i, (image, mask) in enumerate(data):
            augment(decode_image(image), decode_mask(mask), sample_rng(0, 0, i), HOW, FILL)

    def loaded(threads: int) -> Callable[[], None]:
        def work() -> None:
            with _loader(split, threads) as loader:
                for _ in loader.steps(0, steps, batch_size=BATCH, micro_batch=None, rank=0, world_size=1):
                    pass

        return work

    theirs, one, two = best(rounds, plain, loaded(1), loaded(2))
    ratio = theirs.cpu / one.cpu
    rates = f"{len(data) / one.cpu:.0f} / {len(data) / theirs.cpu:.0f} images per CPU second"
    yield Line("loader of one thread against decode + augment alone", ">= 0.90", f"{ratio:.2f} ({rates})", ratio >= 0.9)
    clock = [f"{len(data) / spent.wall:.0f}" for spent in (two, one, theirs)]
    found = f"{theirs.cpu / two.cpu:.2f}; by the clock {clock[0]}, of one {clock[1]}, alone {clock[2]} images/s"
    yield Line("loader of two threads likewise (they share an interpreter)", "for information", found, True)


def crop_first(split: Split, rounds: int) -> Iterator[Line]:
    """One image after another, decoded beforehand."""
    table = split.read(0)
    decoded = [(decode_image(row["image"].as_py()), decode_mask(row["mask"].as_py())) for row in _rows(table)] * 8

    def all_of(transform: Callable[..., object]) -> Callable[[], None]:
        def work() -> None:
            for i, (image, mask) in enumerate(decoded):
                transform(image, mask, sample_rng(0, 0, i), HOW, FILL)

        return work

    ours, theirs = best(rounds, all_of(augment), all_of(resize_then_crop))
    ratio = theirs.cpu / ours.cpu
    found = f"{ratio:.2f} x ({1e3 * ours.cpu / len(decoded):.2f} / {1e3 * theirs.cpu / len(decoded):.2f} ms an image)"
    yield Line("augmentation: only the crop scaled, against all by torchvision", "> 1 x", found, ratio > 1)


def steps_fed(split: Split, classes: int, rounds: int) -> Iterator[Line]:
    """Training steps of `repsep_model.training.train_step` with real batches, against batches held in memory.

    A round of fed steps ends when all that the loader began is done: nothing of it falls into the other's time.
    """
    settings = StepSettings(LossWeights(), 10**6, 0, 1.0, True, 0)
    for name, options, steps in (("TINY", TINY, 12), ("ViT-Ti/16", {}, 5)):
        torch.manual_seed(0)
        model = build_segmentor(SegmentorConfig(backbone="vit_tiny_patch16_224", num_classes=classes, **options))
        groups = parameter_groups(model.train(), lr=1e-4, weight_decay=0.05, layer_decay=1.0, head_lr_scale=1.0)
        state = TrainState(model, model, torch.optim.AdamW(groups, lr=1e-4), Ema(model, 0.99))
        with _loader(split) as loader:
            batches = loader.steps(0, 10**6, batch_size=BATCH, micro_batch=None, rank=0, world_size=1)
            held = [next(batches) for _ in range(4)]
            train_step(state, held[0], settings)  # the first one allocates
            turns = []
            for _ in range(rounds):
                fed = _steps(state, settings, batches, steps, loader)
                turns.append((fed, _steps(state, settings, itertools.cycle(held), steps)))
        real, memory = min(fed.wall for (fed, _), _ in turns), min(held.wall for _, (held, _) in turns)
        share = min(waited / fed.wall for (fed, waited), _ in turns)
        ratio = memory / real
        seconds = [1e3 * min(turn[i][0].cpu for turn in turns) / steps for i in (0, 1)]
        found = f"{ratio:.2f}; waits for data {100 * share:.1f} % of it; CPU {seconds[0]:.0f} / {seconds[1]:.0f} ms"
        yield Line(f"step of {name}, fed by the loader against in memory", ">= 0.95", found, ratio >= 0.95)


def _steps(
    state: TrainState, settings: StepSettings, batches: Iterator[Any], steps: int, loader: TrainLoader | None = None
) -> tuple[Spent, float]:
    """What these steps took, and how long they waited for their batches."""
    waited = 0.0

    def work() -> None:
        nonlocal waited
        for _ in range(steps):
            began = time.perf_counter()
            batch = next(batches)
            waited += time.perf_counter() - began
            train_step(state, batch, settings)
        if loader is not None:  # every thread comes to the barrier only when nothing is waiting before it
            barrier = threading.Barrier(THREADS)
            wait([loader._decoders.submit(barrier.wait) for _ in range(THREADS)])

    return Spent.by(work), waited


def resize_then_crop(
    image: UInt8, mask: UInt8, rng: np.random.Generator, how: Augmentation, fill: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same augmentation by torchvision: scale all of the image and the mask, then cut."""
    scale = float(np.exp(rng.uniform(*np.log(how.scale))))
    size = [max(1, round(n * scale)) for n in mask.shape]
    pixels, labels = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(mask)[None]
    pixels = TF.resize(pixels, size, InterpolationMode.BILINEAR, antialias=scale < 1)
    labels = TF.resize(labels, size, InterpolationMode.NEAREST_EXACT)
    for _ in range(10):
        top, left = (int(rng.integers(max(n - how.crop, 0) + 1)) for n in size)
        window = (slice(None), slice(top, top + how.crop), slice(left, left + how.crop))
        counts = np.bincount(labels[window].numpy().ravel(), minlength=256)[:255]
        if counts.sum() and counts.max() <= how.max_class_share * counts.sum():
            break
    pixels, labels = pixels[window], labels[window]
    flip = rng.random() < how.flip
    draws = rng.random(4) < how.photometric
    factors, hue, first = rng.uniform(0.7, 1.3, 3).tolist(), float(rng.uniform(-0.05, 0.05)), rng.random() < 0.5
    if draws[0]:
        pixels = TF.adjust_brightness(pixels, factors[0])
    if draws[1] and first:
        pixels = TF.adjust_contrast(pixels, factors[1])
    if draws[2]:
        pixels = TF.adjust_saturation(pixels, factors[2])
    if draws[3]:
        pixels = TF.adjust_hue(pixels, hue)
    if draws[1] and not first:
        pixels = TF.adjust_contrast(pixels, factors[1])
    below, right = how.crop - pixels.shape[1], how.crop - pixels.shape[2]
    if below or right:
        padded = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, how.crop, how.crop)
        padded[:, : how.crop - below, : how.crop - right] = pixels
        pixels, labels = padded, TF.pad(labels, [0, 0, right, below], fill=[255])
    if flip:
        pixels, labels = pixels.flip(2), labels.flip(2)
    return pixels.contiguous(), labels[0].contiguous()


def _rows(table: Any) -> list[dict[str, Any]]:
    return [{name: table[name][i] for name in ("image", "mask")} for i in range(len(table))]


@contextlib.contextmanager
def _loader(split: Split, threads: int = THREADS) -> Iterator[TrainLoader]:
    loader = TrainLoader(split, augmentation=HOW, fill=FILL, seed=0, threads=threads)
    try:
        yield loader
    finally:
        loader.close()


def _prepared(data: Path | None, folder: str) -> Dataset:
    with contextlib.redirect_stderr(io.StringIO()):
        source = None if data is None else str(data)
        if source is None:
            from pipelines.scenes import write_scenes

            source = f"{folder}/scenes"
            write_scenes(Path(source), train=400, val=4, unlabelled=0, size=(360, 480))
        return open_dataset(prepare(f"{folder}/work", PrepareConfig(source=source)).results["dataset"])


def measure(data: Path | None = None, rounds: int = 3) -> Iterator[Line]:
    """The lines of the table, one after another. `data` is a folder for `repsep prepare`."""
    torch.set_num_threads(1)
    keep_freed_memory()  # as every training worker does
    if data is None and CAMVID.is_dir():
        data = CAMVID
    with tempfile.TemporaryDirectory() as folder:
        dataset = _prepared(data, folder)
        split = dataset.split("train")
        yield from loader_alone(split, rounds)
        yield from crop_first(split, rounds)
        yield from steps_fed(split, dataset.num_classes, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of images and masks as `repsep prepare` reads it")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lines = []
    for line in measure(options.data, options.rounds):
        print(f"{'ok  ' if line.kept else 'FAIL'}  {line.what}: {line.found} (goal {line.goal})", flush=True)
        lines.append(line)
    sys.exit(not all(line.kept for line in lines))


if __name__ == "__main__":
    main()
