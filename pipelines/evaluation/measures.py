"""What is measured of images with labels, and how measurements of parts add up: all sums are integers, but the
calibration's confidences and the diagnostics, which are added in the order of the images. So no figure depends on how
many workers shared the work.

Shapes: n images, K classes, M calibration bins.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipelines.config import EvaluateConfig
from pipelines.dataset import Dataset, Split
from pipelines.pictures import encoded, triptych
from repsep_model.corruptions import corrupt, corruption_rng
from repsep_model.diagnostics import MapMeasures, SeparationReport, mean_report, separation_report
from repsep_model.images import UInt8, decode_image, decode_mask
from repsep_model.inference import segment_image
from repsep_model.metrics import BoundaryCounts, Calibration, ConfusionMatrix
from repsep_model.robustness import FAST_GRID, FULL_GRID, Grid
from repsep_model.segmentor import Segmentor

GRIDS: dict[str, Grid] = {"none": (), "fast": FAST_GRID, "full": FULL_GRID}
SEGMENTING = ("pixel_budget", "scales", "flip")
CLEAN = ("clean", 0)
DIAGNOSED = 16
"""Images, spread over the split, of which the separation of every map is measured."""
ARRAYS = ("counts", "boundary", "calibration", "confidence")

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Unjudged:
    """An image of the split that no figure counts."""

    key: str
    kind: str
    reason: str


@dataclass
class Measured:
    """Of some images that follow each other in the split, of which `first` is the number of the first one."""

    first: int
    numbers: list[int]
    """Of each image, in the split."""
    keys: list[str]
    counts: Counts
    """(n, 3, K): intersection, predicted and labelled pixels of each image."""
    boundary: Counts
    """(n, 2, K): intersection and union of the boundaries."""
    calibration: Counts
    """(2, M): pixels and right ones in each bin of confidence."""
    confidence: NDArray[np.float64]
    """(M,): sum of the confidence in each bin."""
    confusion: dict[tuple[str, int], Counts]
    """(K, K) for the images as they are (`CLEAN`) and for each point of the corruption grid."""
    diagnostics: list[dict[str, dict[str, float]]] = field(default_factory=list)
    pictures: dict[int, bytes] = field(default_factory=dict)
    unjudged: list[Unjudged] = field(default_factory=list)

    def to_bytes(self) -> bytes:
        """For the way through Ray Data: arrays without pickle, confusions by their places that are not 0."""
        arrays: dict[str, NDArray[Any]] = {name: getattr(self, name) for name in ARRAYS}
        for (name, severity), counts in self.confusion.items():
            places = np.flatnonzero(counts)
            arrays[f"confusion/{name}/{severity}"] = np.stack([places, counts.ravel()[places]])
        for number, picture in self.pictures.items():
            arrays[f"picture/{number}"] = np.frombuffer(picture, np.uint8)
        about = {name: getattr(self, name) for name in ("first", "numbers", "keys", "diagnostics")}
        about["unjudged"] = [asdict(image) for image in self.unjudged]
        arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
        out = io.BytesIO()
        np.savez(out, allow_pickle=False, **arrays)
        return out.getvalue()

    @classmethod
    def from_bytes(cls, data: bytes) -> Measured:
        with np.load(io.BytesIO(data), allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())
            classes = arrays["counts"].shape[2]
            confusion, pictures = {}, {}
            for key in arrays.files:
                kind, _, rest = key.partition("/")
                if kind == "confusion":
                    name, _, severity = rest.rpartition("/")
                    places, values = arrays[key]
                    counts = np.zeros(classes * classes, np.int64)
                    counts[places] = values
                    confusion[name, int(severity)] = counts.reshape(classes, classes)
                elif kind == "picture":
                    pictures[int(rest)] = arrays[key].tobytes()
            about["unjudged"] = [Unjudged(**image) for image in about["unjudged"]]
            plain = {name: arrays[name] for name in ARRAYS}
        return cls(**about, **plain, confusion=confusion, pictures=pictures)


def together(parts: Sequence[Measured]) -> Measured:
    """All parts as one, in the order of the split."""
    parts = sorted(parts, key=lambda part: part.first)
    confusion = {point: np.sum([part.confusion[point] for part in parts], axis=0) for point in parts[0].confusion}
    return Measured(
        0,
        [number for part in parts for number in part.numbers],
        [key for part in parts for key in part.keys],
        np.concatenate([part.counts for part in parts]),
        np.concatenate([part.boundary for part in parts]),
        np.sum([part.calibration for part in parts], axis=0),
        np.sum([part.confidence for part in parts], axis=0),
        confusion,
        [report for part in parts for report in part.diagnostics],
        {number: picture for part in parts for number, picture in part.pictures.items()},
        [image for part in parts for image in part.unjudged],
    )


def mean_diagnostics(reports: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Each map's measures, means over images."""
    if not reports:
        return {}
    every = [SeparationReport({name: MapMeasures(**row) for name, row in maps.items()}) for maps in reports]
    return {name: asdict(measures) for name, measures in mean_report(every).maps.items()}


