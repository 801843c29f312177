"""One int64 confusion matrix and what follows from it, boundary IoU, and calibration.

Three states of counters (`ConfusionMatrix`, `BoundaryCounts`, `Calibration`): `update` adds pixels, ranks add their
tensors, and a pure function turns the totals into scores. Ignored pixels are never counted; a class that neither occurs
nor is predicted has no score (NaN) and does not enter a mean: `classes_scored` says how many did.
Shapes: K classes, H x W pixels, M bins.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repsep_model.labels import IGNORE_INDEX

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

BOUNDARY_RATIO = 0.02
"""Width of a boundary as a fraction of the image's diagonal; the authors' program takes 0.005 for Cityscapes."""

CALIBRATION_BINS = 15
"""M, the number that is usual in reports of the calibration error."""


class ConfusionMatrix:
    """State of a segmentation metric: (K, K) int64, a row per label. Float counters are wrong past 2^24 pixels.

    Ranks add their `counts` with one all-reduce of the tensor.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Count integer tensors of one shape; raises ValueError for other ids than 0..K-1 and IGNORE_INDEX."""
        _check_shapes(labels=labels, predictions=predictions)
        _check_integers(labels=labels, predictions=predictions)
        labels = labels.to(self.counts.device).flatten().long()
        valid = labels != IGNORE_INDEX
        labels, predictions = labels[valid], predictions.to(self.counts.device).flatten().long()[valid]
        # Each apart: a prediction of K would be counted as class 0 of the next row.
        _check_ids(self.num_classes, labels, predictions)
        pairs = labels * self.num_classes + predictions
        self.counts += torch.bincount(pairs, minlength=self.num_classes**2).view_as(self.counts)

    def scores(self) -> Scores:
        counts: Counts = self.counts.cpu().numpy()
        return scores_from_counts(np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))


@dataclass(frozen=True)
class Scores:
    """Fractions in 0..1; per-class arrays hold NaN where a class has no score."""

    miou: float
    macc: float
    aacc: float
    fwiou: float
    mdice: float
    iou: Floats
    acc: Floats
    dice: Floats
    classes_scored: int

    def means(self) -> dict[str, float]:
        """The summary figures by name."""
        return {"miou": self.miou, "macc": self.macc, "aacc": self.aacc, "fwiou": self.fwiou, "mdice": self.mdice}


def scores_from_counts(intersection: Counts, predicted: Counts, labelled: Counts) -> Scores:
    """Scores from pixels per class: predicted and right, predicted, labelled (each (K,) int64)."""
    union = predicted + labelled - intersection
    total = labelled.sum()
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(union > 0, intersection / union, np.nan)
        acc = np.where(labelled > 0, intersection / labelled, np.nan)
        dice = np.where(union > 0, 2 * intersection / (predicted + labelled), np.nan)
        fwiou = float(np.nansum(iou * labelled) / total) if total else float("nan")
        aacc = float(intersection.sum() / total) if total else float("nan")
    return Scores(_nanmean(iou), _nanmean(acc), aacc, fwiou, _nanmean(dice), iou, acc, dice, int((union > 0).sum()))


class BoundaryCounts:
    """State of boundary IoU: (2, K) int64, intersection and union. Ranks add their `counts`.

    Cheng et al. 2021, "Boundary IoU: Improving Object-Centric Image Segmentation Evaluation": the IoU of the pixels of
    label and prediction that lie near their own boundary (`boundary_mask`). The paper scores objects; here a class in
    an image is one object, and counts are summed over images before they are divided, as for mIoU.
    Ignored pixels are ignored in the prediction too: what is predicted there is not counted and bounds nothing.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu", *, ratio: float = BOUNDARY_RATIO) -> None:
        if not ratio > 0:
            raise ValueError(f"ratio is a fraction of the image's diagonal over 0, got {ratio}")
        self.num_classes = num_classes
        self.ratio = ratio
        self.counts = torch.zeros(2, num_classes, dtype=torch.int64, device=device)

    def update(self, labels_HW: Tensor, predictions_HW: Tensor) -> None:
        """Count one whole image without padding, as padding hides its border; raises ValueError for wrong ids."""
        _check_shapes(labels=labels_HW, predictions=predictions_HW)
        if labels_HW.ndim != 2:
            raise ValueError(f"labels have shape {tuple(labels_HW.shape)}: pass one image (H, W) at a time")
        _check_integers(labels=labels_HW, predictions=predictions_HW)
        labels_HW, predictions_HW = labels_HW.to(self.counts.device), predictions_HW.to(self.counts.device)
        valid_HW = labels_HW != IGNORE_INDEX
        _check_ids(self.num_classes, *(ids.masked_fill(~valid_HW, 0) for ids in (labels_HW, predictions_HW)))
        labels_HW = labels_HW.to(torch.uint8)
        predictions_HW = predictions_HW.to(torch.uint8).masked_fill(~valid_HW, IGNORE_INDEX)
        distance = boundary_distance(labels_HW.shape[0], labels_HW.shape[1], self.ratio)
        labelled_HW, predicted_HW = boundary_mask(labels_HW, distance), boundary_mask(predictions_HW, distance)
        both_HW = labelled_HW & predicted_HW & (labels_HW == predictions_HW)
        labelled, predicted, intersection = (
            torch.bincount(ids_HW[counted_HW], minlength=self.num_classes)
            for ids_HW, counted_HW in ((labels_HW, labelled_HW), (predictions_HW, predicted_HW), (labels_HW, both_HW))
        )
        self.counts += torch.stack([intersection, labelled + predicted - intersection])

    def scores(self) -> BoundaryScores:
        intersection, union = self.counts.cpu().numpy()
        return boundary_scores_from_counts(intersection, union)


