"""Formulations that were tried, each as a change of one function of repsep_model; what helped went into repsep_model.

Shapes: B batch, K classes, D width, E embedding, h x w grid, N = h * w.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repsep_model import losses, segmentor
from repsep_model.cross_attention import DiscriminativeCrossAttention, Regions
from repsep_model.labels import IGNORE_INDEX, majority_reduce
from repsep_model.layers import ChannelNorm
from repsep_model.separation import RegionSeparation


@dataclass(frozen=True)
class Change:
    """Replaces functions or classes of repsep_model, named `module.name`, for the time of a block. Can be pickled."""

    replaced: Mapping[str, object]

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        places = {name: (MODULES[name.partition(".")[0]], name.partition(".")[2]) for name in self.replaced}
        before = {name: getattr(*place) for name, place in places.items()}
        try:
            for name, value in self.replaced.items():
                setattr(*places[name], value)
            yield
        finally:
            for name, value in before.items():
                setattr(*places[name], value)

    def __or__(self, other: Change) -> Change:
        return Change({**self.replaced, **other.replaced})


MODULES = {"losses": losses, "segmentor": segmentor}


def _truth(reduced: Tensor, num_classes: int) -> tuple[Tensor, Tensor]:
    """(B, N, K) one-hot of labelled locations, and (B, K) which classes are there."""
    labels = reduced.flatten(1)
    valid = labels != IGNORE_INDEX
    truth = F.one_hot(labels.where(valid, 0), num_classes).float() * valid[..., None]
    return truth, truth.sum(dim=1) > 0


def balanced_patch_separation(embedding_BEhw: Tensor, reduced: Tensor, num_classes: int) -> Tensor:
    """The pull is a mean over classes of the mean over their locations: a pole counts as much as the sky."""
    z_BNE = F.normalize(embedding_BEhw.flatten(2).transpose(1, 2), dim=2)
    truth_BNK, present = _truth(reduced, num_classes)
    count_BK = truth_BNK.sum(dim=1)
    centres_BKE = F.normalize(truth_BNK.transpose(1, 2) @ z_BNE, dim=2)
    far_BK = ((1 - (z_BNE @ centres_BKE.transpose(1, 2))) * truth_BNK).sum(dim=1) / count_BK.clamp_min(1)
    classes = present.sum(dim=1)
    pairs = (classes * (classes - 1) // 2).clamp_min(1)
    pull = far_BK.sum(dim=1) / classes.clamp_min(1)
    return (pull + losses._pair_similarity(centres_BKE, present) / pairs).sum()


def contrast_patch_separation(embedding_BEhw: Tensor, reduced: Tensor, num_classes: int) -> Tensor:
    """Cross-entropy of cosines to the class centres of the image (temperature 0.1), each class weighing the same."""
    z_BNE = F.normalize(embedding_BEhw.flatten(2).transpose(1, 2), dim=2)
    truth_BNK, present = _truth(reduced, num_classes)
    count_BK = truth_BNK.sum(dim=1)
    centres_BKE = F.normalize(truth_BNK.transpose(1, 2) @ z_BNE, dim=2)
    logits = (z_BNE @ centres_BKE.transpose(1, 2)) / 0.1
    logits = logits.masked_fill(~present[:, None], -1e4)
    entropy_BK = -(logits.log_softmax(dim=2) * truth_BNK).sum(dim=1) / count_BK.clamp_min(1)
    return (entropy_BK.sum(dim=1) / present.sum(dim=1).clamp_min(1)).sum()


patch_balanced = Change({"losses._patch_separation": balanced_patch_separation})
patch_contrast = Change({"losses._patch_separation": contrast_patch_separation})

_terms = losses._terms


def _dice_terms(output: segmentor.SegmentorOutput, labels: Tensor, weights: losses.LossWeights) -> losses.Terms:
    """Attention as mask by soft Dice of each region present, beside the cross-entropy per location."""
    terms = _terms(output, labels, weights)
    aux = output.aux
    if aux is not None and aux.attention_BKhw is not None and "attention" in terms:
        K = aux.attention_BKhw.shape[1]
        reduced = losses._on_grid(majority_reduce(labels, aux.stride, K), aux.grid)
        truth, present = _truth(reduced, K)
        valid = (reduced != IGNORE_INDEX).flatten(1)[..., None]
        share = aux.attention_BKhw.float().softmax(dim=1).flatten(2).transpose(1, 2) * valid
        dice = 1 - (2 * (share * truth).sum(1) + 1) / (share.sum(1) + truth.sum(1) + 1)
        per_image = (dice * present).sum(1) / present.sum(1).clamp_min(1)
        value, total = terms["attention"]
        terms["attention"] = (value + per_image.mean() * total.to(value), total)
    return terms


attention_dice = Change({"losses._terms": _dice_terms})


class NonlinearRegionSeparation(RegionSeparation):
    """F' = norm(F + alpha * MLP([F, own, rival])): what own and rival mean may depend on where the location is."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__(width, context)
        self.project = nn.Sequential(
            nn.Conv2d(3 * width, width, 1), ChannelNorm(width), nn.GELU(), nn.Conv2d(width, width, 1)
        )

    def forward(self, f_BDhw: Tensor, context: Tensor, coarse_BKhw: Tensor | None) -> Tensor:
        assert coarse_BKhw is not None
        own, rival = own_and_rival(f_BDhw, coarse_BKhw)
        alpha = 2 * torch.sigmoid(self.alpha(context))
        mixed = self.project(torch.cat([f_BDhw, own.to(f_BDhw.dtype), rival.to(f_BDhw.dtype)], dim=1))
        out: Tensor = self.norm(f_BDhw + alpha * mixed)
        return out


