"""Main and separation losses, each as (sum, weight), so that any split over ranks and micro-batches adds up exactly.

Every weight follows from the labels alone (`term_weights`): a training loop counts all micro-batches of a step,
all-reduces one vector, and scales each sum by world_size * loss weight / total weight before DDP averages the
gradients.

Main terms are at H x W; auxiliary terms at stride s against majority-reduced labels, ties ignored.
Shapes: B batch, K classes, D width, E embedding, H x W pixels, h x w grid, N = h * w.
Credits: OHEM after Shrivastava et al. 2016, Dice after Milletari et al. 2016, Lovasz-softmax after Berman et al. 2018.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from repsep_model.labels import IGNORE_INDEX, class_counts, majority_reduce
from repsep_model.segmentor import SegmentorOutput

Terms = dict[str, tuple[Tensor, Tensor]]
OHEM_THRESHOLD = 0.7


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """How much each term counts; 0 leaves it out."""

    ce: float = 1.0
    """Cross-entropy of the logits."""
    ohem: float = 0.0
    """Cross-entropy of the pixels whose true class has a probability under 0.7 only."""
    dice: float = 0.0
    """Soft Dice over the classes present in an image."""
    lovasz: float = 0.0
    """Lovasz-softmax over the classes present in an image."""
    local: float = 0.4
    """Cross-entropy of the local pathway's head."""
    coarse: float = 0.4
    """Cross-entropy of the coarse logits."""
    attention: float = 0.4
    """Attention as mask: cross-entropy over classes of the attention logits."""
    identity: float = 0.1
    """Region identity: is class k in the image."""
    region: float = 0.1
    """Region separation: positive cosine between the regions of two present classes."""
    patch: float = 0.1
    """Patch separation: to the own class centre in the image, centres apart."""
    classes: tuple[float, ...] | None = None
    """Weight of each class in `ce`; by default 1."""

    def __post_init__(self) -> None:
        for name in term_names():
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"loss weight {name} must be 0 or more and finite, got {value}")
        if not self.active():
            raise ValueError("every loss weight is 0: there is nothing to train on")

    def active(self) -> dict[str, float]:
        """The terms that count, with their weights."""
        return {name: getattr(self, name) for name in term_names() if getattr(self, name) > 0}

    def to_dict(self) -> dict[str, object]:
        return asdict(self)


def term_names() -> list[str]:
    """The names of all terms, main ones first."""
    return [f.name for f in fields(LossWeights) if f.name != "classes"]


