"""Main and separation losses, each as (sum, weight), so that any split over ranks and micro-batches adds up exactly.

Every weight follows from the labels alone (`term_weights`): a training loop counts all micro-batches of a step,
all-reduces one vector, and scales each sum by world_size * loss weight / total weight before DDP averages the
gradients.

Main terms are at H x W; auxiliary terms at stride s against majority-reduced labels, ties ignored.
Shapes: B batch, K classes, D width, E embedding, H x W pixels, h x w grid, N = h * w; V labelled pixels of one image.
Credits: OHEM after Shrivastava et al. 2016, Dice after Milletari et al. 2016, Lovasz-softmax after Berman et al. 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from repsep_model.labels import IGNORE_INDEX, check_ids, class_counts, majority_reduce
from repsep_model.segmentor import SegmentorOutput

Terms = dict[str, tuple[Tensor, Tensor]]
MAIN_TERMS = ("ce", "ohem", "dice", "lovasz")
"""The terms of the logits; the others are auxiliary."""
OHEM_THRESHOLD = 0.7
PATCH_TEMPERATURE = 0.1
ABSENT = -1e3
"""In place of a cosine to the centre of a class that is not there."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each term counts; 0 leaves it out."""

    ce: float = 1.0
    """Cross-entropy of the logits."""
    ohem: float = 0.0
    """Cross-entropy of the pixels whose true class has a probability under 0.7 only, over all labelled pixels."""
    dice: float = 0.0
    """Soft Dice over the classes present in an image."""
    lovasz: float = 0.0
    """Lovasz-softmax over the classes present in an image."""
    local: float = 0.4
    """Cross-entropy of the local pathway's head."""
    coarse: float = 0.4
    """Cross-entropy of the coarse logits."""
    attention: float = 0.4
    """Attention as mask: cross-entropy over classes of the attention logits, and Dice of each region."""
    identity: float = 0.1
    """Region identity: is class k in the image."""
    region: float = 0.1
    """Region separation: positive cosine between the regions of two present classes."""
    patch: float = 0.1
    """Patch separation: nearer to the own class's centre in the image than to the others', classes alike."""
    classes: tuple[float, ...] | None = None
    """Weight of each class in `ce`; by default 1."""

    def __post_init__(self) -> None:
        for name in term_names():
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"loss weight {name} must be 0 or more and finite, got {value}")
        if self.classes is not None and not all(0 <= value < float("inf") for value in self.classes):
            raise ValueError(f"loss weight classes must be 0 or more and finite, got {self.classes}")
        if not self.active():
            raise ValueError("every loss weight is 0: there is nothing to train on")

    def active(self) -> dict[str, float]:
        """The terms that count, with their weights."""
        return {name: getattr(self, name) for name in term_names() if getattr(self, name) > 0}

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


_TERMS = tuple(f.name for f in fields(LossWeights) if f.name != "classes")  # once: torch.compile cannot trace fields()


def term_names() -> list[str]:
    """The names of all terms, main ones first."""
    return list(_TERMS)


def term_weights(labels_BHW: Tensor, *, num_classes: int, stride: int, weights: LossWeights) -> dict[str, Tensor]:
    """What each active term's sum is to be divided by, from the labels alone (scalar fp64 tensors).

    Pixel terms count labelled pixels (`ce` by class weight; `ohem` the easy ones too, since which are hard is the
    model's affair), location terms labelled locations at stride s, `dice`, `lovasz` and `patch` images with something
    labelled, `identity` K for each of those, `region` pairs of present classes. Raises ValueError for an id that is no
    class (`check_ids`).
    """
    check_ids(labels_BHW, num_classes)
    counts_BK = class_counts(labels_BHW, num_classes)
    present_B = (counts_BK > 0).sum(dim=1)
    reduced = majority_reduce(labels_BHW, stride, num_classes)
    located = reduced != IGNORE_INDEX
    images = (present_B > 0).sum()
    class_weights = _class_weights(weights, num_classes, labels_BHW.device)
    found = {
        "ce": (counts_BK.double() * class_weights.double()).sum(),
        "ohem": counts_BK.sum(),
        "dice": images,
        "lovasz": images,
        "local": located.sum(),
        "coarse": located.sum(),
        "attention": located.sum(),
        "identity": images * num_classes,
        "region": (present_B * (present_B - 1) // 2).sum(),
        "patch": located.flatten(1).any(dim=1).sum(),
    }
    return {name: found[name].double() for name in weights.active()}


def segmentation_loss(output: SegmentorOutput, labels: Tensor, weights: LossWeights) -> Terms:
    """{term: (sum, weight)} of every active term that this output can give (auxiliary terms need `aux`).

    `labels`: (B, H, W) integers, class ids and IGNORE_INDEX. All-ignored and one-class crops give finite values that
    keep the graph. Raises ValueError for labels of another shape and for an id that is no class (`check_ids`).
    """
    if labels.shape != (output.logits.shape[0], *output.logits.shape[2:]):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(output.logits.shape)}: pass (B, H, W)")
    # Under autocast the products of the separation terms would be taken in half precision, and so would the sums.
    with torch.autocast(output.logits.device.type, enabled=False):
        return _terms(output, labels.long(), weights)


