"""Over-smoothness and separation against loops over pairs.

Shapes: B batch, C channels, h x w grid, K classes.
"""

import math

import pytest
import torch
import torch.nn.functional as F

from repsep_model import separation_report
from repsep_model.diagnostics import SeparationReport, class_cosines, mean_similarity
from repsep_model.labels import IGNORE_INDEX, majority_reduce
from tests.model.tiny import K, random_images, random_labels, tiny_segmentor


def test_mean_similarity_equals_all_pairs_of_different_locations() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 3, 5)
    expected = []
    for image in maps.flatten(2):
        pairs = [(i, j) for i in range(15) for j in range(15) if i != j]
        cosines = [float(F.cosine_similarity(image[:, i], image[:, j], dim=0)) for i, j in pairs]
        expected.append(sum(cosines) / len(pairs))
    assert mean_similarity(maps) == pytest.approx(sum(expected) / 2, rel=1e-4)


def test_alike_locations_have_similarity_one_and_opposite_ones_less_than_zero() -> None:
    assert mean_similarity(torch.ones(1, 4, 3, 3)) == pytest.approx(1)
    opposite = torch.ones(1, 4, 1, 2)
    opposite[..., 1] = -3
    assert mean_similarity(opposite) == pytest.approx(-1)


def test_single_location_has_no_pairs() -> None:
    assert mean_similarity(torch.ones(1, 4, 1, 1)) == pytest.approx(0)


def test_class_cosines_equal_brute_force() -> None:
    torch.manual_seed(0)
    maps = torch.randn(2, 4, 3, 5)
    labels = torch.randint(0, 3, (2, 3, 5))
    labels[0, 0] = IGNORE_INDEX
    withins, betweens = [], []
    for image, mask in zip(maps, labels, strict=True):
        centres = {}
        for k in range(3):
            members = [F.normalize(image[:, y, x], dim=0) for y in range(3) for x in range(5) if mask[y, x] == k]
            centres[k] = F.normalize(torch.stack(members).mean(dim=0), dim=0)
            withins.append(sum(float(centres[k] @ z) for z in members) / len(members))
        cosines = [float(centres[i] @ centres[j]) for i, j in ((0, 1), (0, 2), (1, 2))]
        betweens.append(sum(cosines) / 3)
    within, between = class_cosines(maps, labels)
    assert within == pytest.approx(sum(withins) / 6, rel=1e-5)
    assert between == pytest.approx(sum(betweens) / 2, rel=1e-5)


def test_padded_locations_have_no_class() -> None:
    maps = torch.randn(1, 4, 4, 6)
    labels = torch.randint(0, 2, (1, 3, 5))
    assert class_cosines(maps, labels) == class_cosines(maps[..., :3, :5], labels)


def test_classes_that_are_lacking_give_nan() -> None:
    maps = torch.randn(1, 4, 2, 2)
    within, between = class_cosines(maps, torch.full((1, 2, 2), IGNORE_INDEX))
    assert math.isnan(within)
    assert math.isnan(between)
    within, between = class_cosines(maps, torch.zeros(1, 2, 2))
    assert -1 <= within <= 1
    assert math.isnan(between)


def test_margin_gain_is_what_separation_adds_to_within_minus_between() -> None:
    report = SeparationReport((0.5,), 0.5, 0.4, 0.6, 0.3, 0.8, 0.1)
    assert report.margin_gain == pytest.approx((0.8 - 0.1) - (0.6 - 0.3))


@pytest.mark.parametrize("training", [True, False])
def test_report_measures_a_model_at_odd_size_and_leaves_its_mode(training: bool) -> None:
    model = tiny_segmentor(drop_path=0.9).train(training)
    images, labels = random_images(2, 97, 131), random_labels(2, 97, 131)
    reports = [separation_report(model, images, labels) for _ in range(2)]
    assert reports[0] == reports[1]
    assert len(reports[0].tap_similarity) == 4
    cosines = [*reports[0].tap_similarity, *list(vars(reports[0]).values())[1:]]
    assert all(-1 <= value <= 1 for value in cosines)
    assert model.training == training


def test_report_holds_the_cosines_of_taps_and_of_both_maps() -> None:
    model, images, labels = tiny_segmentor().eval(), random_images(2, 96, 64), random_labels(2, 96, 64)
    report = separation_report(model, images, labels)
    with torch.no_grad():
        found = model.features(images)
    reduced = majority_reduce(labels, 8, K)
    assert report.tap_similarity == pytest.approx([mean_similarity(tap) for tap in found.taps], rel=1e-4)
    assert report.fused_similarity == pytest.approx(mean_similarity(found.fused_BDhw), rel=1e-4)
    assert report.separated_similarity == pytest.approx(mean_similarity(found.separated_BDhw), rel=1e-4)
    fused = report.fused_within, report.fused_between
    separated = report.separated_within, report.separated_between
    assert fused == pytest.approx(class_cosines(found.fused_BDhw, reduced), rel=1e-4)
    assert separated == pytest.approx(class_cosines(found.separated_BDhw, reduced), rel=1e-4)
    assert fused != pytest.approx(separated, rel=1e-3)


def test_report_without_separation_gains_nothing() -> None:
    report = separation_report(tiny_segmentor(separation="none"), random_images(1, 96, 96), random_labels(1, 96, 96))
    assert report.margin_gain == 0
    assert report.fused_similarity == report.separated_similarity


def test_report_sees_the_classes_of_the_labels_given() -> None:
    model, images = tiny_segmentor(), random_images(1, 96, 96)
    found = {separation_report(model, images, random_labels(1, 96, 96, seed=seed)).fused_between for seed in range(3)}
    assert len(found) == 3
    one_class = separation_report(model, images, torch.full((1, 96, 96), K - 1))
    assert math.isnan(one_class.fused_between)
