"""How over-smooth a transformer is and how separate its representations are, measured on images, map by map.

A map is what one layer gives: each block of a plain ViT or each stage of a pyramid ViT, and each module of ours. Every
measure is a pure function of maps (B, C, h, w), in fp32, and gives one number per image, (B,); NaN where an image has
nothing to measure. Labels are ids (B, h, w) on the map's own grid, with IGNORE_INDEX.
Credits: effective rank after Roy & Vetterli 2007; what over-smoothing is in the Fourier domain after Wang et al., ICLR
2022 (arXiv 2203.05962); the other measures are ours.
Shapes: B batch, C channels, h x w grid, N = h * w, K classes present, M labelled locations, H x W pixels.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repsep_model.backbone import Backbone
from repsep_model.labels import IGNORE_INDEX, majority_reduce
from repsep_model.segmentor import Segmentor

NEIGHBOURS = [(y, x) for y in range(3) for x in range(3) if (y, x) != (1, 1)]
"""Where the eight neighbours begin in a map padded by one location."""


@dataclass(frozen=True, kw_only=True)
class MapMeasures:
    """What is measured of one map, each the mean over the images that have something to measure (NaN if none has)."""

    stride: int
    """Pixels between the locations of the map; the frequency, the edges and the distances are on this grid."""
    similarity: float
    """Mean cosine between locations, -1..1; 1 where all are alike: over-smooth."""
    centred_similarity: float
    """The same after the mean of the locations is taken out; 0 where nothing in common is left."""
    effective_rank: float
    """Number of directions that the locations spread over, 1 to min(C, N - 1)."""
    high_frequency: float
    """Share of the energy at over half the Nyquist frequency of the map's grid, 0..1."""
    distance_ratio: float
    """Distance of locations to their class centre, in distances between class centres; lower is more separate."""
    class_margin: float
    """Cosine of locations to their class centre minus cosine between class centres; higher is more separate."""
    edge_contrast: float
    """At the borders of classes, cosine to neighbours of the own class minus to the others; higher is sharper."""


MEASURES = tuple(field.name for field in fields(MapMeasures) if field.name != "stride")


@dataclass(frozen=True)
class SeparationReport:
    """`maps` in forward order.

    They are block 1.. or stage 1.., P0 (the stem) and P1.. (each local separation block), F, F' and embed (what
    cross-attention compares with its regions); without those that the model lacks.
    """

    maps: Mapping[str, MapMeasures]

    @property
    def margin_gain(self) -> float:
        """How much the class margin grew from F to F'; 0 without separation."""
        return self.maps.get("F'", self.maps["F"]).class_margin - self.maps["F"].class_margin


@torch.inference_mode()
def separation_report(model: Segmentor, images: Tensor, labels: Tensor) -> SeparationReport:
    """Measure every map in eval mode: images (B, 3, H, W) in 0..255, labels (B, H, W) with IGNORE_INDEX.

    One image at a time, so memory does not grow with B. What the model pads to an image is not measured.
    """
    if labels.shape != (len(images), *images.shape[2:]):
        raise ValueError(f"labels {tuple(labels.shape)} do not fit images {tuple(images.shape)}: pass (B, H, W)")
    if not len(images):
        raise ValueError("pass at least one image")
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.autocast(model.mean.device.type, enabled=False):
            return mean_report([_report(model, images[i : i + 1], labels[i : i + 1]) for i in range(len(images))])
    finally:
        for module in were_training:
            module.training = True


def mean_report(reports: Sequence[SeparationReport]) -> SeparationReport:
    """The mean over reports of one image each (of any size), measure by measure; NaN is left out."""
    maps = {}
    for name, first in reports[0].maps.items():
        means = {m: _mean([getattr(report.maps[name], m) for report in reports]) for m in MEASURES}
        maps[name] = MapMeasures(stride=first.stride, **means)
    return SeparationReport(maps)


def mean_similarity(maps_BChw: Tensor, *, centred: bool = False) -> Tensor:
    """Mean cosine over all pairs of different locations; `centred` takes the mean of the locations out first.

    Locations that are 0 have no direction and enter no pair.
    """
    vectors_BCN = _centred(maps_BChw) if centred else maps_BChw.float().flatten(2)
    unit_BCN = F.normalize(vectors_BCN, dim=1)
    count_B = unit_BCN.any(dim=1).sum(dim=1)
    # The sum over pairs is |sum of unit vectors|^2, so the N x N matrix is never made.
    pairs_B = unit_BCN.sum(dim=2).square().sum(dim=1) - unit_BCN.square().sum(dim=(1, 2))
    return torch.where(count_B > 1, pairs_B / (count_B * (count_B - 1)), torch.nan)