def _terms(output: SegmentorOutput, labels: Tensor, weights: LossWeights) -> Terms:
    logits = output.logits.float()
    num_classes = logits.shape[1]
    aux = output.aux
    stride = aux.stride if aux is not None else 8
    active = weights.active()
    totals = term_weights(labels, num_classes=num_classes, stride=stride, weights=weights)
    sums: dict[str, Tensor] = {}
    if "ce" in active:
        sums["ce"] = _cross_entropy(logits, labels, _class_weights(weights, num_classes, logits.device))
    if "ohem" in active:
        sums["ohem"] = _ohem(logits, labels)
    if "dice" in active or "lovasz" in active:
        images = [_labelled(*image) for image in zip(logits, labels, strict=True)]
        sums |= {name: _mean_over_classes(images, of) for name, of in OVERLAP.items() if name in active}
    if aux is not None:
        reduced = _on_grid(majority_reduce(labels, stride, num_classes), aux.grid)
        present_BK = class_counts(labels, num_classes) > 0
        for name, maps in (("local", aux.local_BKhw), ("coarse", aux.coarse_BKhw), ("attention", aux.attention_BKhw)):
            if name in active and maps is not None:
                sums[name] = _cross_entropy(maps.float(), reduced)
        if "attention" in sums and aux.attention_BKhw is not None:
            sums["attention"] = sums["attention"] + _region_dice(aux.attention_BKhw.float(), reduced)
        if "identity" in active and aux.identity_BK is not None:
            identity_BK = aux.identity_BK.float()
            bce = F.binary_cross_entropy_with_logits(identity_BK, present_BK.to(identity_BK), reduction="none")
            sums["identity"] = (bce * present_BK.any(dim=1, keepdim=True)).sum()
        if "region" in active and aux.regions_BKD is not None:
            sums["region"] = _pair_similarity(aux.regions_BKD.float(), present_BK).sum()
        if "patch" in active and aux.embedding_BEhw is not None:
            sums["patch"] = _patch_separation(aux.embedding_BEhw.float(), reduced, num_classes)
    return {name: (value, totals[name]) for name, value in sums.items()}


def total_loss(
    terms: Terms, weights: LossWeights, totals: Mapping[str, Tensor] | None = None, world_size: int = 1
) -> Tensor:
    """The scalar to run backward on: sum of weight * sum * world_size / total.

    `totals` are the step's total weights over all ranks and micro-batches; by default this batch's own. A total of 0
    (nothing to learn from) gives 0 and keeps the graph. Raises ValueError where there is no term at all.
    """
    if not terms:
        raise ValueError("no active term can be computed from this output (aux is None in eval mode)")
    active = weights.active()
    parts = []
    for name, (value, weight) in terms.items():
        total = weight if totals is None else totals[name]
        parts.append(active[name] * world_size * value / total.to(value).clamp_min(1e-6))
    return torch.stack(parts).sum()


def _cross_entropy(logits: Tensor, labels: Tensor, class_weights: Tensor | None = None) -> Tensor:
    return F.cross_entropy(logits, labels, weight=class_weights, ignore_index=IGNORE_INDEX, reduction="sum")


def _ohem(logits: Tensor, labels: Tensor) -> Tensor:
    loss = F.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="none")
    return (loss * (torch.exp(-loss.detach()) < OHEM_THRESHOLD)).sum()


def _dice(p_V: Tensor, truth_V: Tensor, epsilon: float = 1.0) -> Tensor:
    """1 - soft Dice of one class."""
    overlap = p_V.where(truth_V, 0).sum()
    return 1 - (2 * overlap + epsilon) / (p_V.sum() + truth_V.sum() + epsilon)


def _lovasz(p_V: Tensor, truth_V: Tensor) -> Tensor:
    """Lovasz extension of one class's Jaccard loss: each error times what it adds, in falling order of the errors."""
    error_V = torch.where(truth_V, 1 - p_V, p_V)
    with torch.no_grad():
        order = error_V.argsort(descending=True)
        hit = truth_V[order]
        missed = hit.cumsum(dim=0)
        positives = missed[-1]
        union = positives + torch.arange(1, len(hit) + 1, device=hit.device) - missed
        # The Jaccard loss is 1 - (positives - missed) / union: a miss takes 1 from the intersection, a false alarm
        # adds 1 to the union. Subtracted as fp32, losses so nearly equal would be a thousandth off at 512 x 512.
        added = torch.where(hit, 1 / union, (positives - missed) / (union * (union - 1).clamp_min(1)))
        added_V = torch.empty_like(error_V).scatter_(0, order, added.to(error_V))
    return (error_V * added_V).sum()


