"""How much of its mIoU a model keeps on corrupted images: per corruption, per category and overall.

After Kamann & Rother 2020, "Benchmarking the Robustness of Semantic Segmentation Models", who also report the mIoU on
corrupted images in relation to that on clean ones.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass

from repsep_model.corruptions import CATEGORIES, CORRUPTIONS, SEVERITIES

Grid = tuple[tuple[str, int], ...]
"""(name, severity) of each corruption to be measured."""

FULL_GRID: Grid = tuple(itertools.product(CORRUPTIONS, SEVERITIES))
"""Sixteen corruptions in five severities: 80 evaluations."""

FAST_GRID: Grid = tuple(itertools.product(("gaussian_blur", "gaussian_noise", "jpeg", "fog"), (1, 3, 5)))
"""A corruption of each category, quick to compute, in three severities: 12 evaluations, comparable among themselves."""


@dataclass(frozen=True)
class Retention:
    """Corrupted mIoU / clean mIoU: 1 is unharmed, 0 is lost, NaN where either is NaN or the clean one is 0.

    `corruptions` are means over severities, `categories` over their corruptions, `overall` over all corruptions: each
    weighs the same, even where one category has fewer (on both grids a mean over categories would be no other).
    What was not measured is left out; only results of one grid can be compared.
    """

    clean_miou: float
    corruptions: dict[str, float]
    categories: dict[str, float]
    overall: float


def retention(clean_miou: float, corrupted: Mapping[tuple[str, int], float]) -> Retention:
    """Retention from the mIoU at each (name, severity), any part of FULL_GRID; ValueError for what is not in it."""
    unknown = sorted(set(corrupted) - set(FULL_GRID))
    if unknown:
        raise ValueError(f"{unknown} are not among the (name, severity) of robustness.FULL_GRID")
    corruptions: dict[str, float] = {}
    for name in CORRUPTIONS:
        mious = [corrupted[name, severity] for severity in SEVERITIES if (name, severity) in corrupted]
        if mious:
            corruptions[name] = _mean(mious) / clean_miou if clean_miou else math.nan
    categories = {
        category: _mean([corruptions[name] for name in names if name in corruptions])
        for category, names in CATEGORIES.items()
        if not corruptions.keys().isdisjoint(names)
    }
    return Retention(clean_miou, corruptions, categories, _mean(list(corruptions.values())))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
