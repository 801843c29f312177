"""The composition root: backbone, local pathway, separation and cross-attention put together as in the figure.

    images -> backbone --------> T1   T2   T3   T4
       |                          |    |    |    |
       +---> stem -> P0 -> LSB1 -> LSB2 -> LSB3 -> LSB4 -> P4
                                                     |
                          F = fuse(T4, P4) -> SAS -> F' -> DCA -> logits

After "Representation Separation for Semantic Segmentation with Vision Transformers" (Hong, Pan, Sun, Yu, Gao; arXiv
2212.13764): the parts and their purposes are the paper's, their equations are our own formulation.
Shapes: B batch, K classes, D width, E embedding, H x W pixels, h x w grid at stride s of the padded image.
"""

from __future__ import annotations

import copy
import logging
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repsep_model.backbone import Backbone
from repsep_model.config import SegmentorConfig
from repsep_model.cross_attention import DiscriminativeCrossAttention
from repsep_model.layers import ChannelNorm, resize
from repsep_model.local_pathway import LocalPathway
from repsep_model.pretrained import load_named, load_pretrained
from repsep_model.separation import LocalSeparation, RegionSeparation

logger = logging.getLogger(__name__)

WIDE_BACKBONE = 768
EMBEDDING = 64


@dataclass(frozen=True)
class SegmentorAux:
    """What the auxiliary losses need, at stride s; a part that the config leaves out is None."""

    stride: int
    grid: tuple[int, int]
    local_BKhw: Tensor | None
    coarse_BKhw: Tensor | None
    attention_BKhw: Tensor | None
    identity_BK: Tensor | None
    regions_BKD: Tensor | None
    embedding_BEhw: Tensor | None


@dataclass(frozen=True)
class SegmentorOutput:
    """fp32 logits (B, K, H, W) at the size of the input; `aux` is None in eval mode."""

    logits: Tensor
    aux: SegmentorAux | None


@dataclass(frozen=True)
class Features:
    """The maps along the way: the taps, and F before and after separation."""

    taps: list[Tensor]
    fused_BDhw: Tensor
    separated_BDhw: Tensor


