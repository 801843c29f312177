"""Is the best of the search better than the default? Both trained again with fresh seeds, paired by seed.

The seed decides weights, order and augmentation, so a pair differs in its settings only, as far as that can be had. The
interval is Student's t over the differences: with three pairs it is wide, and that is the truth about three pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy import stats

from pipelines.config import SweepConfig
from pipelines.sweeping.points import DEFAULT, Point
from pipelines.sweeping.records import Trial

LEVEL = 0.95
WHOLE = {"holdout": 0.0, "validate_images": None}  # all of train, all of val
BEST = "best"
RULE = (
    "The default stays unless the lower end of the interval is above zero: a change that cannot be told from chance is "
    "not worth making."
)


@dataclass(frozen=True)
class Pair:
    """One seed: the mIoU on val of the best and of the default, None where that training failed."""

    seed: int
    best: float | None
    default: float | None

    @property
    def difference(self) -> float | None:
        return None if self.best is None or self.default is None else self.best - self.default


@dataclass(frozen=True)
class Comparison:
    """The pairs, the mean difference (best minus default) and its interval; None where there are too few pairs."""

    pairs: tuple[Pair, ...]
    errors: tuple[str, ...]
    difference: float | None
    low: float | None
    high: float | None

    @property
    def found_is_better(self) -> bool:
        """The rule of who wins. A default that cannot be trained at all loses to a best that can."""
        if self.low is not None:
            return self.low > 0
        trained = [pair for pair in self.pairs if pair.best is not None]
        return bool(trained) and all(pair.default is None for pair in self.pairs)

    @property
    def verdict(self) -> str:
        """One sentence, whichever way it fell."""
        if self.difference is None:
            return "No pair of trainings came to its end, so nothing was compared."
        means = f"The best of the search is {abs(self.difference):.4f} mIoU "
        means += "above the default" if self.difference >= 0 else "below the default"
        if self.low is None or self.high is None:
            return f"{means} in the one pair that was trained to its end, which has no interval."
        told = f"{means} on val, {LEVEL:.0%} interval {self.low:+.4f} to {self.high:+.4f}"
        if self.low > 0:
            return f"{told}: it is better."
        if self.high < 0:
            return f"{told}: it is worse."
        return f"{told}: that is not to be told from chance."


def confirmation_points(best: Point, default: Point, config: SweepConfig) -> list[Point]:
    """Both with each fresh seed, on all of train, validated on val once, at the end."""
    return [
        Point(
            f"{label}-{seed}",
            point.config.model_copy(update={"seed": seed} | WHOLE | {"validate_every": config.steps}),
        )
        for seed in fresh_seeds(config, best.config.seed)
        for label, point in ((BEST, best), (DEFAULT, default))
    ]


def fresh_seeds(config: SweepConfig, taken: int) -> list[int]:
    """Seeds other than the one that all trials of the search had."""
    first = config.seed + 1000
    return [seed for seed in range(first, first + config.confirm_seeds + 1) if seed != taken][: config.confirm_seeds]


def compare(trials: Sequence[Trial]) -> Comparison:
    """Of the trials of `confirmation_points`; a pair counts if both came to their end."""
    named = {trial.point.name: trial for trial in trials}
    seeds = dict.fromkeys(trial.point.config.seed for trial in trials)

    def miou(label: str, seed: int) -> float | None:
        trial = named[f"{label}-{seed}"]
        return None if trial.failed else trial.miou

    pairs = tuple(Pair(seed, miou(BEST, seed), miou(DEFAULT, seed)) for seed in seeds)
    errors = tuple(f"{trial.point.name}: {trial.error}" for trial in trials if trial.failed)
    differences = [pair.difference for pair in pairs if pair.difference is not None]
    if not differences:
        return Comparison(pairs, errors, None, None, None)
    mean, half = interval(differences)
    low, high = (mean - half, mean + half) if half is not None else (None, None)
    return Comparison(pairs, errors, mean, low, high)


def interval(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean and half the width of its t-interval; of one value None."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return mean, None
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    return mean, float(stats.t.ppf((1 + LEVEL) / 2, count - 1)) * deviation / math.sqrt(count)
