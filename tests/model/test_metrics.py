"""The confusion matrix, boundary IoU and calibration against sets, loops and scikit-learn.

Shapes: B batch, K classes, H x W pixels, M bins.
"""

import math
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import ndimage
from sklearn import metrics as sklearn_metrics
from sklearn.calibration import calibration_curve
from torch import Tensor

from repsep_model import ConfusionMatrix
from repsep_model.labels import IGNORE_INDEX
from repsep_model.metrics import (
    BoundaryCounts,
    Calibration,
    Scores,
    boundary_distance,
    boundary_mask,
    scores_from_counts,
)

K = 5


def pair(seed: int = 0, ignored: float = 0.2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, K - 1, (2, 13, 11), generator=generator)  # class K-1 does not occur
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE_INDEX
    return labels, torch.randint(0, K - 1, (2, 13, 11), generator=generator)


def matrix(labels: Tensor, predictions: Tensor) -> ConfusionMatrix:
    confusion = ConfusionMatrix(K)
    confusion.update(labels, predictions)
    return confusion


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_counts_equal_a_count_by_hand(dtype: torch.dtype) -> None:
    labels, predictions = pair()
    expected = [[0] * K for _ in range(K)]
    for label, prediction in zip(labels.flatten().tolist(), predictions.flatten().tolist(), strict=True):
        if label != IGNORE_INDEX:
            expected[label][prediction] += 1
    assert matrix(labels.to(dtype), predictions.to(dtype)).counts.tolist() == expected


def test_scores_equal_those_of_pixel_sets() -> None:
    labels, predictions = (t.flatten().tolist() for t in pair())
    counted = [i for i, label in enumerate(labels) if label != IGNORE_INDEX]
    ious, accs, dices, shares = [], [], [], []
    for k in range(K - 1):
        truth, guess = {i for i in counted if labels[i] == k}, {i for i in counted if predictions[i] == k}
        ious.append(len(truth & guess) / len(truth | guess))
        accs.append(len(truth & guess) / len(truth))
        dices.append(2 * len(truth & guess) / (len(truth) + len(guess)))
        shares.append(len(truth) / len(counted))
    scores = matrix(*pair()).scores()
    assert scores.iou[:-1].tolist() == pytest.approx(ious)
    assert scores.acc[:-1].tolist() == pytest.approx(accs)
    assert scores.dice[:-1].tolist() == pytest.approx(dices)
    assert scores.means() == pytest.approx(
        {
            "miou": sum(ious) / (K - 1),
            "macc": sum(accs) / (K - 1),
            "aacc": sum(labels[i] == predictions[i] for i in counted) / len(counted),
            "fwiou": sum(share * iou for share, iou in zip(shares, ious, strict=True)),
            "mdice": sum(dices) / (K - 1),
        }
    )


CASES = {
    "classes absent from both, ignored pixels": pair(),
    "no ignored pixel": pair(ignored=0.0),
    "class 4 in labels only": (torch.tensor([0, 4, 4, 1, IGNORE_INDEX]), torch.tensor([0, 1, 0, 1, 4])),
    "class 4 in predictions only": (torch.tensor([0, 3, 1, IGNORE_INDEX]), torch.tensor([4, 3, 1, 2])),
    "one class, all right": (torch.full((6, 7), 2), torch.full((6, 7), 2)),
    "one class, all wrong": (torch.full((6, 7), 2), torch.full((6, 7), 3)),
}


@pytest.mark.parametrize("case", CASES)
def test_counts_and_scores_equal_those_of_scikit_learn(case: str) -> None:
    labels, predictions = CASES[case]
    valid = (labels != IGNORE_INDEX).numpy()
    truth, guess = labels.numpy()[valid], predictions.numpy()[valid]
    found = sorted({*truth.tolist(), *guess.tolist()})  # scikit-learn gives absent classes 0, which would enter a mean
    labelled = sorted(set(truth.tolist()))
    confusion = matrix(labels, predictions)
    scores = confusion.scores()
    assert confusion.counts.tolist() == sklearn_metrics.confusion_matrix(truth, guess, labels=range(K)).tolist()
    iou = sklearn_metrics.jaccard_score(truth, guess, average=None, labels=found, zero_division=0)
    acc = sklearn_metrics.recall_score(truth, guess, average=None, labels=labelled)
    dice = sklearn_metrics.f1_score(truth, guess, average=None, labels=found)
    assert scores.iou[found] == pytest.approx(iou)
    assert scores.acc[labelled] == pytest.approx(acc)
    assert scores.dice[found] == pytest.approx(dice)
    assert np.isnan(np.delete(scores.iou, found)).all()
    assert np.isnan(np.delete(scores.acc, labelled)).all()
    assert scores.means() == pytest.approx(
        {
            "miou": iou.mean(),
            "macc": acc.mean(),
            "aacc": sklearn_metrics.accuracy_score(truth, guess),
            "fwiou": sklearn_metrics.jaccard_score(truth, guess, average="weighted", labels=labelled, zero_division=0),
            "mdice": dice.mean(),
        }
    )
    assert scores.classes_scored == len(found)


