"""How over-smooth a transformer is and how separate its representations are, measured on images.

Over-smoothness of a map is the mean cosine between its locations (1: all alike). Separation compares the mean cosine
within classes with that between class centres, before and after our module.
Shapes: B batch, C channels, h x w grid, N = h * w, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from repsep_model.labels import IGNORE_INDEX, majority_reduce
from repsep_model.segmentor import Segmentor


@dataclass(frozen=True)
class SeparationReport:
    """Cosines in -1..1. `tap_similarity` has one value per tap; the others are for F (before) and F' (after)."""

    tap_similarity: tuple[float, ...]
    fused_similarity: float
    separated_similarity: float
    fused_within: float
    fused_between: float
    separated_within: float
    separated_between: float

    @property
    def margin_gain(self) -> float:
        """How much (within - between) grew from F to F'."""
        return (self.separated_within - self.separated_between) - (self.fused_within - self.fused_between)


@torch.inference_mode()
def separation_report(model: Segmentor, images: Tensor, labels: Tensor) -> SeparationReport:
    """Measure one batch: images (B, 3, H, W) in 0..255, labels (B, H, W) with IGNORE_INDEX."""
    was_training = model.training
    model.eval()
    found = model.features(images.to(model.mean.device))
    model.train(was_training)
    reduced = majority_reduce(labels, model.config.stride, model.config.num_classes).to(model.mean.device)
    fused, separated = class_cosines(found.fused_BDhw, reduced), class_cosines(found.separated_BDhw, reduced)
    return SeparationReport(
        tap_similarity=tuple(mean_similarity(tap) for tap in found.taps),
        fused_similarity=mean_similarity(found.fused_BDhw),
        separated_similarity=mean_similarity(found.separated_BDhw),
        fused_within=fused[0],
        fused_between=fused[1],
        separated_within=separated[0],
        separated_between=separated[1],
    )


def mean_similarity(maps_BChw: Tensor) -> float:
    """Mean cosine over all pairs of different locations of an image, averaged over images.

    The sum over pairs is |sum of unit vectors|^2, so the N x N matrix is never made.
    """
    unit = F.normalize(maps_BChw.float().flatten(2), dim=1)
    N = unit.shape[2]
    pairs = unit.sum(dim=2).square().sum(dim=1) - unit.square().sum(dim=(1, 2))
    return float((pairs / max(1, N * (N - 1))).mean())


def class_cosines(maps_BChw: Tensor, reduced_Bhw: Tensor) -> tuple[float, float]:
    """(mean cosine of locations to their class centre, mean cosine between class centres), over images; NaN if none."""
    within: list[float] = []
    between: list[float] = []
    for maps, labels in zip(maps_BChw.float(), reduced_Bhw, strict=True):
        labels = labels[: maps.shape[1], : maps.shape[2]]
        unit = F.normalize(maps[:, : labels.shape[0], : labels.shape[1]].flatten(1), dim=0)
        flat = labels.flatten()
        centres = []
        for k in flat.unique().tolist():
            if k == IGNORE_INDEX:
                continue
            members = unit[:, flat == k]
            centre = F.normalize(members.mean(dim=1), dim=0)
            within.append(float((centre @ members).mean()))
            centres.append(centre)
        if len(centres) > 1:
            cosine = torch.stack(centres) @ torch.stack(centres).T
            between.append(float(cosine[~torch.eye(len(centres), dtype=torch.bool, device=cosine.device)].mean()))
    return _mean(within), _mean(between)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