class Counted:
    """Images of the split added one by one, from the number `first` on."""

    def __init__(self, first: int, num_classes: int, grid: Grid = ()) -> None:
        self.first, self.num_classes = first, num_classes
        self.numbers: list[int] = []
        self.keys: list[str] = []
        self.counts: list[Counts] = []
        self.boundary: list[Counts] = []
        self.calibration = Calibration()
        self.confusion = {point: ConfusionMatrix(num_classes) for point in (CLEAN, *grid)}
        self.diagnostics: list[dict[str, dict[str, float]]] = []
        self.pictures: dict[int, bytes] = {}
        self.unjudged: list[Unjudged] = []

    def add(self, number: int, key: str, mask: UInt8, predicted: UInt8) -> None:
        """What masks alone say of an image."""
        labels, guess = torch.from_numpy(mask), torch.from_numpy(predicted)
        self.confusion[CLEAN].update(labels, guess)
        edges = BoundaryCounts(self.num_classes)
        edges.update(labels, guess)
        self.numbers.append(number)
        self.keys.append(key)
        self.counts.append(image_counts(predicted, mask, self.num_classes))
        self.boundary.append(edges.counts.numpy())

    def measured(self) -> Measured:
        return Measured(
            self.first,
            self.numbers,
            self.keys,
            np.array(self.counts, np.int64).reshape(-1, 3, self.num_classes),
            np.array(self.boundary, np.int64).reshape(-1, 2, self.num_classes),
            self.calibration.counts.numpy(),
            self.calibration.confidence.numpy(),
            {point: matrix.counts.numpy() for point, matrix in self.confusion.items()},
            self.diagnostics,
            self.pictures,
            self.unjudged,
        )


class Judge:
    """Measures row groups of a split by a model; knows nothing of Ray."""

    def __init__(self, model: Segmentor, dataset: Dataset, config: EvaluateConfig) -> None:
        self.model, self.config, self.dataset = model, config, dataset
        self.split: Split = dataset.split(config.split)
        self.grid = GRIDS[config.corruptions]
        self.segmenting: dict[str, Any] = config.model_dump(include=set(SEGMENTING))

    def __call__(self, group: int) -> Measured:
        table, first = self.split.read(group), int(self.split.starts[group])
        counted = Counted(first, self.dataset.num_classes, self.grid)
        for number, row in enumerate(self.split.rows(group).tolist(), first):
            key = table["key"][row].as_py()
            image, mask = decode_image(table["image"][row].as_py()), decode_mask(table["mask"][row].as_py())
            labels, found = torch.from_numpy(mask), segment_image(self.model, image, **self.segmenting)
            counted.add(number, key, mask, found.labels)
            counted.calibration.update(labels, torch.from_numpy(found.labels), torch.from_numpy(found.confidence))
            for name, severity in self.grid:
                spoilt = corrupt(image, name, severity, corruption_rng(key, name, severity))
                labels_there = segment_image(self.model, spoilt, **self.segmenting).labels
                counted.confusion[name, severity].update(labels, torch.from_numpy(labels_there))
            if is_among(number, len(self.split), DIAGNOSED):
                counted.diagnostics.append(self._diagnosed(image, labels))
            if is_among(number, len(self.split), self.config.overlays):
                counted.pictures[number] = encoded(triptych((image, mask, found.labels), self.dataset.colours), "JPEG")
        return counted.measured()

    def picture(self, key: str, group: int) -> bytes:
        """Image, labels and prediction of one image."""
        table = self.split.read(group)
        row = table["key"].to_pylist().index(key)
        image, mask = decode_image(table["image"][row].as_py()), decode_mask(table["mask"][row].as_py())
        labels = segment_image(self.model, image, **self.segmenting).labels
        return encoded(triptych((image, mask, labels), self.dataset.colours), "JPEG")

    def _diagnosed(self, image: UInt8, labels: torch.Tensor) -> dict[str, dict[str, float]]:
        report = separation_report(self.model, torch.from_numpy(image).permute(2, 0, 1)[None], labels[None])
        return {name: asdict(measures) for name, measures in report.maps.items()}


def image_counts(predicted: UInt8, mask: UInt8, num_classes: int) -> Counts:
    """(3, K): intersection, predicted and labelled pixels among the labelled ones."""
    valid = mask < num_classes
    predicted, mask = predicted[valid], mask[valid]
    right = np.bincount(mask[predicted == mask], minlength=num_classes)
    return np.stack([right, np.bincount(predicted, minlength=num_classes), np.bincount(mask, minlength=num_classes)])


def is_among(number: int, total: int, wanted: int) -> bool:
    """Whether an image is one of `wanted` that are spread over all."""
    every = max(1, total // wanted) if wanted else 0
    return bool(every) and number % every == 0 and number // every < wanted