def term_weights(labels_BHW: Tensor, *, num_classes: int, stride: int, weights: LossWeights) -> dict[str, Tensor]:
    """What each active term's sum is to be divided by, from the labels alone (scalar fp64 tensors).

    Pixel terms count labelled pixels (`ce` by class weight), location terms labelled locations at stride s, `dice`,
    `lovasz` and `patch` images with something labelled, `identity` K for each of those, `region` pairs of present
    classes.
    """
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
    keep the graph.
    """
    logits = output.logits
    num_classes = logits.shape[1]
    labels = labels.long()
    aux = output.aux
    stride = aux.stride if aux is not None else 8
    active = weights.active()
    totals = term_weights(labels, num_classes=num_classes, stride=stride, weights=weights)
    sums: dict[str, Tensor] = {}
    if "ce" in active:
        sums["ce"] = _cross_entropy(logits, labels, _class_weights(weights, num_classes, logits.device))
    if "ohem" in active:
        sums["ohem"] = _ohem(logits, labels)
    if "dice" in active:
        sums["dice"] = _dice(logits, labels)
    if "lovasz" in active:
        sums["lovasz"] = _lovasz(logits, labels)
    if aux is not None:
        reduced = _on_grid(majority_reduce(labels, stride, num_classes), aux.grid)
        present_BK = class_counts(labels, num_classes) > 0
        for name, maps in (("local", aux.local_BKhw), ("coarse", aux.coarse_BKhw), ("attention", aux.attention_BKhw)):
            if name in active and maps is not None:
                sums[name] = _cross_entropy(maps, reduced)
        if "identity" in active and aux.identity_BK is not None:
            bce = F.binary_cross_entropy_with_logits(aux.identity_BK, present_BK.to(aux.identity_BK), reduction="none")
            sums["identity"] = (bce * present_BK.any(dim=1, keepdim=True)).sum()
        if "region" in active and aux.regions_BKD is not None:
            sums["region"] = _pair_similarity(aux.regions_BKD, present_BK).sum()
        if "patch" in active and aux.embedding_BEhw is not None:
            sums["patch"] = _patch_separation(aux.embedding_BEhw, reduced, num_classes)
    return {name: (value, totals[name]) for name, value in sums.items()}


def total_loss(
    terms: Terms, weights: LossWeights, totals: Mapping[str, Tensor] | None = None, world_size: int = 1
) -> Tensor:
    """The scalar to run backward on: sum of weight * sum * world_size / total.

    `totals` are the step's total weights over all ranks and micro-batches; by default this batch's own. A total of 0
    (nothing to learn from) gives 0 and keeps the graph.
    """
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


def _dice(logits: Tensor, labels: Tensor, epsilon: float = 1.0) -> Tensor:
    """Sum over images of 1 - mean Dice over the classes present in each."""
    p, truth, present, valid = _soft_and_truth(logits, labels)
    p = p * valid
    overlap = (p * truth).flatten(2).sum(dim=2)
    dice = (2 * overlap + epsilon) / (p.flatten(2).sum(dim=2) + truth.flatten(2).sum(dim=2) + epsilon)
    return (((1 - dice) * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)).sum()


def _lovasz(logits: Tensor, labels: Tensor) -> Tensor:
    """Sum over images of the mean Lovasz extension of the Jaccard loss over the classes present in each."""
    p, truth, present, valid = _soft_and_truth(logits, labels)
    error_BKN, order = ((truth - p).abs() * valid).flatten(2).sort(dim=2, descending=True)
    truth_BKN = truth.flatten(2).gather(2, order)
    valid_BKN = valid.expand_as(truth).flatten(2).to(p.dtype).gather(2, order)
    positives = truth_BKN.sum(dim=2, keepdim=True)
    intersection = positives - truth_BKN.cumsum(dim=2)
    union = positives + (valid_BKN - truth_BKN).cumsum(dim=2)
    jaccard = 1 - intersection / union.clamp_min(1)
    gradient = torch.cat([jaccard[..., :1], jaccard[..., 1:] - jaccard[..., :-1]], dim=2)
    per_class = (error_BKN * gradient * valid_BKN).sum(dim=2)
    return ((per_class * present).sum(dim=1) / present.sum(dim=1).clamp_min(1)).sum()


def _soft_and_truth(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Probabilities and one-hot truth (B, K, H, W), presence (B, K), validity (B, 1, H, W)."""
    num_classes = logits.shape[1]
    valid = labels != IGNORE_INDEX
    truth = F.one_hot(labels.where(valid, 0), num_classes).permute(0, 3, 1, 2).to(logits.dtype) * valid[:, None]
    present = class_counts(labels, num_classes) > 0
    return logits.softmax(dim=1), truth, present, valid[:, None]


def _pair_similarity(vectors_BKD: Tensor, present_BK: Tensor) -> Tensor:
    """Sum of the positive cosines over the pairs of present classes, for each image (B,)."""
    unit = F.normalize(vectors_BKD, dim=2)
    cosine = (unit @ unit.transpose(1, 2)).clamp_min(0)
    pairs = (present_BK[:, :, None] & present_BK[:, None, :]).triu(diagonal=1)
    return (cosine * pairs).sum(dim=(1, 2))


def _patch_separation(embedding_BEhw: Tensor, reduced: Tensor, num_classes: int) -> Tensor:
    """Sum over images of the mean of 1 - cos(z_i, its class centre) plus the mean positive cosine of centre pairs."""
    z_BNE = F.normalize(embedding_BEhw.flatten(2).transpose(1, 2), dim=2)
    labels = reduced.flatten(1)
    valid = labels != IGNORE_INDEX
    truth_BNK = F.one_hot(labels.where(valid, 0), num_classes).to(z_BNE.dtype) * valid[..., None]
    centres_BKE = F.normalize(truth_BNK.transpose(1, 2) @ z_BNE, dim=2)
    pull = ((1 - (z_BNE @ centres_BKE.transpose(1, 2))) * truth_BNK).sum(dim=(1, 2)) / valid.sum(dim=1).clamp_min(1)
    present = truth_BNK.sum(dim=1) > 0
    count = present.sum(dim=1)
    pairs = (count * (count - 1) // 2).clamp_min(1)
    return (pull + _pair_similarity(centres_BKE, present) / pairs).sum()


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
