"""The small random segmentors of these tests: one plain ViT, one pyramid ViT.

Shapes: B batch, K classes, H x W pixels.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from repsep_model import Segmentor, SegmentorConfig, build_segmentor

K = 5

VIT = SegmentorConfig(
    backbone="vit_tiny_patch16_224",
    backbone_args={"depth": 4, "embed_dim": 48, "num_heads": 3},
    num_classes=K,
    width=16,
)

PVT = SegmentorConfig(
    backbone="pvt_v2_b0",
    backbone_args={"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)},
    num_classes=K,
    width=16,
)


def tiny_segmentor(config: SegmentorConfig = VIT, *, seed: int = 0, **changes: Any) -> Segmentor:
    """Random weights, zero-initialised ones included: a part that starts as the identity must not hide a fault."""
    torch.manual_seed(seed)
    model = build_segmentor(replace(config, **changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def random_images(batch: int, height: int, width: int, *, seed: int = 0) -> Tensor:
    """(B, 3, H, W) uint8."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (batch, 3, height, width), dtype=torch.uint8, generator=generator)


def random_labels(batch: int, height: int, width: int, *, ignored: float = 0.2, seed: int = 0) -> Tensor:
    """(B, H, W) uint8 ids in blocks of a few pixels, a share of them ignored."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, K, (batch, height // 12 + 1, width // 12 + 1), generator=generator)
    labels = coarse.repeat_interleave(12, dim=1).repeat_interleave(12, dim=2)[:, :height, :width].to(torch.uint8)
    labels[torch.rand(labels.shape, generator=generator) < ignored] = 255
    return labels
