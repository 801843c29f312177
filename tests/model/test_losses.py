"""Every loss term against torch's own function or loops, and the arithmetic that lets terms be split and added.

Shapes: B batch, K classes, D width, E embedding, H x W pixels, h x w grid, N = h * w.
"""

import itertools
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from repsep_model import LossWeights, SegmentorOutput, segmentation_loss
from repsep_model.labels import IGNORE_INDEX, majority_reduce
from repsep_model.losses import Terms, term_names, term_weights, total_loss
from repsep_model.segmentor import SegmentorAux
from tests.model.tiny import K, random_labels

H, W, STRIDE = 20, 36, 8
GRID = (4, 6)  # of the padded image: one row and one column more than the image's own blocks
ALL = LossWeights(ohem=1.0, dice=1.0, lovasz=1.0)


def output(batch: int = 3, *, seed: int = 0, confident: float = 1.0) -> SegmentorOutput:
    torch.manual_seed(seed)
    aux = SegmentorAux(
        stride=STRIDE,
        grid=GRID,
        local_BKhw=torch.randn(batch, K, *GRID),
        coarse_BKhw=torch.randn(batch, K, *GRID),
        attention_BKhw=torch.randn(batch, K, *GRID),
        identity_BK=torch.randn(batch, K),
        regions_BKD=torch.randn(batch, K, 6),
        embedding_BEhw=torch.randn(batch, 7, *GRID),
    )
    return SegmentorOutput(confident * torch.randn(batch, K, H, W), aux)


def only(term: str, **changes: Any) -> LossWeights:
    return LossWeights(**(dict.fromkeys(term_names(), 0.0) | {term: 1.0} | changes))


def grid_labels(labels: Tensor) -> Tensor:
    """Majority labels on the padded grid: what was padded is ignored."""
    out = torch.full((labels.shape[0], *GRID), IGNORE_INDEX)
    reduced = majority_reduce(labels, STRIDE, K)
    out[:, : reduced.shape[1], : reduced.shape[2]] = reduced
    return out


def present_classes(labels_HW: Tensor) -> list[int]:
    return [k for k in range(K) if (labels_HW == k).any()]


def mixed_labels() -> Tensor:
    """Three images: ordinary, of one class, and with nothing labelled."""
    labels = random_labels(3, H, W)
    labels[1][labels[1] != IGNORE_INDEX] = 2
    labels[2] = IGNORE_INDEX
    return labels


def brute_ohem(logits: Tensor, labels: Tensor) -> float:
    total = 0.0
    for b, y, x in itertools.product(*map(range, labels.shape)):
        if (k := int(labels[b, y, x])) != IGNORE_INDEX:
            p = float(logits[b, :, y, x].softmax(dim=0)[k])
            total += -math.log(p) if p < 0.7 else 0.0
    return total


def brute_dice(logits: Tensor, labels: Tensor) -> float:
    total = 0.0
    for logits_KHW, labels_HW in zip(logits, labels, strict=True):
        p, valid = logits_KHW.softmax(dim=0), labels_HW != IGNORE_INDEX
        losses = []
        for k in present_classes(labels_HW):
            soft, hard = p[k][valid], (labels_HW[valid] == k).float()
            losses.append(float(1 - (2 * (soft * hard).sum() + 1) / (soft.sum() + hard.sum() + 1)))
        total += sum(losses) / max(1, len(losses))
    return total


def brute_lovasz(logits: Tensor, labels: Tensor) -> float:
    """The Lovasz extension by its definition: errors in falling order times the growth of the Jaccard loss of sets."""
    total = 0.0
    for logits_KHW, labels_HW in zip(logits, labels, strict=True):
        valid = labels_HW != IGNORE_INDEX
        losses = []
        for k in present_classes(labels_HW):
            truth = labels_HW[valid] == k
            errors = (truth.float() - logits_KHW.softmax(dim=0)[k][valid]).abs()
            members = {i for i in range(len(truth)) if truth[i]}
            wrong: set[int] = set()
            loss, before = 0.0, 0.0
            for i in errors.argsort(descending=True, stable=True).tolist():
                wrong.add(i)
                after = 1 - len(members - wrong) / len(members | wrong)
                loss += float(errors[i]) * (after - before)
                before = after
            losses.append(loss)
        total += sum(losses) / max(1, len(losses))
    return total


