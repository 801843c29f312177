"""Whether a model becomes champion: what is asked of it, what it has, and a page that says both.

A challenger must be better on the same images: a paired bootstrap over images whose interval is above zero, and no
class that loses too much. There must be a few images: of one alone the interval has no width, whatever the model. What
the recipe asks beyond that (least IoU of classes, least retention) is asked of the first model too.
Shapes: K classes; counts are (images, K).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.config import RegisterConfig
from pipelines.errors import UsageError
from pipelines.evaluate import COUNTS, Counts
from pipelines.pages import render
from repsep_model.metrics import scores_from_counts

LARGE_CLASS_PIXELS = 1000
LEAST_IMAGES = 5
INTERVAL = (2.5, 97.5)


@dataclass(frozen=True)
class Check:
    """One thing that is asked: what, what was found, and whether that will do."""

    asked: str
    found: str
    passed: bool


@dataclass(frozen=True)
class Decision:
    """Whether a model becomes champion, why, with which figures, and what was asked."""

    promoted: bool
    reason: str
    figures: dict[str, float]
    checks: tuple[Check, ...] = ()
    classes: list[dict[str, Any]] = field(default_factory=list)
    """Name, IoU of both, their difference and labelled pixels of each class."""


def first(results: Mapping[str, Any], config: RegisterConfig) -> Decision:
    """Where there is no champion yet; `results` are the evaluation's."""
    checks = absolute_checks(results, config)
    refused = [check for check in checks if not check.passed]
    reason = f"{refused[0].asked}: {refused[0].found}" if refused else "first"
    return Decision(not refused, reason, {"miou": results["miou"]}, tuple(checks))


def absolute_checks(results: Mapping[str, Any], config: RegisterConfig) -> list[Check]:
    """What is asked whoever the champion is. Raises UsageError for what the evaluation cannot answer."""
    checks = []
    for name, floor in config.class_floors.items():
        if name not in results["iou"]:
            raise UsageError(
                f"register.class_floors: there is no class {name!r}; there are {', '.join(results['iou'])}"
            )
        iou = results["iou"][name]
        found = "it is in no image and no prediction" if iou is None else f"IoU {iou:.4f}"
        checks.append(Check(f"class {name} has an IoU of {floor} or more", found, iou is not None and iou >= floor))
    if config.min_retention is not None:
        kept = results.get("retention")
        if kept is None:
            raise UsageError(
                "register.min_retention needs an evaluation on corrupted images: evaluate.corruptions=fast or full"
            )
        asked = f"{config.min_retention} or more of the mIoU is kept on corrupted images"
        checks.append(Check(asked, f"{kept:.4f}", kept >= config.min_retention))
    return checks


def compare(
    ours: Counts, theirs: Counts, class_names: Sequence[str], config: RegisterConfig, others: Sequence[Check] = ()
) -> Decision:
    """The gate: counts of the challenger and of the champion on the same images in the same order."""
    new, old = (scores_from_counts(*(c[n].sum(axis=0) for n in COUNTS)) for c in (ours, theirs))
    difference = new.miou - old.miou
    low, high = paired_bootstrap(ours, theirs, config.bootstrap)
    figures = {"miou": new.miou, "champion_miou": old.miou, "difference": difference, "low": low, "high": high}
    told = f"mIoU {difference:+.4f} against the champion, 95 % interval [{low:+.4f}, {high:+.4f}]"
    better = Check("better than the champion on the same images", told, low > 0)
    images = len(ours["labelled"])
    enough = Check(f"compared on {LEAST_IMAGES} images or more", f"{images} images", images >= LEAST_IMAGES)
    labelled = ours["labelled"].sum(axis=0)
    losses = np.where(labelled >= LARGE_CLASS_PIXELS, old.iou - new.iou, -np.inf)
    worst = int(np.nanargmax(losses))
    dropped = bool(losses[worst] > config.max_class_drop)
    loss = f"class {class_names[worst]} loses {losses[worst]:.4f} IoU, more than {config.max_class_drop}"
    none = f"the largest loss is {max(float(losses[worst]), 0.0):.4f}"
    asked = f"no class of {LARGE_CLASS_PIXELS} pixels or more loses over {config.max_class_drop} IoU"
    checks = (better, enough, Check(asked, loss if dropped else none, not dropped), *others)
    reason = told
    if not better.passed:
        reason = f"{told} is not above zero"
    elif not enough.passed:
        reason = f"{told} rests on {images} images; at least {LEAST_IMAGES} are needed to be champion"
    elif refused := [check for check in checks if not check.passed]:
        reason = loss if refused[0].asked == asked else f"{refused[0].asked}: {refused[0].found}"
    classes = [
        {"name": name, "ours": _number(a), "theirs": _number(b), "difference": _number(a - b), "pixels": int(pixels)}
        for name, a, b, pixels in zip(class_names, new.iou, old.iou, labelled, strict=True)
    ]
    return Decision(all(check.passed for check in checks), reason, figures, checks, classes)


def paired_bootstrap(ours: Counts, theirs: Counts, resamples: int, seed: int = 0) -> tuple[float, float]:
    """95 % interval of the difference of mIoU when images are drawn again with replacement, the same for both."""
    images = len(ours["labelled"])
    rng = np.random.Generator(np.random.Philox(key=[seed, resamples]))
    draws = rng.multinomial(images, np.full(images, 1 / images), size=resamples)
    differences = _resampled_miou(ours, draws) - _resampled_miou(theirs, draws)
    low, high = np.nanpercentile(differences, INTERVAL)
    return float(low), float(high)


def gate_page(decision: Decision, *, model: str, champion: str | None, evaluation: Mapping[str, Any]) -> str:
    """Self-contained HTML: what was asked, what was found, class by class."""
    return render("gate.html", decision=decision, model=model, champion=champion, evaluation=evaluation)


def _resampled_miou(counts: Counts, draws: NDArray[np.int64]) -> NDArray[np.float64]:
    intersection, predicted, labelled = (draws @ counts[name] for name in COUNTS)
    union = predicted + labelled - intersection
    with np.errstate(invalid="ignore", divide="ignore"):
        iou = np.where(union > 0, intersection / union, np.nan)
    return np.nanmean(iou, axis=1)


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