def own_and_rival(f_BDhw: Tensor, coarse_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    with torch.autocast(f_BDhw.device.type, enabled=False):
        f_BDN = f_BDhw.float().flatten(2)
        p_BKN = coarse_BKhw.float().softmax(dim=1).flatten(2)
        centres_BDK = f_BDN @ p_BKN.transpose(1, 2) / p_BKN.sum(dim=2).clamp_min(1e-6)[:, None]
        q_BKN = p_BKN * (1 - p_BKN)
        q_BKN = q_BKN / q_BKN.sum(dim=1, keepdim=True).clamp_min(1e-6)
        return (centres_BDK @ p_BKN).view(f_BDhw.shape), (centres_BDK @ q_BKN).view(f_BDhw.shape)


region_nonlinear = Change({"segmentor.RegionSeparation": NonlinearRegionSeparation})


class PresenceCrossAttention(DiscriminativeCrossAttention):
    """A class's score gets what its region says of whether the class is there at all, the same at every location: the
    region of a class that is absent is made of what it is confused with."""

    def __init__(self, width: int, num_classes: int, layers: int, *, tau: float = 4.0) -> None:
        super().__init__(width, num_classes, layers, tau=tau)
        self.presence = nn.Linear(width, 1)
        nn.init.zeros_(self.presence.weight)
        nn.init.zeros_(self.presence.bias)

    def forward(self, f_BDhw: Tensor) -> Regions:
        found = super().forward(f_BDhw)
        prior_BK = self.presence(self.region_norm(found.regions_BKD)).float().squeeze(2)
        return replace(found, scores_BKhw=found.scores_BKhw + prior_BK[:, :, None, None])


presence = Change({"segmentor.DiscriminativeCrossAttention": PresenceCrossAttention})


class CentredCrossAttention(DiscriminativeCrossAttention):
    """What all regions of an image share is taken out of them, and what all its locations share out of these, before
    they are compared: else each region is mostly the image's mean and the cosines hardly differ."""

    presence_too = False

    def __init__(self, width: int, num_classes: int, layers: int, *, tau: float = 4.0) -> None:
        super().__init__(width, num_classes, layers, tau=tau)
        if self.presence_too:
            self.presence = nn.Linear(width, 1)
            nn.init.zeros_(self.presence.weight)
            nn.init.zeros_(self.presence.bias)

    def forward(self, f_BDhw: Tensor) -> Regions:
        B, _, h, w = f_BDhw.shape
        queries_BKD = self.queries.expand(B, -1, -1)
        for layer in self.layers:
            queries_BKD, attention_BKN = layer(queries_BKD, f_BDhw)
        regions_BKD = self.region(self.region_norm(queries_BKD)).float()
        unit_BKD = F.normalize(regions_BKD - regions_BKD.mean(dim=1, keepdim=True), dim=2)
        embedded_BDN = self.embed(f_BDhw).flatten(2).float()
        own_BDN = F.normalize(embedded_BDN - embedded_BDN.mean(dim=2, keepdim=True), dim=1)
        scores_BKN = self.tau * (unit_BKD @ own_BDN)
        if self.presence_too:
            scores_BKN = scores_BKN + self.presence(self.region_norm(queries_BKD)).float()
        return Regions(unit_BKD, scores_BKN.view(B, -1, h, w), attention_BKN.view(B, -1, h, w))


class CentredPresenceCrossAttention(CentredCrossAttention):
    presence_too = True


centred = Change({"segmentor.DiscriminativeCrossAttention": CentredCrossAttention})
centred_presence = Change({"segmentor.DiscriminativeCrossAttention": CentredPresenceCrossAttention})
