"""Formulations that were left, each as a change of repsep_model: so their figures can be had again.

`first_*` are those of the first version. Shapes: B batch, K classes, D width, E embedding, h x w grid, N = h * w.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repsep_model import losses, segmentor
from repsep_model.cross_attention import DiscriminativeCrossAttention, Regions
from repsep_model.layers import ChannelNorm
from repsep_model.losses import _one_hot, _pair_similarity
from repsep_model.separation import own_and_rival

MODULES = {"losses": losses, "segmentor": segmentor}


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


def patch_by_pixel(embedding_BEhw: Tensor, reduced: Tensor, num_classes: int) -> Tensor:
    """Mean over locations of 1 - cosine to the class centre, plus the mean positive cosine of two centres."""
    return _pull_and_push(embedding_BEhw, reduced, num_classes, by_class=False)


def patch_by_class(embedding_BEhw: Tensor, reduced: Tensor, num_classes: int) -> Tensor:
    """The same with the pull as a mean over classes of the mean over their locations."""
    return _pull_and_push(embedding_BEhw, reduced, num_classes, by_class=True)


def _pull_and_push(embedding_BEhw: Tensor, reduced: Tensor, num_classes: int, *, by_class: bool) -> Tensor:
    z_BNE = F.normalize(embedding_BEhw.flatten(2).transpose(1, 2), dim=2)
    truth_BNK = _one_hot(reduced, num_classes)
    size_BK = truth_BNK.sum(dim=1)
    centres_BKE = F.normalize(truth_BNK.transpose(1, 2) @ z_BNE, dim=2)
    far_BK = ((1 - z_BNE @ centres_BKE.transpose(1, 2)) * truth_BNK).sum(dim=1)
    classes_B = (size_BK > 0).sum(dim=1)
    if by_class:
        pull_B = (far_BK / size_BK.clamp_min(1)).sum(dim=1) / classes_B.clamp_min(1)
    else:
        pull_B = far_BK.sum(dim=1) / size_BK.sum(dim=1).clamp_min(1)
    pairs_B = (classes_B * (classes_B - 1) // 2).clamp_min(1)
    return (pull_B + _pair_similarity(centres_BKE, size_BK > 0) / pairs_B).sum()


def no_region_dice(attention_BKhw: Tensor, reduced: Tensor) -> Tensor:
    """Attention as mask by cross-entropy alone."""
    return attention_BKhw.sum() * 0


class LinearRegionSeparation(nn.Module):
    """F' = norm(F + W(alpha * (own - rival)))."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.alpha = nn.Conv2d(width + context, 1, 1)
        self.project = nn.Conv2d(width, width, 1)
        self.norm = ChannelNorm(width)

    def forward(self, f_BDhw: Tensor, context: Tensor, coarse_BKhw: Tensor) -> Tensor:
        own, rival = own_and_rival(f_BDhw, coarse_BKhw)
        alpha = 2 * torch.sigmoid(self.alpha(context))
        out: Tensor = self.norm(f_BDhw + self.project(alpha * (own - rival).to(f_BDhw.dtype)))
        return out


class PlainCrossAttention(DiscriminativeCrossAttention):
    """Scores tau * cos(R_k, embed(F')): nothing shared is taken out, and no presence."""

    def __init__(self, width: int, num_classes: int, layers: int) -> None:
        super().__init__(width, num_classes, layers)
        del self.presence

    def forward(self, f_BDhw: Tensor) -> Regions:
        B, _, h, w = f_BDhw.shape
        queries_BKD = self.queries.expand(B, -1, -1)
        for layer in self.layers:
            queries_BKD, attention_BKN = layer(queries_BKD, f_BDhw)
        regions_BKD = self.region(self.region_norm(queries_BKD))
        embedded_BDN = self.embed(f_BDhw).flatten(2)
        cosine_BKN = F.normalize(regions_BKD.float(), dim=2) @ F.normalize(embedded_BDN.float(), dim=1)
        return Regions(regions_BKD, (self.tau * cosine_BKN).view(B, -1, h, w), attention_BKN.view(B, -1, h, w))


first_patch = Change({"losses._patch_separation": patch_by_pixel})
first_attention = Change({"losses._region_dice": no_region_dice})
first_region = Change({"segmentor.RegionSeparation": LinearRegionSeparation})
first_cross = Change({"segmentor.DiscriminativeCrossAttention": PlainCrossAttention})
first = first_patch | first_attention | first_region | first_cross
balanced_patch = Change({"losses._patch_separation": patch_by_class})
