"""Every loss term against torch's own function or plain loops, and the arithmetic that lets terms be split and added.

The references below are in double precision, a location and a class at a time, and share no code with the losses.
Shapes: B batch, K classes, D width, E embedding, H x W pixels, h x w grid, N locations of one image.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from repsep_model import LossWeights, SegmentorOutput, segmentation_loss
from repsep_model.labels import IGNORE_INDEX
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


def converted(found: SegmentorOutput, to: Callable[[Tensor], Tensor]) -> SegmentorOutput:
    """The output with every tensor of it converted."""
    assert found.aux is not None
    tensors: dict[str, Any] = {n: to(v) for n, v in vars(found.aux).items() if isinstance(v, Tensor)}
    return SegmentorOutput(to(found.logits), replace(found.aux, **tensors))


def tensors_of(found: SegmentorOutput) -> dict[str, Tensor]:
    assert found.aux is not None
    return {"logits": found.logits} | {n: v for n, v in vars(found.aux).items() if isinstance(v, Tensor)}


def present_classes(labels_HW: Tensor) -> list[int]:
    return [k for k in range(K) if (labels_HW == k).any()]


def mixed_labels() -> Tensor:
    """Three images: ordinary, of one class, and with nothing labelled."""
    labels = random_labels(3, H, W)
    labels[1][labels[1] != IGNORE_INDEX] = 2
    labels[2] = IGNORE_INDEX
    return labels


def one_class() -> Tensor:
    return torch.full((3, H, W), 3)


def all_ignored() -> Tensor:
    return torch.full((3, H, W), IGNORE_INDEX)


# ---------------------------------------------------------------- plain references: (sum, weight)

Reference = Callable[[SegmentorOutput, Tensor], tuple[Tensor, float]]


def grid_labels(labels: Tensor) -> Tensor:
    """The commonest label of each block on the padded grid; ignored where two tie or nothing is labelled."""
    out = torch.full((labels.shape[0], *GRID), IGNORE_INDEX)
    for b, y, x in itertools.product(range(labels.shape[0]), *map(range, GRID)):
        block = labels[b, STRIDE * y : STRIDE * (y + 1), STRIDE * x : STRIDE * (x + 1)].flatten().tolist()
        counts = Counter(label for label in block if label != IGNORE_INDEX).most_common(2)
        if len(counts) == 1 or (len(counts) == 2 and counts[0][1] > counts[1][1]):
            out[b, y, x] = counts[0][0]
    return out


def labelled(maps_BCHW: Tensor, labels: Tensor) -> list[list[tuple[Tensor, int]]]:
    """For each image, the vector and the label of each labelled location."""
    return [
        [(v, k) for v, k in zip(m.flatten(1).unbind(1), image.flatten().tolist(), strict=True) if k != IGNORE_INDEX]
        for m, image in zip(maps_BCHW, labels, strict=True)
    ]


def softmax(logits_K: Tensor) -> Tensor:
    return logits_K.exp() / logits_K.exp().sum()


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def added(values: list[Tensor]) -> Tensor:
    return torch.stack(values).sum() if values else torch.zeros((), dtype=torch.float64)


def plain_ce(logits: Tensor, labels: Tensor, weights: tuple[float, ...] = (1.0,) * K) -> tuple[Tensor, float]:
    found = [(weights[k], softmax(v)[k]) for image in labelled(logits, labels) for v, k in image]
    return added([-w * p.log() for w, p in found]), sum(w for w, _ in found)


def plain_ohem(found: SegmentorOutput, labels: Tensor) -> tuple[Tensor, float]:
    true = [softmax(v)[k] for image in labelled(found.logits, labels) for v, k in image]
    return added([-p.log() for p in true if p < 0.7]), len(true)


def over_present_classes(
    found: SegmentorOutput, labels: Tensor, loss: Callable[[list[Tensor], set[int]], Tensor]
) -> tuple[Tensor, float]:
    """Sum over images of the mean of `loss(probabilities, members)` over their classes; weight 1 for each image."""
    losses = []
    for image in labelled(found.logits, labels):
        p = [softmax(v) for v, _ in image]
        members = {k: {i for i, (_, label) in enumerate(image) if label == k} for _, k in image}
        if members:
            losses.append(mean([loss([p_K[k] for p_K in p], inside) for k, inside in members.items()]))
    return added(losses), len(losses)


def dice_of_class(p: list[Tensor], inside: set[int]) -> Tensor:
    return 1 - (2 * added([p[i] for i in inside]) + 1) / (added(p) + len(inside) + 1)


def lovasz_of_class(p: list[Tensor], inside: set[int]) -> Tensor:
    """By its definition: errors in falling order times the growth of the Jaccard loss of the set of wrong pixels."""
    errors = [1 - p_i if i in inside else p_i for i, p_i in enumerate(p)]
    parts, wrong, before = [], set[int](), 0.0
    for i in torch.stack(errors).argsort(descending=True).tolist():
        wrong.add(i)
        after = 1 - len(inside - wrong) / len(inside | wrong)
        parts.append(errors[i] * (after - before))
        before = after
    return added(parts)


def plain_identity(found: SegmentorOutput, labels: Tensor) -> tuple[Tensor, float]:
    assert found.aux is not None
    assert found.aux.identity_BK is not None
    losses = []
    for identity_K, image in zip(found.aux.identity_BK, labels, strict=True):
        if present := present_classes(image):
            p = 1 / (1 + (-identity_K).exp())
            losses += [-(p[k] if k in present else 1 - p[k]).log() for k in range(K)]
    return added(losses), len(losses)


def cosine(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum() / ((a * a).sum() * (b * b).sum()).sqrt()


def plain_region(found: SegmentorOutput, labels: Tensor) -> tuple[Tensor, float]:
    assert found.aux is not None
    assert found.aux.regions_BKD is not None
    pairs = [
        cosine(regions_KD[i], regions_KD[j])
        for regions_KD, image in zip(found.aux.regions_BKD, labels, strict=True)
        for i, j in itertools.combinations(present_classes(image), 2)
    ]
    return added([c for c in pairs if c > 0]), len(pairs)


def plain_patch(found: SegmentorOutput, labels: Tensor) -> tuple[Tensor, float]:
    assert found.aux is not None
    assert found.aux.embedding_BEhw is not None
    losses = []
    for image in labelled(found.aux.embedding_BEhw, grid_labels(labels)):
        units = [(z / (z * z).sum().sqrt(), k) for z, k in image]
        classes = sorted({k for _, k in units})
        centres = {k: torch.stack([z for z, label in units if label == k]).sum(dim=0) for k in classes}
        of_class: dict[int, list[Tensor]] = {k: [] for k in classes}
        for z, k in units:
            alike = {c: (cosine(z, centre) / 0.1).exp() for c, centre in centres.items()}
            of_class[k].append(-(alike[k] / added(list(alike.values()))).log())
        if image:
            losses.append(mean([mean(costs) for costs in of_class.values()]))
    return added(losses), len(losses)


def plain_attention(found: SegmentorOutput, labels: Tensor) -> tuple[Tensor, float]:
    assert found.aux is not None
    assert found.aux.attention_BKhw is not None
    attention, reduced = found.aux.attention_BKhw, grid_labels(labels)
    total, weight = plain_ce(attention, reduced)
    for image in labelled(attention, reduced):
        p = [softmax(v) for v, _ in image]
        members = {k: {i for i, (_, label) in enumerate(image) if label == k} for _, k in image}
        if members:
            total = total + len(image) * mean([dice_of_class([p_K[k] for p_K in p], m) for k, m in members.items()])
    return total, weight


def on_grid(field: str) -> Reference:
    return lambda found, labels: plain_ce(getattr(found.aux, field), grid_labels(labels))


CLASS_WEIGHTS = (0.5, 1.0, 2.0, 0.0, 3.5)
CASES: dict[str, tuple[LossWeights, Reference]] = {
    "ce": (only("ce"), lambda found, labels: plain_ce(found.logits, labels)),
    "ce with class weights": (
        only("ce", classes=CLASS_WEIGHTS),
        lambda found, labels: plain_ce(found.logits, labels, CLASS_WEIGHTS),
    ),
    "ohem": (only("ohem"), plain_ohem),
    "dice": (only("dice"), lambda found, labels: over_present_classes(found, labels, dice_of_class)),
    "lovasz": (only("lovasz"), lambda found, labels: over_present_classes(found, labels, lovasz_of_class)),
    "local": (only("local"), on_grid("local_BKhw")),
    "coarse": (only("coarse"), on_grid("coarse_BKhw")),
    "attention": (only("attention"), plain_attention),
    "identity": (only("identity"), plain_identity),
    "region": (only("region"), plain_region),
    "patch": (only("patch"), plain_patch),
}


def test_every_term_has_a_reference() -> None:
    assert [name for name in CASES if " " not in name] == term_names()


@pytest.mark.parametrize("labels", [mixed_labels(), one_class(), all_ignored()], ids=["mixed", "one class", "ignored"])
@pytest.mark.parametrize("case", CASES)
def test_sum_weight_and_gradient_are_those_of_the_plain_reference(case: str, labels: Tensor) -> None:
    weights, reference = CASES[case]
    ours = converted(output(confident=2.0), lambda t: t.requires_grad_())
    plain = converted(output(confident=2.0), lambda t: t.double().requires_grad_())
    terms = segmentation_loss(ours, labels, weights)
    ((value, weight),) = terms.values()
    expected, expected_weight = reference(plain, labels)
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
    assert float(weight) == pytest.approx(expected_weight)
    total_loss(terms, weights).backward()
    if expected.requires_grad:
        (expected / max(expected_weight, 1e-6)).backward()
    for name, leaf in tensors_of(plain).items():
        gradient = tensors_of(ours)[name].grad
        gradient = torch.zeros_like(leaf) if gradient is None else gradient.double()
        torch.testing.assert_close(
            gradient, torch.zeros_like(leaf) if leaf.grad is None else leaf.grad, rtol=1e-3, atol=1e-7
        )


# ---------------------------------------------------------------- the same by torch, and by what they stand for


def test_ce_equals_torch_cross_entropy() -> None:
    found, labels = output(), random_labels(3, H, W)
    terms = segmentation_loss(found, labels, only("ce"))
    expected = F.cross_entropy(found.logits, labels.long(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(total_loss(terms, only("ce")), expected)
    assert float(terms["ce"][1]) == int((labels != IGNORE_INDEX).sum())


@pytest.mark.parametrize("classes", [CLASS_WEIGHTS, (1, 2, 3, 4, 5)], ids=["floats", "whole numbers"])
def test_ce_with_class_weights_equals_torch_cross_entropy(classes: tuple[float, ...]) -> None:
    found, labels, weights = output(), random_labels(3, H, W), only("ce", classes=classes)
    expected = F.cross_entropy(
        found.logits, labels.long(), weight=torch.tensor(classes).float(), ignore_index=IGNORE_INDEX
    )
    torch.testing.assert_close(total_loss(segmentation_loss(found, labels, weights), weights), expected)


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


@pytest.mark.parametrize("classes", [None, CLASS_WEIGHTS])
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
    whole = segmentation_loss(found, labels, ALL)
    parts: list[Terms] = []
    for one in (slice(0, 1), slice(1, 2), slice(2, 3)):
        parts.append(segmentation_loss(converted(found, lambda t, one=one: t[one]), labels[one], ALL))
    for name, (total, weight) in whole.items():
        torch.testing.assert_close(sum(part[name][0] for part in parts), total)
        assert sum(float(part[name][1]) for part in parts) == float(weight)


@pytest.mark.parametrize("labels", [one_class(), all_ignored()], ids=["one class", "all ignored"])
def test_degenerate_crops_give_finite_losses_and_gradients(labels: Tensor) -> None:
    found = converted(output(), lambda t: t.requires_grad_())
    loss = total_loss(segmentation_loss(found, labels, ALL), ALL)
    loss.backward()
    assert loss.isfinite()
    for leaf in tensors_of(found).values():
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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("term", term_names())
def test_half_precision_outputs_cost_what_their_values_cost_in_fp32(term: str, dtype: torch.dtype) -> None:
    labels = random_labels(1, 250, 380)  # more pixels than half precision can count
    aux = output(1).aux
    assert aux is not None
    large = SegmentorOutput(torch.randn(1, K, 250, 380), replace(aux, stride=64))
    half = converted(large, lambda t: t.to(dtype))
    found = segmentation_loss(half, labels, only(term))[term][0]
    expected = segmentation_loss(converted(half, Tensor.float), labels, only(term))[term][0]
    assert found.isfinite()
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_autocast_around_the_loss_changes_no_bit() -> None:
    found, labels = output(), mixed_labels()
    expected = segmentation_loss(found, labels, ALL)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = segmentation_loss(found, labels, ALL)
    torch.testing.assert_close(terms, expected, rtol=0, atol=0)


class LargestTensor(TorchDispatchMode):
    """Notes the most bytes of any tensor that an operation gives."""

    bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, Tensor):
                self.bytes = max(self.bytes, tensor.nbytes)
        return result


@pytest.mark.parametrize("term", ["ce", "ohem", "dice", "lovasz"])
def test_no_tensor_of_a_main_term_is_larger_than_the_logits(term: str) -> None:
    logits = torch.randn(2, 60, 32, 32, requires_grad=True)
    labels = random_labels(2, 32, 32)
    with LargestTensor() as largest:
        total_loss(segmentation_loss(SegmentorOutput(logits, None), labels, only(term)), only(term)).backward()
    assert largest.bytes == logits.nbytes


def test_output_without_aux_gives_the_main_terms_only() -> None:
    terms = segmentation_loss(SegmentorOutput(output().logits, None), random_labels(3, H, W), ALL)
    assert list(terms) == ["ce", "ohem", "dice", "lovasz"]


def test_terms_whose_part_is_switched_off_are_left_out() -> None:
    found = output()
    assert found.aux is not None
    lean = SegmentorOutput(found.logits, replace(found.aux, local_BKhw=None, regions_BKD=None, embedding_BEhw=None))
    terms = segmentation_loss(lean, random_labels(3, H, W), LossWeights())
    assert list(terms) == ["ce", "coarse", "attention", "identity"]


@pytest.mark.parametrize("shape", [(3, 1, H, W), (3, W, H), (2, H, W), (H, W)])
def test_labels_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    labels = torch.zeros(shape, dtype=torch.uint8)
    expected = f"labels {shape} do not fit logits {(3, K, H, W)}: pass (B, H, W)"
    with pytest.raises(ValueError, match=re.escape(expected)):
        segmentation_loss(output(), labels, ALL)


@pytest.mark.parametrize("wrong", [K, 254, 256, -1])
def test_id_that_is_no_class_is_refused_by_name_before_and_in_the_loss(wrong: int) -> None:
    labels = random_labels(3, H, W).long()
    labels[1, 2, 3] = wrong
    message = f"labels hold the id {wrong}: class ids must be 0..4, 255 where nothing is labelled"
    with pytest.raises(ValueError, match=re.escape(message)):
        segmentation_loss(output(), labels, only("ce"))
    with pytest.raises(ValueError, match=re.escape(message)):
        term_weights(labels, num_classes=K, stride=STRIDE, weights=ALL)


def test_loss_without_a_single_term_is_refused() -> None:
    weights = LossWeights(ce=0.0)
    terms = segmentation_loss(SegmentorOutput(output().logits, None), random_labels(3, H, W), weights)
    with pytest.raises(ValueError, match=r"no active term can be computed from this output \(aux is None in eval mode"):
        total_loss(terms, weights)


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


@pytest.mark.parametrize("value", [-0.1, float("inf"), float("nan")])
def test_impossible_class_weight_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="loss weight classes must be 0 or more and finite"):
        LossWeights(classes=(1.0, value, 1.0))


def test_class_weights_of_another_length_are_refused() -> None:
    with pytest.raises(ValueError, match="loss weight classes has 2 values for 5 classes"):
        segmentation_loss(output(), random_labels(3, H, W), LossWeights(classes=(1.0, 2.0)))


def test_default_weights_are_those_of_the_method() -> None:
    separation = ["local", "coarse", "attention", "identity", "region", "patch"]
    assert LossWeights().active() == {"ce": 1.0} | dict(zip(separation, [0.4, 0.4, 0.4, 0.1, 0.1, 0.1], strict=True))
    values: dict[str, Any] = LossWeights(dice=0.3).to_dict()
    assert LossWeights(**values) == LossWeights(dice=0.3)
