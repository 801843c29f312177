"""Which parameters go with a better result, and which only seem to."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipelines.sweeping.importance import FEWEST, importances


def trials(count: int, seed: int = 0) -> list[dict[str, float | str]]:
    rng = np.random.default_rng(seed)
    return [
        {
            "lr": float(10 ** rng.uniform(-4, -2)),
            "w.local": float(rng.choice([0.0, 10 ** rng.uniform(-1, 0)])),
            "separation": str(rng.choice(["none", "local", "region"])),
        }
        for _ in range(count)
    ]


def test_a_number_that_decides_alone_explains_everything_and_says_which_way() -> None:
    found = trials(20)
    (first, *_) = importances(found, [-float(t["lr"]) for t in found])
    assert (first.name, first.how) == ("lr", "less is better")
    assert first.share == pytest.approx(1)
    assert first.p == 1 / 5000


def test_a_choice_that_decides_is_found_and_the_best_one_is_named() -> None:
    found = trials(30)
    noise = np.random.default_rng(1).normal(0, 0.02, 30)
    scores = [(t["separation"] == "region") * 0.3 + n for t, n in zip(found, noise, strict=True)]
    first = importances(found, scores)[0]
    assert (first.name, first.how) == ("separation", "best: region")
    assert first.p < 0.001


def test_the_share_of_a_number_is_the_squared_rank_correlation_less_what_chance_gives() -> None:
    found, rng = trials(12), np.random.default_rng(2)
    scores = [float(t["lr"]) + rng.normal(0, 0.003) for t in found]
    rho = stats.spearmanr([t["lr"] for t in found], scores).statistic
    share = next(i.share for i in importances(found, scores) if i.name == "lr")
    chance = 1 / 11  # the mean of the squared correlation of 12 ranks in random order
    assert share == pytest.approx((rho**2 - chance) / (1 - chance), abs=0.01)


def test_p_agrees_with_the_exact_test_of_the_correlation() -> None:
    found, rng = trials(9), np.random.default_rng(3)
    scores = [np.log10(float(t["lr"])) + rng.normal(0, 0.6) for t in found]
    p = next(i.p for i in importances(found, scores) if i.name == "lr")
    exact = stats.permutation_test(
        ([t["lr"] for t in found],),
        lambda x: abs(stats.spearmanr(x, scores).statistic),
        permutation_type="pairings",
        n_resamples=20_000,
        alternative="greater",
        rng=np.random.default_rng(0),
    ).pvalue
    assert p == pytest.approx(exact, abs=0.02)


def test_what_has_no_effect_is_rarely_taken_for_important() -> None:
    below = [
        i.p < 0.05
        for seed in range(60)
        for i in importances(trials(10, seed), list(np.random.default_rng(1000 + seed).normal(size=10)))
    ]
    assert len(below) == 180
    assert np.mean(below) < 0.12


def test_a_choice_that_every_trial_made_differently_explains_nothing() -> None:
    found = [{"backbone": f"b{n}", "lr": 10.0**-n} for n in range(6)]
    shares = {i.name: i.share for i in importances(found, [3, 1, 2, 6, 5, 4])}
    assert shares["backbone"] == 0


def test_what_was_the_same_in_all_trials_is_left_out() -> None:
    found = [t | {"separation": "none"} for t in trials(8)]
    assert "separation" not in {i.name for i in importances(found, list(range(8)))}


def test_few_trials_or_equal_results_say_nothing() -> None:
    assert importances(trials(FEWEST - 1), list(range(FEWEST - 1))) == []
    assert importances(trials(8), [0.5] * 8) == []
