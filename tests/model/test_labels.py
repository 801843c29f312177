"""Label conventions against brute force.

Shapes: B batch, K classes, H x W pixels, h x w grid at stride s.
"""

from collections import Counter

import pytest
import torch
from torch import Tensor

from repsep_model.labels import IGNORE_INDEX, class_counts, majority_reduce


def noise(batch: int, height: int, width: int, num_classes: int, ignored: float, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, num_classes, (batch, height, width), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = IGNORE_INDEX
    return labels


def brute_majority(labels_BHW: Tensor, stride: int) -> Tensor:
    B, H, W = labels_BHW.shape
    out = torch.full((B, -(-H // stride), -(-W // stride)), IGNORE_INDEX)
    for b in range(B):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                block = labels_BHW[b, i * stride : (i + 1) * stride, j * stride : (j + 1) * stride]
                votes = Counter(block.flatten().tolist())
                votes.pop(IGNORE_INDEX, None)
                ranked = votes.most_common(2)
                if ranked and (len(ranked) == 1 or ranked[0][1] > ranked[1][1]):
                    out[b, i, j] = ranked[0][0]
    return out


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_class_counts_equal_a_count_by_hand_and_leave_ignored_pixels_out(dtype: torch.dtype) -> None:
    labels = noise(3, 9, 7, 6, ignored=0.3).to(dtype)
    expected = [[int((image == k).sum()) for k in range(6)] for image in labels]
    counts = class_counts(labels, 6)
    assert counts.dtype == torch.int64
    assert counts.tolist() == expected


@pytest.mark.parametrize("ignored", [0.0, 0.5, 0.95])
@pytest.mark.parametrize("num_classes", [1, 2, 5])
@pytest.mark.parametrize(("stride", "height", "width"), [(2, 6, 8), (3, 10, 7), (8, 17, 31), (4, 3, 2)])
def test_majority_reduce_equals_brute_force(
    stride: int, height: int, width: int, num_classes: int, ignored: float
) -> None:
    labels = noise(2, height, width, num_classes, ignored)
    reduced = majority_reduce(labels.to(torch.uint8), stride, num_classes)
    torch.testing.assert_close(reduced, brute_majority(labels, stride), rtol=0, atol=0)


def test_brute_force_cases_hold_ties_and_winners() -> None:
    reduced = brute_majority(noise(2, 10, 7, 2, ignored=0.0), 2)
    assert set(reduced.unique().tolist()) == {0, 1, IGNORE_INDEX}


def test_block_whose_two_commonest_classes_tie_is_ignored() -> None:
    labels = torch.tensor([[[0, 0, 3, 3], [1, 1, 3, 2]]])
    assert majority_reduce(labels, 2, 4).tolist() == [[[IGNORE_INDEX, 3]]]


def test_one_labelled_pixel_wins_over_ignored_ones() -> None:
    labels = torch.tensor([[[IGNORE_INDEX, IGNORE_INDEX], [IGNORE_INDEX, 2]]])
    assert majority_reduce(labels, 2, 4).tolist() == [[[2]]]


def test_all_ignored_labels_stay_ignored() -> None:
    labels = torch.full((1, 5, 5), IGNORE_INDEX)
    assert majority_reduce(labels, 4, 3).unique().tolist() == [IGNORE_INDEX]


def test_blocks_that_stick_out_are_judged_by_the_pixels_inside() -> None:
    labels = torch.tensor([[[0, 0, 1]]])
    assert majority_reduce(labels, 2, 2).tolist() == [[[0, 1]]]
