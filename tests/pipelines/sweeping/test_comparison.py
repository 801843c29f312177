"""The decision between the best of the search and the default."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from pipelines.config import SweepConfig, TrainConfig
from pipelines.sweeping.comparison import Comparison, compare, confirmation_points, fresh_seeds, interval
from pipelines.sweeping.points import Point, points
from pipelines.sweeping.records import FINISHED, Trial

CONFIG = SweepConfig(steps=50, validate_every=10, confirm_seeds=3, seed=4)
DEFAULT, BEST = points(SweepConfig(steps=50, validate_every=10, trials=2), TrainConfig())


def compared(best: list[float | None], default: list[float | None]) -> Comparison:
    """Of trainings with these results; None failed."""
    config = CONFIG.model_copy(update={"confirm_seeds": len(best)})
    results = [each for pair in zip(best, default, strict=True) for each in pair]
    trials = [
        Trial(point, (), "failed: no memory") if miou is None else Trial(point, ((50, miou),), FINISHED)
        for point, miou in zip(confirmation_points(BEST, DEFAULT, config), results, strict=True)
    ]
    return compare(trials)


def test_both_are_trained_with_the_same_fresh_seeds_on_all_of_train() -> None:
    found = confirmation_points(BEST, DEFAULT, CONFIG)
    assert len({p.key for p in found}) == 6
    assert fresh_seeds(CONFIG, taken=0) == [1004, 1005, 1006]
    assert fresh_seeds(CONFIG, taken=1005) == [1004, 1006, 1007]
    for label, point in (("best", BEST), ("default", DEFAULT)):
        mine = [p for p in found if p.name.startswith(label)]
        assert [p.config.seed for p in mine] == fresh_seeds(CONFIG, point.config.seed)
        for each in mine:
            same = {"seed": point.config.seed, "holdout": point.config.holdout, "validate_every": 10}
            assert (each.config.holdout, each.config.validate_every) == (0, 50)
            assert each.config.model_copy(update=same) == point.config


def test_the_interval_is_students_over_the_paired_differences() -> None:
    best, default = [0.50, 0.53, 0.51], [0.47, 0.49, 0.50]
    found = compared(best, default)
    reference = stats.ttest_rel(best, default).confidence_interval(0.95)
    assert found.difference == pytest.approx(np.mean(best) - np.mean(default))
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))


def test_the_best_wins_only_where_the_whole_interval_is_above_zero() -> None:
    clear, unclear = compared([0.5, 0.5, 0.51], [0.4, 0.41, 0.4]), compared([0.5, 0.6, 0.4], [0.4, 0.4, 0.45])
    assert clear.found_is_better
    assert clear.verdict.endswith("it is better.")
    assert unclear.difference is not None
    assert unclear.difference > 0
    assert not unclear.found_is_better
    assert "not to be told from chance" in unclear.verdict


def test_a_best_that_turns_out_worse_is_called_worse() -> None:
    found = compared([0.4, 0.41, 0.4], [0.5, 0.5, 0.51])
    assert not found.found_is_better
    assert "below the default" in found.verdict
    assert found.verdict.endswith("it is worse.")


def test_the_seed_of_a_failed_training_does_not_count() -> None:
    found = compared([0.5, None, 0.52], [0.4, 0.1, 0.41])
    assert found.difference == pytest.approx(0.105)
    half = stats.t.ppf(0.975, 1) * np.std([0.1, 0.11], ddof=1) / math.sqrt(2)
    assert found.low == pytest.approx(0.105 - half)
    assert found.errors == ("best-1005: no memory",)


def test_one_pair_gives_a_difference_and_no_interval_and_the_default_stays() -> None:
    found = compared([0.9, None, None], [0.1, 0.1, None])
    assert (found.difference, found.low, found.high) == (pytest.approx(0.8), None, None)
    assert not found.found_is_better
    assert "no interval" in found.verdict


def test_a_default_that_cannot_be_trained_loses_to_a_best_that_can() -> None:
    assert compared([0.1, None], [None, None]).found_is_better
    assert not compared([None, None], [None, None]).found_is_better
    assert not compared([None, 0.9], [0.1, None]).found_is_better
    assert "nothing was compared" in compared([None, 0.9], [0.1, None]).verdict


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(2000):
        mean, half = interval(list(rng.normal(0.01, 0.02, 3)))
        assert half is not None
        covered += abs(mean - 0.01) <= half
    assert covered / 2000 == pytest.approx(0.95, abs=0.02)


def test_equal_differences_have_an_interval_of_no_width() -> None:
    mean, half = interval([0.02, 0.02, 0.02])
    assert (mean, half) == (pytest.approx(0.02), pytest.approx(0, abs=1e-9))


def test_points_are_named_apart() -> None:
    assert {p.name for p in confirmation_points(BEST, DEFAULT, CONFIG)} == {
        f"{label}-{seed}" for label in ("best", "default") for seed in (1004, 1005, 1006)
    }
    assert isinstance(confirmation_points(BEST, DEFAULT, CONFIG)[0], Point)