def test_class_that_neither_occurs_nor_is_predicted_has_no_score_and_enters_no_mean() -> None:
    scores = matrix(*pair()).scores()
    assert [math.isnan(float(v[K - 1])) for v in (scores.iou, scores.acc, scores.dice)] == [True, True, True]
    assert scores.classes_scored == K - 1


def test_class_that_is_only_predicted_scores_zero_and_enters_the_mean() -> None:
    scores = matrix(torch.tensor([0, 0, 0]), torch.tensor([0, 0, 1])).scores()
    assert scores.iou[:2].tolist() == pytest.approx([2 / 3, 0])
    assert scores.miou == pytest.approx(1 / 3)
    assert math.isnan(float(scores.acc[1]))
    assert scores.classes_scored == 2


def test_padding_pixels_never_change_any_score() -> None:
    labels, predictions = pair()
    padded = torch.full((2, 20, 20), IGNORE_INDEX)
    padded[:, :13, :11] = labels
    guesses = torch.randint(0, K, (2, 20, 20))
    guesses[:, :13, :11] = predictions
    assert torch.equal(matrix(padded, guesses).counts, matrix(labels, predictions).counts)


def test_predictions_at_ignored_pixels_may_be_anything() -> None:
    confusion = matrix(torch.tensor([IGNORE_INDEX, 1]), torch.tensor([IGNORE_INDEX, 1]))
    assert int(confusion.counts.sum()) == 1


def test_ranks_matrices_add_up_to_the_whole() -> None:
    labels, predictions = pair()
    shares = [matrix(labels[b], predictions[b]).counts for b in range(2)]
    assert torch.equal(shares[0] + shares[1], matrix(labels, predictions).counts)


def test_updates_add_up() -> None:
    labels, predictions = pair()
    confusion = ConfusionMatrix(K)
    for b in range(2):
        confusion.update(labels[b], predictions[b])
    assert torch.equal(confusion.counts, matrix(labels, predictions).counts)


def test_one_more_pixel_counts_past_two_to_the_24() -> None:
    confusion = ConfusionMatrix(2)
    confusion.counts[1, 1] = 2**24
    confusion.update(torch.tensor([1]), torch.tensor([1]))
    assert int(confusion.counts[1, 1]) == 2**24 + 1


@pytest.mark.parametrize(
    ("label", "prediction"),
    [(K, 0), (0, K), (0, IGNORE_INDEX), (1, -1), (-1, 1), (K - 1, K)],
)
def test_ids_out_of_range_are_refused_and_nothing_is_counted(label: int, prediction: int) -> None:
    """A prediction of K would otherwise be counted as class 0 of the next row."""
    confusion = ConfusionMatrix(K)
    with pytest.raises(ValueError, match=r"class ids must be 0\.\.4, in labels also 255"):
        confusion.update(torch.tensor([0, label]), torch.tensor([0, prediction]))
    assert not confusion.counts.any()


def test_shapes_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match=r"labels \(2, 3\) and predictions \(3, 2\) differ in shape"):
        ConfusionMatrix(K).update(torch.zeros(2, 3), torch.zeros(3, 2))


def test_perfect_predictions_score_one() -> None:
    labels, _ = pair()
    scores = matrix(labels, labels).scores()
    assert set(scores.means().values()) == {1.0}


def test_nothing_counted_gives_nan_without_a_warning() -> None:
    scores = ConfusionMatrix(K).scores()
    assert all(math.isnan(v) for v in scores.means().values())
    assert scores.classes_scored == 0


