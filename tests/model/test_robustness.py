"""Retention against means by hand, on the whole grid and parts of it."""

import dataclasses
import math

import pytest

from repsep_model.corruptions import CATEGORIES, CORRUPTIONS, SEVERITIES
from repsep_model.robustness import FAST_GRID, FULL_GRID, retention

CLEAN = 0.8


def test_retention_equals_means_by_hand() -> None:
    found = retention(
        CLEAN,
        {
            ("gaussian_blur", 1): 0.8,
            ("gaussian_blur", 3): 0.6,
            ("gaussian_blur", 5): 0.4,
            ("motion_blur", 2): 0.4,
            ("fog", 1): 0.2,
            ("fog", 5): 0.0,
        },
    )
    assert found.clean_miou == CLEAN
    assert found.corruptions == pytest.approx({"motion_blur": 0.5, "gaussian_blur": 0.75, "fog": 0.125})
    assert found.categories == pytest.approx({"blur": 0.625, "weather": 0.125})
    assert found.overall == pytest.approx((0.5 + 0.75 + 0.125) / 3)  # not (0.625 + 0.125) / 2


def test_retention_on_the_full_grid_equals_loops_over_categories() -> None:
    corrupted = {cell: CLEAN * (1 - i / 100) for i, cell in enumerate(FULL_GRID)}
    found = retention(CLEAN, corrupted)
    of_categories = []
    for category, names in CATEGORIES.items():
        kept = [corrupted[name, severity] / CLEAN for name in names for severity in SEVERITIES]
        of_categories.append(sum(kept) / len(kept))
        assert found.categories[category] == pytest.approx(of_categories[-1])
    assert found.corruptions["motion_blur"] == pytest.approx(0.98)
    assert found.overall == pytest.approx(sum(of_categories) / 4)
    assert list(found.corruptions) == list(CORRUPTIONS)


def test_the_full_grid_is_every_corruption_in_every_severity() -> None:
    assert len(FULL_GRID) == len(set(FULL_GRID)) == 80
    assert {name for name, _ in FULL_GRID} == set(CORRUPTIONS)
    assert {severity for _, severity in FULL_GRID} == set(SEVERITIES)


def test_the_fast_grid_is_one_corruption_of_each_category_in_three_severities() -> None:
    names = list(dict.fromkeys(name for name, _ in FAST_GRID))
    assert [sum(name in members for name in names) for members in CATEGORIES.values()] == [1, 1, 1, 1]
    assert list(FAST_GRID) == [(name, severity) for name in names for severity in (1, 3, 5)]
    assert set(FAST_GRID) <= set(FULL_GRID)


def test_an_unharmed_model_retains_all_of_each() -> None:
    found = retention(0.37, dict.fromkeys(FAST_GRID, 0.37))
    kept = [*found.corruptions.values(), *found.categories.values(), found.overall]
    assert kept == pytest.approx([1.0] * 9)


def test_retention_does_not_depend_on_the_order_of_results() -> None:
    corrupted = {cell: 0.7 / (i + 1) for i, cell in enumerate(FULL_GRID)}
    found, turned = retention(CLEAN, corrupted), retention(CLEAN, dict(reversed(corrupted.items())))
    assert found == turned
    assert list(found.categories) == list(turned.categories) == list(CATEGORIES)


@pytest.mark.parametrize("clean", [0.0, math.nan])
def test_a_clean_miou_of_zero_or_nan_gives_nan(clean: float) -> None:
    found = retention(clean, {("fog", 1): 0.1, ("jpeg", 1): 0.0})
    kept = [*found.corruptions.values(), *found.categories.values(), found.overall]
    assert len(kept) == 5
    assert all(math.isnan(value) for value in kept)


def test_a_corruption_without_a_score_is_nan_and_so_are_its_category_and_the_whole() -> None:
    found = retention(CLEAN, {("fog", 1): math.nan, ("fog", 3): 0.4, ("jpeg", 1): 0.4})
    assert [math.isnan(value) for value in found.corruptions.values()] == [False, True]
    assert found.categories["digital"] == pytest.approx(0.5)
    assert math.isnan(found.categories["weather"])
    assert math.isnan(found.overall)


def test_nothing_measured_gives_nan_overall() -> None:
    found = retention(CLEAN, {})
    assert (found.corruptions, found.categories) == ({}, {})
    assert math.isnan(found.overall)


@pytest.mark.parametrize("cell", [("rain", 1), ("fog", 0), ("fog", 6)])
def test_what_is_not_in_the_grid_is_refused_by_name(cell: tuple[str, int]) -> None:
    with pytest.raises(ValueError, match=rf"\('{cell[0]}', {cell[1]}\)\] are not among"):
        retention(CLEAN, {("fog", 1): 0.5, cell: 0.5})


def test_a_retention_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        retention(CLEAN, {}).overall = 1.0  # type: ignore[misc]