def effective_rank(maps_BChw: Tensor) -> Tensor:
    """exp of the entropy of the singular values, as shares of their sum, of the centred N x C matrix."""
    values_BR = torch.linalg.svdvals(_centred(maps_BChw))
    share_BR = values_BR / values_BR.sum(dim=1, keepdim=True)
    entropy_B: Tensor = torch.special.entr(share_BR).sum(dim=1)
    return entropy_B.exp()


def high_frequency_share(maps_BChw: Tensor) -> Tensor:
    """Share of the energy at over half the Nyquist frequency along y or x: waves shorter than 4 locations.

    The mean of a map (DC) does not count: the cosine tells of it. Bilinear upsampling by 2 leaves next to nothing here.
    The cosine transform is the Fourier transform of the map mirrored at its borders, so that a slope across the map
    does not count as an edge between opposite borders.
    """
    h, w = maps_BChw.shape[-2:]
    spectrum = _cosine_basis(h).to(maps_BChw.device) @ _centred(maps_BChw).reshape(maps_BChw.shape)
    energy_Bhw = (spectrum @ _cosine_basis(w).T.to(maps_BChw.device)).square().sum(dim=1)
    y, x = torch.arange(h), torch.arange(w)  # half waves across the map: h of them are the Nyquist frequency
    high_hw = ((2 * y > h)[:, None] | (2 * x > w)).to(maps_BChw.device)
    return (energy_Bhw * high_hw).sum(dim=(1, 2)) / energy_Bhw.sum(dim=(1, 2))


def class_distance_ratio(maps_BChw: Tensor, labels_Bhw: Tensor) -> Tensor:
    """Mean distance of labelled locations to their class centre / mean distance between class centres."""
    ratios = []
    for vectors_CM, own_M, centres_CK in _class_centres(_centred(maps_BChw), labels_Bhw):
        within = (vectors_CM - centres_CK[:, own_M]).norm(dim=0).mean()
        ratios.append(within / F.pdist(centres_CK.T).mean())
    return torch.stack(ratios)


def class_margin(maps_BChw: Tensor, labels_Bhw: Tensor) -> Tensor:
    """Mean over classes of the mean cosine to the class centre, minus the mean cosine between class centres."""
    margins = []
    for _, _, centres_CK in _class_centres(F.normalize(maps_BChw.float().flatten(2), dim=1), labels_Bhw):
        within = centres_CK.norm(dim=0).mean()  # the mean cosine of unit vectors to their mean is its length
        between = 1 - F.pdist(F.normalize(centres_CK, dim=0).T).square().mean() / 2
        margins.append(within - between)
    return torch.stack(margins)


def edge_contrast(maps_BChw: Tensor, labels_Bhw: Tensor) -> Tensor:
    """Mean cosine to the neighbours of the own class minus that to neighbours of other classes.

    Over the labelled locations that have both among their 8 neighbours.
    """
    h, w = labels_Bhw.shape[1:]
    unit = F.normalize(maps_BChw.float(), dim=1)
    padded, padded_labels = F.pad(unit, [1] * 4), F.pad(labels_Bhw, [1] * 4, value=IGNORE_INDEX)
    sums, counts = unit.new_zeros(2, *labels_Bhw.shape), unit.new_zeros(2, *labels_Bhw.shape)
    for y, x in NEIGHBOURS:
        cosine_Bhw = (unit * padded[..., y : y + h, x : x + w]).sum(dim=1)
        neighbours_Bhw = padded_labels[:, y : y + h, x : x + w]
        labelled = neighbours_Bhw != IGNORE_INDEX  # an ignored location has then none of its own class and drops out
        same = labels_Bhw == neighbours_Bhw
        kinds = torch.stack([labelled & same, labelled & ~same])
        sums += kinds * cosine_Bhw
        counts += kinds
    means = sums / counts
    return (means[0] - means[1]).flatten(1).nanmean(dim=1)