def test_scores_follow_from_the_counts_per_class_alone() -> None:
    confusion = matrix(*pair())
    counts = confusion.counts.numpy()
    direct: Scores = scores_from_counts(np.diag(counts), counts.sum(axis=0), counts.sum(axis=1))
    assert direct.means() == confusion.scores().means()


def blobs(height: int, width: int, seed: int = 0, ignored: bool = False) -> tuple[Tensor, Tensor]:
    """Label and prediction (H, W) uint8: regions of classes 0..K-2 and their like, moved and bent."""
    rng = np.random.default_rng(seed)
    fields = ndimage.gaussian_filter(rng.normal(size=(K - 1, height, width)), (0, 2, 2))
    bent = np.roll(fields, 1, axis=2) + 0.3 * ndimage.gaussian_filter(rng.normal(size=fields.shape), (0, 2, 2))
    labels, predictions = (f.argmax(axis=0).astype(np.uint8) for f in (fields, bent))
    if ignored:
        labels[ndimage.gaussian_filter(rng.normal(size=labels.shape), 2) > 0.12] = IGNORE_INDEX
    return torch.from_numpy(labels), torch.from_numpy(predictions)


def boundary(labels: Tensor, predictions: Tensor, ratio: float = 0.02) -> BoundaryCounts:
    counts = BoundaryCounts(K, ratio=ratio)
    counts.update(labels, predictions)
    return counts


def eroded_boundary(mask: NDArray[np.bool_], distance: int) -> NDArray[np.bool_]:
    """As the authors' program: the mask without what `distance` erosions by a 3 x 3 square leave."""
    eroded = ndimage.binary_erosion(mask, np.ones((3, 3)), iterations=distance, border_value=0)
    return mask & ~eroded


@pytest.mark.parametrize("size", [(40, 56), (31, 8), (5, 60), (1, 9), (3, 3)])
@pytest.mark.parametrize("ratio", [1e-6, 0.02, 0.05, 0.2])
def test_boundary_counts_equal_iterated_erosion_class_by_class(size: tuple[int, int], ratio: float) -> None:
    labels, predictions = blobs(*size)
    distance = max(1, round(ratio * math.sqrt(size[0] ** 2 + size[1] ** 2)))
    expected = []
    for k in range(K):
        truth, guess = (eroded_boundary(ids.numpy() == k, distance) for ids in (labels, predictions))
        expected.append([int((truth & guess).sum()), int((truth | guess).sum())])
    counts = boundary(labels, predictions, ratio).counts
    assert counts.T.tolist() == expected
    assert counts.dtype == torch.int64


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("distance", [1, 2, 5])
def test_boundary_beside_ignored_pixels_equals_a_search_of_each_pixels_surroundings(seed: int, distance: int) -> None:
    labels, _ = blobs(23, 31, seed, ignored=True)
    assert (labels == IGNORE_INDEX).any()
    expected = torch.zeros(23, 31, dtype=torch.bool)
    for y in range(23):
        for x in range(31):
            around = [
                int(labels[v, u]) if 0 <= v < 23 and 0 <= u < 31 else None
                for v in range(y - distance, y + distance + 1)
                for u in range(x - distance, x + distance + 1)
            ]
            own = int(labels[y, x])
            expected[y, x] = own != IGNORE_INDEX and any(other not in (own, IGNORE_INDEX) for other in around)
    assert torch.equal(boundary_mask(labels, distance), expected)


def test_boundary_scores_are_intersection_over_union_and_their_mean_over_scored_classes() -> None:
    counts = boundary(*blobs(40, 56))
    scores = counts.scores()
    expected = [i / u for i, u in counts.counts.T.tolist()[: K - 1]]
    assert scores.iou[: K - 1].tolist() == pytest.approx(expected)
    assert scores.miou == pytest.approx(sum(expected) / (K - 1))
    assert 0 < scores.miou < 1
    assert math.isnan(float(scores.iou[K - 1]))
    assert scores.classes_scored == K - 1


@pytest.mark.parametrize(
    ("size", "distance"), [((480, 640), 16), ((640, 480), 16), ((1024, 2048), 46), ((30, 40), 1), ((10, 10), 1)]
)
def test_a_boundary_is_two_percent_of_the_diagonal_wide_and_at_least_one_pixel(
    size: tuple[int, int], distance: int
) -> None:
    assert boundary_distance(*size) == distance