OVERLAP = {"dice": _dice, "lovasz": _lovasz}


def _mean_over_classes(images: Sequence[tuple[Tensor, Tensor]], loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over images (p_KV, labels_V) of the mean of `loss` over the classes present in each.

    One class of one image at a time: for two crops of 512 x 512 and 150 classes, one-hot truth alone is 630 MB.
    """
    means = []
    for p_KV, labels_V in images:
        of_class = p_KV.unbind()
        present = labels_V.unique().tolist()  # type: ignore[no-untyped-call]
        losses = [loss(of_class[k], labels_V == k) for k in present]
        means.append(torch.stack(losses).mean() if losses else p_KV.sum())  # a sum of nothing, but in the graph
    return torch.stack(means).sum()


def _labelled(logits_KHW: Tensor, labels_HW: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities (K, V) and labels (V,) of an image's labelled pixels."""
    labels = labels_HW.flatten()
    places = (labels != IGNORE_INDEX).nonzero().squeeze(1)
    return logits_KHW.flatten(1).index_select(1, places).softmax(dim=0), labels[places]


def _pair_similarity(vectors_BKD: Tensor, present_BK: Tensor) -> Tensor:
    """Sum of the positive cosines over the pairs of present classes, for each image (B,)."""
    unit = F.normalize(vectors_BKD, dim=2)
    cosine = (unit @ unit.transpose(1, 2)).clamp_min(0)
    pairs = (present_BK[:, :, None] & present_BK[:, None, :]).triu(diagonal=1)
    return (cosine * pairs).sum(dim=(1, 2))


def _region_dice(attention_BKhw: Tensor, reduced: Tensor) -> Tensor:
    """Sum over images of their labelled locations times the mean of 1 - soft Dice over the classes present."""
    truth_BNK = _one_hot(reduced, attention_BKhw.shape[1])
    located_B = truth_BNK.sum(dim=(1, 2))
    share_BNK = attention_BKhw.softmax(dim=1).flatten(2).transpose(1, 2) * truth_BNK.any(dim=2)[..., None]
    overlap_BK, size_BK = (share_BNK * truth_BNK).sum(dim=1), truth_BNK.sum(dim=1)
    dice_BK = 1 - (2 * overlap_BK + 1) / (share_BNK.sum(dim=1) + size_BK + 1)
    present_BK = size_BK > 0
    return (located_B * (dice_BK * present_BK).sum(dim=1) / present_BK.sum(dim=1).clamp_min(1)).sum()


def _patch_separation(embedding_BEhw: Tensor, reduced: Tensor, num_classes: int) -> Tensor:
    """Sum over images of the cross-entropy of the cosines to the class centres of the image, over PATCH_TEMPERATURE.

    It is a mean over the classes present of the mean over their locations: a pole counts as much as the sky.
    """
    z_BNE = F.normalize(embedding_BEhw.flatten(2).transpose(1, 2), dim=2)
    truth_BNK = _one_hot(reduced, num_classes)
    size_BK = truth_BNK.sum(dim=1)
    centres_BKE = F.normalize(truth_BNK.transpose(1, 2) @ z_BNE, dim=2)
    cosine_BNK = (z_BNE @ centres_BKE.transpose(1, 2)).masked_fill((size_BK == 0)[:, None], ABSENT)
    entropy_BK = -((cosine_BNK / PATCH_TEMPERATURE).log_softmax(dim=2) * truth_BNK).sum(dim=1) / size_BK.clamp_min(1)
    return (entropy_BK.sum(dim=1) / (size_BK > 0).sum(dim=1).clamp_min(1)).sum()


def _one_hot(reduced: Tensor, num_classes: int) -> Tensor:
    """(B, N, K) floats; a location that is not labelled is 0 everywhere."""
    labels = reduced.flatten(1)
    valid = labels != IGNORE_INDEX
    return F.one_hot(labels.where(valid, 0), num_classes).float() * valid[..., None]


def _on_grid(reduced: Tensor, grid: tuple[int, int]) -> Tensor:
    """Labels of the image's blocks on the grid of the padded image: what was padded is ignored."""
    below, right = grid[0] - reduced.shape[1], grid[1] - reduced.shape[2]
    return F.pad(reduced, (0, right, 0, below), value=IGNORE_INDEX)


def _class_weights(weights: LossWeights, num_classes: int, device: torch.device) -> Tensor:
    if weights.classes is None:
        return torch.ones(num_classes, device=device)
    if len(weights.classes) != num_classes:
        raise ValueError(f"loss weight classes has {len(weights.classes)} values for {num_classes} classes")
    return torch.tensor(weights.classes, dtype=torch.float32, device=device)