def brute_patch(embedding_BEhw: Tensor, labels_Bhw: Tensor) -> float:
    total = 0.0
    for z_Ehw, labels_hw in zip(embedding_BEhw, labels_Bhw, strict=True):
        by_class = {k: [F.normalize(z, dim=0) for z in z_Ehw[:, labels_hw == k].T] for k in present_classes(labels_hw)}
        centres = {k: F.normalize(torch.stack(zs).sum(dim=0), dim=0) for k, zs in by_class.items()}
        pulls = [1 - float(z @ centres[k]) for k, zs in by_class.items() for z in zs]
        pushes = [max(0.0, float(centres[i] @ centres[j])) for i, j in itertools.combinations(centres, 2)]
        total += sum(pulls) / max(1, len(pulls)) + sum(pushes) / max(1, len(pushes))
    return total


def brute_region(regions_BKD: Tensor, labels: Tensor) -> tuple[float, int]:
    total, pairs = 0.0, 0
    for regions_KD, labels_HW in zip(regions_BKD, labels, strict=True):
        for i, j in itertools.combinations(present_classes(labels_HW), 2):
            total += max(0.0, float(F.cosine_similarity(regions_KD[i], regions_KD[j], dim=0)))
            pairs += 1
    return total, pairs


def test_ce_equals_torch_cross_entropy() -> None:
    found, labels = output(), random_labels(3, H, W)
    terms = segmentation_loss(found, labels, only("ce"))
    expected = F.cross_entropy(found.logits, labels.long(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(total_loss(terms, only("ce")), expected)
    assert float(terms["ce"][1]) == int((labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("classes", [(0.5, 1.0, 2.0, 0.0, 3.5), (1, 2, 3, 4, 5)], ids=["floats", "whole numbers"])
def test_ce_with_class_weights_equals_torch_cross_entropy(classes: tuple[float, ...]) -> None:
    found, labels, weights = output(), random_labels(3, H, W), only("ce", classes=classes)
    expected = F.cross_entropy(
        found.logits, labels.long(), weight=torch.tensor(classes).float(), ignore_index=IGNORE_INDEX
    )
    torch.testing.assert_close(total_loss(segmentation_loss(found, labels, weights), weights), expected)


def test_ohem_equals_brute_force_and_counts_all_labelled_pixels() -> None:
    found, labels = output(confident=2.0), mixed_labels()
    total, weight = segmentation_loss(found, labels, only("ohem"))["ohem"]
    assert float(total) == pytest.approx(brute_ohem(found.logits, labels), rel=1e-5)
    assert float(weight) == int((labels != IGNORE_INDEX).sum())
    everything = F.cross_entropy(found.logits, labels.long(), ignore_index=IGNORE_INDEX, reduction="sum")
    assert total < everything


def test_dice_equals_brute_force_and_counts_labelled_images() -> None:
    found, labels = output(), mixed_labels()
    total, weight = segmentation_loss(found, labels, only("dice"))["dice"]
    assert float(total) == pytest.approx(brute_dice(found.logits, labels), rel=1e-5)
    assert float(weight) == 2


def test_lovasz_equals_brute_force_and_counts_labelled_images() -> None:
    found, labels = output(), mixed_labels()
    total, weight = segmentation_loss(found, labels, only("lovasz"))["lovasz"]
    assert float(total) == pytest.approx(brute_lovasz(found.logits, labels), rel=1e-4)
    assert float(weight) == 2


def test_lovasz_of_hard_predictions_is_one_minus_mean_iou() -> None:
    labels = random_labels(1, H, W)
    predictions = random_labels(1, H, W, ignored=0.0, seed=1).long()
    logits = 100 * F.one_hot(predictions, K).permute(0, 3, 1, 2).float()
    ious = []
    for k in present_classes(labels[0]):
        truth, guess = labels == k, (predictions == k) & (labels != IGNORE_INDEX)
        ious.append(int((truth & guess).sum()) / int((truth | guess).sum()))
    total, _ = segmentation_loss(SegmentorOutput(logits, None), labels, only("lovasz"))["lovasz"]
    assert float(total) == pytest.approx(1 - sum(ious) / len(ious), rel=1e-5)
    assert 0 < float(total) < 1


@pytest.mark.parametrize("term", ["dice", "lovasz", "ohem", "ce"])
def test_right_and_certain_predictions_cost_nothing(term: str) -> None:
    labels = random_labels(2, H, W)
    right = labels.long().where(labels != IGNORE_INDEX, 0)
    logits = 100 * F.one_hot(right, K).permute(0, 3, 1, 2).float()
    total, _ = segmentation_loss(SegmentorOutput(logits, None), labels, only(term))[term]
    assert float(total) == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("term", "field"), [("local", "local_BKhw"), ("coarse", "coarse_BKhw"), ("attention", "attention_BKhw")]
)
def test_grid_terms_are_cross_entropy_against_majority_labels(term: str, field: str) -> None:
    found, labels = output(), mixed_labels()
    reduced = grid_labels(labels)
    terms = segmentation_loss(found, labels, only(term))
    expected = F.cross_entropy(getattr(found.aux, field), reduced, ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(total_loss(terms, only(term)), expected)
    assert float(terms[term][1]) == int((reduced != IGNORE_INDEX).sum())


def test_identity_is_binary_cross_entropy_over_labelled_images() -> None:
    found, labels = output(), mixed_labels()
    assert found.aux is not None
    assert found.aux.identity_BK is not None
    truth = torch.tensor([[float(k in present_classes(image)) for k in range(K)] for image in labels])
    expected = F.binary_cross_entropy_with_logits(found.aux.identity_BK[:2], truth[:2])
    terms = segmentation_loss(found, labels, only("identity"))
    torch.testing.assert_close(total_loss(terms, only("identity")), expected)
    assert float(terms["identity"][1]) == 2 * K


def test_region_separation_equals_brute_force_over_pairs_of_present_classes() -> None:
    found, labels = output(), mixed_labels()
    assert found.aux is not None
    assert found.aux.regions_BKD is not None
    total, weight = segmentation_loss(found, labels, only("region"))["region"]
    expected, pairs = brute_region(found.aux.regions_BKD, labels)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert float(weight) == pairs > 1


def test_patch_separation_equals_brute_force() -> None:
    found, labels = output(), mixed_labels()
    assert found.aux is not None
    assert found.aux.embedding_BEhw is not None
    total, weight = segmentation_loss(found, labels, only("patch"))["patch"]
    assert float(total) == pytest.approx(brute_patch(found.aux.embedding_BEhw, grid_labels(labels)), rel=1e-5)
    assert float(weight) == 2


@pytest.mark.parametrize("classes", [None, (0.5, 1.0, 2.0, 0.0, 3.5)])
@pytest.mark.parametrize(
    "labels", [random_labels(3, H, W), mixed_labels(), mixed_labels()[2:]], ids=["all", "mixed", "none"]
)
def test_term_weights_equal_the_weights_in_the_loss(labels: Tensor, classes: tuple[float, ...] | None) -> None:
    weights = replace(ALL, classes=classes)
    before = term_weights(labels, num_classes=K, stride=STRIDE, weights=weights)
    terms = segmentation_loss(output(len(labels)), labels, weights)
    assert list(before) == list(terms) == term_names()
    assert {name: float(w) for name, w in before.items()} == {name: float(w) for name, (_, w) in terms.items()}


def test_sums_and_weights_of_a_batch_are_those_of_its_images_added() -> None:
    found, labels = output(), mixed_labels()
    assert found.aux is not None
    whole = segmentation_loss(found, labels, ALL)
    parts: list[Terms] = []
    for b in range(3):
        tensors: dict[str, Any] = {n: v[b : b + 1] for n, v in vars(found.aux).items() if isinstance(v, Tensor)}
        one = SegmentorOutput(found.logits[b : b + 1], replace(found.aux, **tensors))
        parts.append(segmentation_loss(one, labels[b : b + 1], ALL))
    for name, (total, weight) in whole.items():
        torch.testing.assert_close(sum(part[name][0] for part in parts), total)
        assert sum(float(part[name][1]) for part in parts) == float(weight)


def one_class() -> Tensor:
    return torch.full((3, H, W), 3)


def all_ignored() -> Tensor:
    return torch.full((3, H, W), IGNORE_INDEX)


@pytest.mark.parametrize("labels", [one_class(), all_ignored()], ids=["one class", "all ignored"])
def test_degenerate_crops_give_finite_losses_and_gradients(labels: Tensor) -> None:
    found = output()
    assert found.aux is not None
    leaves = [found.logits, *(v for v in vars(found.aux).values() if isinstance(v, Tensor))]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = total_loss(segmentation_loss(found, labels, ALL), ALL)
    loss.backward()
    assert loss.isfinite()
    for leaf in leaves:
        assert leaf.grad is not None, "the graph is lost"
        assert leaf.grad.isfinite().all()


def test_all_ignored_crop_costs_nothing_and_teaches_nothing() -> None:
    found = output()
    found.logits.requires_grad_()
    loss = total_loss(segmentation_loss(found, all_ignored(), ALL), ALL)
    loss.backward()
    assert float(loss.detach()) == 0
    assert found.logits.grad is not None
    assert not found.logits.grad.any()


@pytest.mark.parametrize("term", ["ce", "ohem", "dice", "lovasz"])
def test_logits_of_ignored_pixels_never_change_a_main_term(term: str) -> None:
    found, labels = output(), random_labels(3, H, W, ignored=0.4)
    ignored = (labels == IGNORE_INDEX)[:, None]
    changed = SegmentorOutput(torch.where(ignored, 50 * torch.randn_like(found.logits), found.logits), None)
    before = segmentation_loss(SegmentorOutput(found.logits, None), labels, only(term))[term]
    after = segmentation_loss(changed, labels, only(term))[term]
    torch.testing.assert_close(after, before)


def test_output_without_aux_gives_the_main_terms_only() -> None:
    terms = segmentation_loss(SegmentorOutput(output().logits, None), random_labels(3, H, W), ALL)
    assert list(terms) == ["ce", "ohem", "dice", "lovasz"]


def test_terms_whose_part_is_switched_off_are_left_out() -> None:
    found = output()
    assert found.aux is not None
    lean = SegmentorOutput(found.logits, replace(found.aux, local_BKhw=None, regions_BKD=None, embedding_BEhw=None))
    terms = segmentation_loss(lean, random_labels(3, H, W), LossWeights())
    assert list(terms) == ["ce", "coarse", "attention", "identity"]


def test_term_of_weight_zero_is_left_out() -> None:
    weights = LossWeights(local=0.0)
    labels = random_labels(3, H, W)
    assert "local" not in weights.active()
    assert "local" not in segmentation_loss(output(), labels, weights)
    assert "local" not in term_weights(labels, num_classes=K, stride=STRIDE, weights=weights)


def test_total_is_the_weighted_sum_over_given_totals_times_the_world_size() -> None:
    weights = LossWeights(ce=2.0, dice=0.5)
    terms = {"ce": (torch.tensor(30.0), torch.tensor(10.0)), "dice": (torch.tensor(4.0), torch.tensor(2.0))}
    totals = {"ce": torch.tensor(60.0), "dice": torch.tensor(8.0)}
    assert float(total_loss(terms, weights)) == pytest.approx(2 * 3 + 0.5 * 2)
    assert float(total_loss(terms, weights, totals, world_size=3)) == pytest.approx(3 * (2 * 0.5 + 0.5 * 0.5))


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_impossible_loss_weight_is_refused_by_name(value: float) -> None:
    with pytest.raises(ValueError, match="loss weight region must be 0 or more and finite"):
        LossWeights(region=value)


def test_class_weights_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="loss weight classes has 2 values for 5 classes"):
        segmentation_loss(output(), random_labels(3, H, W), LossWeights(classes=(1.0, 2.0)))


def test_default_weights_are_those_of_the_method() -> None:
    separation = ["local", "coarse", "attention", "identity", "region", "patch"]
    assert LossWeights().active() == {"ce": 1.0} | dict(zip(separation, [0.4, 0.4, 0.4, 0.1, 0.1, 0.1], strict=True))
    values: dict[str, Any] = LossWeights(dice=0.3).to_dict()
    assert LossWeights(**values) == LossWeights(dice=0.3)