@dataclass(frozen=True)
class BoundaryScores:
    """Fractions in 0..1; `iou` holds NaN where a class has no boundary in labels and predictions."""

    miou: float
    iou: Floats
    classes_scored: int


def boundary_scores_from_counts(intersection: Counts, union: Counts) -> BoundaryScores:
    """Scores from boundary pixels per class (each (K,) int64)."""
    with np.errstate(invalid="ignore"):
        iou = np.where(union > 0, intersection / union, np.nan)
    return BoundaryScores(_nanmean(iou), iou, int((union > 0).sum()))


def boundary_distance(height: int, width: int, ratio: float = BOUNDARY_RATIO) -> int:
    """How many pixels a boundary reaches inwards: the fraction `ratio` of the diagonal, at least 1."""
    return max(1, round(ratio * math.hypot(height, width)))


def boundary_mask(ids_HW: Tensor, distance: int) -> Tensor:
    """Where a square of 2 * distance + 1 pixels on the pixel reaches another class or leaves the image, (H, W) bool.

    `ids_HW` holds 0..254 and IGNORE_INDEX. For all classes at once this is each one's mask without its erosion, as the
    authors' program has it: `distance` rounds with a 3 x 3 square, and nothing outside the image. Ignored pixels could
    be of any class: they are no boundary and make none.
    """
    side = 2 * distance + 1
    boundary_HW = torch.ones_like(ids_HW, dtype=torch.bool)
    ignored_HW = ids_HW == IGNORE_INDEX
    if min(ids_HW.shape) >= side:
        lowest = ids_HW.to(torch.uint8)
        highest = lowest.masked_fill(ignored_HW, 0)
        for dim in (0, 1):
            lowest = _slide(torch.minimum, lowest, side, dim)
            highest = _slide(torch.maximum, highest, side, dim)
        boundary_HW[distance:-distance, distance:-distance] = lowest != highest
    return boundary_HW & ~ignored_HW


def _slide(pick: Callable[[Tensor, Tensor], Tensor], values: Tensor, side: int, dim: int) -> Tensor:
    """The least or greatest value of each window of `side` along `dim`: side - 1 fewer of them than values.

    Two windows that touch or overlap make a longer one, so about log2(side) passes do.
    """
    reach = 1
    while reach < side:
        step = min(reach, side - reach)
        windows = values.shape[dim] - step
        values = pick(values.narrow(dim, 0, windows), values.narrow(dim, step, windows))
        reach += step
    return values