def _report(model: Segmentor, image: Tensor, labels: Tensor) -> SeparationReport:
    maps = {}
    for name, (stride, padded_maps) in _named_maps(model, image.to(model.mean.device)).items():
        reduced = majority_reduce(labels, stride, model.config.num_classes).to(padded_maps.device)
        measured = padded_maps[..., : reduced.shape[1], : reduced.shape[2]]
        maps[name] = MapMeasures(
            stride=stride,
            similarity=float(mean_similarity(measured)),
            centred_similarity=float(mean_similarity(measured, centred=True)),
            effective_rank=float(effective_rank(measured)),
            high_frequency=float(high_frequency_share(measured)),
            distance_ratio=float(class_distance_ratio(measured, reduced)),
            class_margin=float(class_margin(measured, reduced)),
            edge_contrast=float(edge_contrast(measured, reduced)),
        )
    return SeparationReport(maps)


def _named_maps(model: Segmentor, images: Tensor) -> dict[str, tuple[int, Tensor]]:
    """(stride, map of the padded image) by name, in forward order. Hooks take them: the forward knows nothing of it."""
    found: dict[str, Any] = {}
    hooks = [part.register_forward_hook(partial(_keep, found, name)) for name, part in _parts(model).items()]
    hooks.append(model.backbone.register_forward_pre_hook(lambda _, args: found.update(pixels=args[0])))
    try:
        model.forward_stride(images)
    finally:
        for hook in hooks:
            hook.remove()
    pixels = found.pop("pixels")
    maps: dict[str, Tensor] = _layers(model.backbone, pixels) | found
    return {name: (pixels.shape[-1] // m.shape[-1], m) for name, m in maps.items()}


def _keep(found: dict[str, Any], name: str, _part: nn.Module, _args: Any, output: Any) -> None:
    found[name] = output


def _parts(model: Segmentor) -> dict[str, nn.Module]:
    """The modules of ours that give a map, by the names of the figure in segmentor.py."""
    parts: dict[str, nn.Module] = {}
    if model.local_pathway is not None:
        parts["P0"] = model.local_pathway.stem
        parts |= {f"P{m}": block for m, block in enumerate(model.local_pathway.blocks, 1)}
    parts["F"] = model.fuse_norm
    if model.separation is not None:
        parts["F'"] = model.separation
    if model.cross_attention is not None:
        parts["embed"] = model.cross_attention.embed
    return parts


def _layers(backbone: Backbone, pixels_B3HW: Tensor) -> dict[str, Tensor]:
    """The blocks of a plain ViT, also those between the taps, or the stages of a pyramid."""
    every = copy.copy(backbone)  # shares the weights
    if backbone.plain:
        every.taps = list(range(len(backbone.model.feature_info)))
    kind = "block" if backbone.plain else "stage"
    return {f"{kind} {m}": layer for m, layer in enumerate(every.forward(pixels_B3HW), 1)}


def _centred(maps_BChw: Tensor) -> Tensor:
    """(B, C, N) without the mean of the locations, fp32."""
    vectors_BCN = maps_BChw.float().flatten(2)
    # The mean of equal values may differ from them by rounding; taking one out first makes a constant map exactly 0.
    vectors_BCN = vectors_BCN - vectors_BCN[..., :1]
    return vectors_BCN - vectors_BCN.mean(dim=2, keepdim=True)


def _cosine_basis(size: int) -> Tensor:
    """The orthonormal discrete cosine transform (DCT-II) of `size` values as a matrix, a row for each frequency."""
    place = torch.arange(size, dtype=torch.float64)
    basis = torch.cos(place[:, None] * (place + 0.5) * math.pi / size) * math.sqrt(2 / size)
    basis[0] /= math.sqrt(2)
    return basis.float()


def _class_centres(vectors_BCN: Tensor, labels_Bhw: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Per image its labelled vectors (C, M), the number of each one's class among those present (M), centres (C, K)."""
    for vectors_CN, labels_N in zip(vectors_BCN, labels_Bhw.flatten(1), strict=True):
        labelled = labels_N != IGNORE_INDEX
        vectors_CM = vectors_CN[:, labelled]
        present, own_M = labels_N[labelled].unique(return_inverse=True)
        member_KM = own_M == torch.arange(len(present), device=own_M.device)[:, None]
        yield vectors_CM, own_M, vectors_CM @ (member_KM / member_KM.sum(dim=1, keepdim=True)).T


def _mean(values: Sequence[float]) -> float:
    found = [value for value in values if not math.isnan(value)]
    return sum(found) / len(found) if found else math.nan