class Segmentor(nn.Module):
    """uint8 or float images in 0..255, (B, 3, H, W), any H and W -> `SegmentorOutput`.

    Built by `build_segmentor`, which resolves the defaults that depend on the backbone.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, config: SegmentorConfig, backbone: Backbone) -> None:
        super().__init__()
        assert config.width is not None
        assert config.mean is not None
        assert config.std is not None
        self.config = config
        width, classes = config.width, config.num_classes
        self.multiple = math.lcm(backbone.multiple, config.stride)
        """Sides of the padded image are multiples of this."""
        if backbone.window is not None and self.multiple != backbone.window:
            raise ValueError(
                f"backbone {config.backbone!r} takes {backbone.window} x {backbone.window} pixels only, which stride "
                f"{config.stride} does not divide; give backbone_args: {{img_size: ...}} a multiple of both"
            )
        self.fixed_window = backbone.window
        """The one side that the backbone takes; larger images are given to it in tiles. None: any side."""
        self.plain = backbone.plain
        """Whether all taps have one stride: a plain ViT, whose positions are those of its training's crops."""
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1) * 255, persistent=False)

        self.backbone = backbone
        local, uniform = config.local_pathway, config.uniform_smoothing
        self.local_pathway = (
            LocalPathway(
                width,
                config.stride,
                backbone.channels,
                enhance_discrepancy=config.local_discrepancy,
                uniform_smoothing=uniform,
            )
            if local
            else None
        )
        self.fuse = nn.Sequential(ChannelNorm(backbone.channels[-1]), nn.Conv2d(backbone.channels[-1], width, 1))
        self.fuse_norm = ChannelNorm(width)
        context = width if local else 0
        self.separation: nn.Module | None = None
        if config.separation == "local":
            self.separation = LocalSeparation(width, context, uniform=uniform)
        elif config.separation == "region":
            self.separation = RegionSeparation(width, context)
        layers = config.cross_attention
        self.cross_attention = DiscriminativeCrossAttention(width, classes, layers) if layers else None
        self.classifier = nn.Conv2d(width, classes, 1)

        # Training only, except that region separation reads the coarse logits.
        self.local_head = nn.Conv2d(width, classes, 1) if local else None
        self.coarse_head = nn.Conv2d(width, classes, 1) if config.separation != "none" else None
        supervised = layers > 0 and config.attention_supervision
        self.identity_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1)) if supervised else None
        self.embedding_head = nn.Conv2d(width, EMBEDDING, 1) if config.separation != "none" else None
        self.grad_checkpointing = False

    def forward(self, images: Tensor) -> SegmentorOutput:
        logits_BKhw, aux = self._forward_stride(images)
        return SegmentorOutput(upsample_logits(logits_BKhw, self.config.stride, images.shape[-2:]), aux)

    def forward_stride(self, images: Tensor) -> Tensor:
        """fp32 logits (B, K, h, w) at stride s over the *padded* image: h = ceil(H / multiple) * multiple / s."""
        return self._forward_stride(images)[0]

    def features(self, images: Tensor) -> Features:
        """The taps, and the fused map before and after separation."""
        features, _, _ = self._features(self._prepare(images))
        return features

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Training keeps less: what the backbone's blocks and our parts compute is computed again for its gradient.

        Raises ValueError for a backbone that cannot.
        """
        self.backbone.set_grad_checkpointing(enable)
        self.grad_checkpointing = enable
        if self.local_pathway is not None:
            self.local_pathway.grad_checkpointing = enable

    def for_inference(self) -> Segmentor:
        """A copy in eval mode without the training-only parts; its logits are the same to the bit."""
        model = copy.deepcopy(self)
        model.local_head = model.identity_head = model.embedding_head = None
        if self.config.separation != "region":
            model.coarse_head = None
        return model.eval().requires_grad_(False)

    def _forward_stride(self, images: Tensor) -> tuple[Tensor, SegmentorAux | None]:
        features, local, coarse = self._features(self._prepare(images))
        logits = self.classifier(features.separated_BDhw).float()
        regions = None
        if self.cross_attention is not None:
            regions = self._run(self.cross_attention, features.separated_BDhw)
            logits = logits + regions.scores_BKhw
        if not self.training:
            return logits, None
        supervised = regions if self.config.attention_supervision else None
        return logits, SegmentorAux(
            stride=self.config.stride,
            grid=(logits.shape[-2], logits.shape[-1]),
            local_BKhw=self.local_head(local).float() if self.local_head is not None else None,
            coarse_BKhw=coarse.float() if coarse is not None else None,
            attention_BKhw=supervised.attention_BKhw if supervised else None,
            identity_BK=self.identity_head(supervised.regions_BKD).squeeze(2).float()
            if supervised and self.identity_head is not None
            else None,
            regions_BKD=supervised.regions_BKD.float() if supervised else None,
            embedding_BEhw=self.embedding_head(features.separated_BDhw).float()
            if self.embedding_head is not None
            else None,
        )

    def _features(self, pixels_B3HW: Tensor) -> tuple[Features, Tensor | None, Tensor | None]:
        """Returns the maps, P_4 and the coarse logits."""
        taps = self.backbone(pixels_B3HW)
        grid = (pixels_B3HW.shape[-2] // self.config.stride, pixels_B3HW.shape[-1] // self.config.stride)
        local = self.local_pathway(pixels_B3HW, taps) if self.local_pathway is not None else None
        fused = resize(self.fuse(taps[-1]), grid)
        fused = self.fuse_norm(fused if local is None else fused + local)
        coarse = self.coarse_head(fused) if self.coarse_head is not None else None
        separated = fused
        if self.separation is not None:
            context = fused if local is None else torch.cat([fused, local], dim=1)
            separated = self._run(self.separation, fused, context, coarse)
        return Features(taps, fused, separated), local, coarse

    def _run(self, part: nn.Module, *args: Tensor | None) -> Any:
        if self.grad_checkpointing and self.training:
            return checkpoint(part, *args, use_reentrant=False)
        return part(*args)

    def _prepare(self, images: Tensor) -> Tensor:
        """Normalise, then pad right and below with zeros (the mean colour) to multiples of patch and stride."""
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images must be (B, 3, H, W) in 0..255, got shape {tuple(images.shape)}")
        pixels = (images.float() - self.mean) / self.std
        # Not `-side % multiple`: torch.compile cannot trace Python's modulo of a negative size that it leaves open.
        height, width = (-(-side // self.multiple) * self.multiple for side in images.shape[-2:])
        return F.pad(pixels, (0, width - images.shape[-1], 0, height - images.shape[-2]))


def upsample_logits(logits_BKhw: Tensor, stride: int, size: tuple[int, int] | torch.Size) -> Tensor:
    """From the padded grid to its pixels, once, then cropped to `size`: the other order would shift the labels."""
    h, w = logits_BKhw.shape[-2:]
    full = F.interpolate(logits_BKhw, size=(h * stride, w * stride), mode="bilinear", align_corners=False)
    return full[..., : size[0], : size[1]]


def build_segmentor(config: SegmentorConfig, pretrained: bool | str | Path = False) -> Segmentor:
    """A segmentor with fresh heads. `pretrained`: False, True (timm's weights by name) or a file of backbone weights.

    Raises ValueError for an unknown backbone or one that cannot serve, and for weights that do not fit.
    """
    backbone = Backbone(config.backbone, drop_path=config.drop_path, args=config.backbone_args)
    if pretrained is not False:
        report = load_named(backbone) if pretrained is True else load_pretrained(backbone, Path(pretrained))
        source = config.backbone if pretrained is True else pretrained
        doubtful = report.missing or report.unexplained
        logger.log(logging.WARNING if doubtful else logging.INFO, "%s: %s", source, report)
    mean, std = backbone.mean_std
    width = 256 if backbone.plain and backbone.channels[-1] >= WIDE_BACKBONE else 96
    defaults: dict[str, Any] = {"width": width, "mean": mean, "std": std}
    resolved = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    return Segmentor(replace(config, **resolved), backbone)