class Calibration:
    """State of the expected calibration error, per bin of confidence: `counts` (2, M) int64, pixels and right ones, and
    `confidence` (M,) float64, the sum. Ranks add both.

    Guo et al. 2017, "On Calibration of Modern Neural Networks": M bins of equal width, each with its upper edge.
    """

    def __init__(self, num_bins: int = CALIBRATION_BINS, device: torch.device | str = "cpu") -> None:
        self.num_bins = num_bins
        self.counts = torch.zeros(2, num_bins, dtype=torch.int64, device=device)
        self.confidence = torch.zeros(num_bins, dtype=torch.float64, device=device)

    def update(self, labels: Tensor, predictions: Tensor, confidence: Tensor) -> None:
        """Count tensors of one shape; confidence is the predicted class's probability, ValueError if not in 0..1."""
        _check_shapes(labels=labels, predictions=predictions, confidence=confidence)
        _check_integers(labels=labels, predictions=predictions)
        labels, predictions, confidence = (t.to(self.counts.device) for t in (labels, predictions, confidence))
        valid = labels != IGNORE_INDEX
        right, confidence = (labels == predictions)[valid], confidence[valid].double()
        # A mean of probabilities may pass 1 by rounding.
        if not ((confidence >= 0) & (confidence <= 1 + 1e-6)).all():
            raise ValueError("confidence must be in 0..1: pass probabilities, not logits or grey values")
        inner_edges = torch.from_numpy(_bin_edges(self.num_bins)[1:-1]).to(self.counts.device)
        bins = torch.bucketize(confidence, inner_edges)
        pixels = torch.bincount(bins, minlength=self.num_bins)
        self.counts += torch.stack([pixels, torch.bincount(bins[right], minlength=self.num_bins)])
        self.confidence += torch.bincount(bins, weights=confidence, minlength=self.num_bins)

    def reliability(self) -> Reliability:
        pixels, right = self.counts.cpu().numpy().copy()  # the curve holds `pixels`; the next update must not reach it
        return reliability_from_counts(pixels, right, self.confidence.cpu().numpy())

    def ece(self) -> float:
        """Expected calibration error in 0..1; NaN if nothing was counted."""
        return self.reliability().ece


@dataclass(frozen=True)
class Reliability:
    """A reliability curve: accuracy over mean confidence, (M,) each with NaN in empty bins, `pixels` (M,) in each bin,
    `edges` (M + 1,) of the bins; and `ece`, the mean distance of the two, each pixel weighing the same."""

    edges: Floats
    pixels: Counts
    confidence: Floats
    accuracy: Floats
    ece: float


def reliability_from_counts(pixels: Counts, right: Counts, confidence: Floats) -> Reliability:
    """The curve from totals per bin (each (M,)): pixels, those predicted right, sum of their confidence."""
    total = pixels.sum()
    ece = float(np.abs(right - confidence).sum() / total) if total else float("nan")
    with np.errstate(invalid="ignore"):
        confidence, accuracy = (np.where(pixels > 0, sums / pixels, np.nan) for sums in (confidence, right))
    return Reliability(_bin_edges(len(pixels)), pixels, confidence, accuracy, ece)


def _bin_edges(num_bins: int) -> Floats:
    return np.linspace(0.0, 1.0, num_bins + 1)


def _check_shapes(**tensors: Tensor) -> None:
    if len({t.shape for t in tensors.values()}) > 1:
        named = [f"{name} {tuple(t.shape)}" for name, t in tensors.items()]
        raise ValueError(f"{', '.join(named[:-1])} and {named[-1]} differ in shape")


def _check_integers(**ids: Tensor) -> None:
    for name, tensor in ids.items():
        if tensor.is_floating_point():
            raise ValueError(f"{name} are {tensor.dtype}: pass class ids as integers")


def _check_ids(num_classes: int, *counted: Tensor) -> None:
    if any(ids.numel() and (ids.min() < 0 or ids.max() >= num_classes) for ids in counted):
        raise ValueError(f"class ids must be 0..{num_classes - 1}, in labels also {IGNORE_INDEX}")


def _nanmean(values: Floats) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if found.size else float("nan")
