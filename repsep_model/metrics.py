"""One int64 confusion matrix and what follows from it.

Rows are labels, columns predictions. Ignored pixels are never counted; a class that neither occurs nor is predicted has
no score (NaN) and does not enter a mean: `classes_scored` says how many did.
Shapes: K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from repsep_model.labels import IGNORE_INDEX

Counts = NDArray[np.int64]


class ConfusionMatrix:
    """State of a segmentation metric: (K, K) int64. Float counters are wrong past 2^24 pixels.

    Ranks add their `counts` with one all-reduce of the tensor.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu") -> None:
        self.num_classes = num_classes
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)

    def update(self, labels: Tensor, predictions: Tensor) -> None:
        """Count integer tensors of one shape; raises ValueError for other ids than 0..K-1 and IGNORE_INDEX."""
        if labels.shape != predictions.shape:
            raise ValueError(f"labels {tuple(labels.shape)} and predictions {tuple(predictions.shape)} differ in shape")
        labels = labels.to(self.counts.device).flatten().long()
        valid = labels != IGNORE_INDEX
        labels, predictions = labels[valid], predictions.to(self.counts.device).flatten().long()[valid]
        # Each apart: a prediction of K would be counted as class 0 of the next row.
        if any(ids.numel() and (ids.min() < 0 or ids.max() >= self.num_classes) for ids in (labels, predictions)):
            raise ValueError(f"class ids must be 0..{self.num_classes - 1}, in labels also {IGNORE_INDEX}")
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
    iou: NDArray[np.float64]
    acc: NDArray[np.float64]
    dice: NDArray[np.float64]
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


def _nanmean(values: NDArray[np.float64]) -> float:
    found = values[~np.isnan(values)]
    return float(found.mean()) if found.size else float("nan")
