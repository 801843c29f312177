"""The confusion matrix and its scores against sets and loops.

Shapes: B batch, K classes, H x W pixels.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from repsep_model import ConfusionMatrix
from repsep_model.labels import IGNORE_INDEX
from repsep_model.metrics import Scores, scores_from_counts

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