def test_the_images_border_is_a_boundary() -> None:
    one_class = torch.full((20, 30), 2)
    counts = boundary(one_class, one_class, ratio=0.1)
    distance = boundary_distance(20, 30, 0.1)
    frame = 20 * 30 - (20 - 2 * distance) * (30 - 2 * distance)
    assert counts.counts[:, 2].tolist() == [frame, frame]
    assert counts.scores().miou == 1.0


def test_an_ignored_area_makes_no_boundary() -> None:
    one_class = torch.full((20, 30), 2)
    holed = one_class.clone()
    holed[8:12, 10:20] = IGNORE_INDEX
    assert torch.equal(boundary(holed, one_class).counts, boundary(one_class, one_class).counts)


def test_a_class_that_borders_on_ignored_pixels_only_has_no_boundary_score() -> None:
    labels = torch.full((40, 40), IGNORE_INDEX)
    labels[15:25, 15:25] = 3
    scores = boundary(labels, labels.where(labels == 3, 1)).scores()
    assert np.isnan(scores.iou).all()
    assert scores.classes_scored == 0


def test_predictions_on_ignored_pixels_never_change_a_boundary() -> None:
    labels, predictions = blobs(40, 56, ignored=True)
    anything = torch.randint(0, 256, labels.shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    changed = predictions.where(labels != IGNORE_INDEX, anything)
    assert torch.equal(boundary(labels, changed).counts, boundary(labels, predictions).counts)


def test_boundary_iou_sees_a_thickened_contour_that_iou_hardly_sees() -> None:
    labels = torch.zeros(200, 200, dtype=torch.int64)
    labels[40:160, 40:160] = 1
    predictions = torch.zeros_like(labels)
    predictions[38:162, 38:162] = 1
    distance = boundary_distance(200, 200)
    ring = 120**2 - (120 - 2 * distance) ** 2
    predicted_ring = 124**2 - (124 - 2 * distance) ** 2
    shared = 120**2 - (124 - 2 * distance) ** 2
    scores = boundary(labels, predictions).scores()
    assert scores.iou[1] == pytest.approx(shared / (ring + predicted_ring - shared))
    assert scores.iou[1] < 0.6 < 0.9 < matrix(labels, predictions).scores().iou[1]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_perfect_boundaries_score_one(dtype: torch.dtype) -> None:
    labels, _ = (t.to(dtype) for t in blobs(40, 56, ignored=True))
    assert boundary(labels, labels).scores().miou == 1.0


def test_boundary_counts_of_images_and_ranks_add_up() -> None:
    images = [blobs(40, 56, 1), blobs(33, 20, 2, ignored=True)]
    whole = BoundaryCounts(K)
    for labels, predictions in images:
        whole.update(labels, predictions)
    assert torch.equal(whole.counts, boundary(*images[0]).counts + boundary(*images[1]).counts)


def test_the_254th_id_has_a_boundary() -> None:
    counts = BoundaryCounts(255)
    labels = torch.full((40, 40), 254, dtype=torch.uint8)
    labels[:, 20:] = 0
    counts.update(labels, labels)
    assert counts.counts[:, 254].tolist() == [20 * 40 - 18 * 38] * 2


@pytest.mark.parametrize(("label", "prediction"), [(K, 0), (0, K), (0, IGNORE_INDEX), (1, -1), (-1, 1), (256, 0)])
def test_boundary_refuses_ids_out_of_range_and_counts_nothing(label: int, prediction: int) -> None:
    counts = BoundaryCounts(K)
    with pytest.raises(ValueError, match=r"class ids must be 0\.\.4, in labels also 255"):
        counts.update(torch.tensor([[0, label]]), torch.tensor([[0, prediction]]))
    assert not counts.counts.any()


def test_boundary_refuses_shapes_that_differ_and_batches() -> None:
    with pytest.raises(ValueError, match=r"labels \(2, 3\) and predictions \(3, 2\) differ in shape"):
        BoundaryCounts(K).update(torch.zeros(2, 3), torch.zeros(3, 2))
    with pytest.raises(ValueError, match=r"labels have shape \(1, 2, 3\): pass one image"):
        BoundaryCounts(K).update(torch.zeros(1, 2, 3), torch.zeros(1, 2, 3))


@pytest.mark.parametrize("ratio", [0.0, -0.02, math.nan])
def test_boundary_refuses_a_ratio_that_is_not_over_zero(ratio: float) -> None:
    with pytest.raises(ValueError, match=r"ratio is a fraction of the image's diagonal over 0, got"):
        BoundaryCounts(K, ratio=ratio)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", [ConfusionMatrix(K), BoundaryCounts(K), Calibration()])
def test_ids_that_are_floats_are_refused_and_nothing_is_counted(state: Any, dtype: torch.dtype) -> None:
    ids, floats = torch.ones(3, 4, dtype=torch.uint8), torch.full((3, 4), 1.5, dtype=dtype)
    more = [torch.ones(3, 4)] if isinstance(state, Calibration) else []
    with pytest.raises(ValueError, match=f"labels are {dtype}: pass class ids as integers"):
        state.update(floats, ids, *more)
    with pytest.raises(ValueError, match=f"predictions are {dtype}: pass class ids as integers"):
        state.update(ids, floats, *more)
    assert not state.counts.any()


def confident(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Labels, predictions and confidence that grows with being right but is too high."""
    labels, predictions = pair(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    predictions = predictions.where(torch.rand(labels.shape, generator=generator) < 0.5, labels.where(labels < K, 0))
    confidence = 0.5 + 0.5 * torch.rand(labels.shape, generator=generator)
    return labels, predictions, confidence.where(labels == predictions, 0.9 * confidence)


def calibrated(labels: Tensor, predictions: Tensor, confidence: Tensor, num_bins: int = 15) -> Calibration:
    calibration = Calibration(num_bins)
    calibration.update(labels, predictions, confidence)
    return calibration


@pytest.mark.parametrize("num_bins", [1, 4, 15])
def test_ece_and_the_curve_equal_those_of_lists_per_bin(num_bins: int) -> None:
    bins: list[list[tuple[float, bool]]] = [[] for _ in range(num_bins)]
    for label, prediction, p in zip(*(t.flatten().tolist() for t in confident()), strict=True):
        if label != IGNORE_INDEX:
            at = next(m for m in range(num_bins) if p <= (m + 1) / num_bins)
            bins[at].append((p, label == prediction))
    counted = sum(len(b) for b in bins)
    gaps = [abs(sum(p for p, _ in b) / len(b) - sum(right for _, right in b) / len(b)) * len(b) for b in bins if b]
    calibration = calibrated(*confident(), num_bins=num_bins)
    curve = calibration.reliability()
    assert calibration.ece() == pytest.approx(sum(gaps) / counted)
    assert calibration.ece() > 0.05
    assert curve.pixels.tolist() == [len(b) for b in bins]
    assert curve.edges.tolist() == pytest.approx([m / num_bins for m in range(num_bins + 1)])
    for b, confidence, accuracy in zip(bins, curve.confidence, curve.accuracy, strict=True):
        if b:
            assert confidence == pytest.approx(sum(p for p, _ in b) / len(b))
            assert accuracy == pytest.approx(sum(right for _, right in b) / len(b))
        else:
            assert np.isnan([confidence, accuracy]).all()


def test_the_reliability_curve_equals_that_of_scikit_learn() -> None:
    labels, predictions, confidence = confident()
    valid = labels != IGNORE_INDEX
    right = (labels == predictions)[valid].numpy()
    accuracy, mean = calibration_curve(right, confidence[valid].double().numpy(), n_bins=15)  # full bins only
    curve = calibrated(labels, predictions, confidence).reliability()
    assert curve.accuracy[curve.pixels > 0] == pytest.approx(accuracy)
    assert curve.confidence[curve.pixels > 0] == pytest.approx(mean)


def test_ece_of_an_overconfident_model_is_its_excess() -> None:
    labels = torch.tensor([0, 0, 1, 1, 1, 0, 0, 0, 0, IGNORE_INDEX])
    predictions = torch.zeros(10, dtype=torch.int64)
    confidence = torch.tensor([0.9] * 4 + [0.5] * 5 + [0.1])
    # 2 of 4 right at 0.9, 4 of 5 right at 0.5
    assert calibrated(labels, predictions, confidence).ece() == pytest.approx((4 * 0.4 + 5 * 0.3) / 9)


def test_a_model_that_is_as_often_right_as_it_says_has_no_calibration_error() -> None:
    labels = torch.tensor([0, 0, 0, 1])
    assert calibrated(labels, torch.zeros_like(labels), torch.full((4,), 0.75)).ece() == 0.0


def test_a_bin_holds_its_upper_edge_and_the_first_holds_zero() -> None:
    confidence = torch.tensor([0.0, 0.25, 0.2500001, 0.5, 0.75, 1.0, 1.0 + 1e-7], dtype=torch.float64)
    labels = torch.zeros(7, dtype=torch.int64)
    assert calibrated(labels, labels, confidence, num_bins=4).counts[0].tolist() == [2, 2, 1, 2]


def test_confidence_on_ignored_pixels_may_be_anything() -> None:
    labels = torch.tensor([0, IGNORE_INDEX, IGNORE_INDEX])
    calibration = calibrated(labels, torch.tensor([0, IGNORE_INDEX, 1]), torch.tensor([0.5, 7.0, math.nan]))
    assert int(calibration.counts[0].sum()) == 1
    assert calibration.ece() == 0.5


@pytest.mark.parametrize("wrong", [-0.1, 1.1, 255.0, math.nan])
def test_confidence_that_is_no_probability_is_refused_and_nothing_is_counted(wrong: float) -> None:
    calibration = Calibration()
    with pytest.raises(ValueError, match=r"confidence must be in 0\.\.1"):
        calibration.update(torch.tensor([0, 1]), torch.tensor([0, 1]), torch.tensor([0.5, wrong]))
    assert not calibration.counts.any()


def test_calibration_refuses_shapes_that_differ() -> None:
    message = r"labels \(2,\), predictions \(2,\) and confidence \(1,\) differ in shape"
    with pytest.raises(ValueError, match=message):
        Calibration().update(torch.zeros(2), torch.zeros(2), torch.zeros(1))


def test_calibration_of_updates_and_ranks_adds_up() -> None:
    labels, predictions, confidence = confident()
    whole, updated = calibrated(labels, predictions, confidence), Calibration()
    ranks = [calibrated(labels[b], predictions[b], confidence[b]) for b in range(2)]
    for b in range(2):
        updated.update(labels[b], predictions[b], confidence[b])
    summed = Calibration()
    summed.counts, summed.confidence = ranks[0].counts + ranks[1].counts, ranks[0].confidence + ranks[1].confidence
    for parts in (updated, summed):
        assert torch.equal(parts.counts, whole.counts)
        assert parts.confidence.tolist() == pytest.approx(whole.confidence.tolist(), rel=1e-12)
        assert parts.ece() == pytest.approx(whole.ece(), rel=1e-12)


def test_one_more_confidence_counts_past_two_to_the_24() -> None:
    calibration = Calibration(1)
    calibration.counts[:], calibration.confidence[:] = 2**24, 2**24
    calibration.update(torch.tensor([1]), torch.tensor([0]), torch.tensor([1.0]))
    assert calibration.counts.tolist() == [[2**24 + 1], [2**24]]
    assert calibration.confidence.tolist() == [2**24 + 1]


def test_a_curve_does_not_change_with_later_updates() -> None:
    calibration = calibrated(*confident())
    curve = calibration.reliability()
    before = curve.pixels.tolist()
    calibration.update(*confident(seed=5))
    assert curve.pixels.tolist() == before


def test_an_image_that_is_all_ignored_counts_nothing_anywhere_without_a_warning() -> None:
    labels, predictions = torch.full((40, 50), IGNORE_INDEX), torch.ones(40, 50, dtype=torch.int64)
    confusion, edges = matrix(labels, predictions), boundary(labels, predictions)
    calibration = calibrated(labels, predictions, torch.ones(40, 50))
    assert not any(counts.any() for counts in (confusion.counts, edges.counts, calibration.counts))
    assert math.isnan(confusion.scores().miou)
    assert math.isnan(edges.scores().miou)
    assert edges.scores().classes_scored == 0
    assert math.isnan(calibration.ece())
    assert np.isnan(calibration.reliability().accuracy).all()
