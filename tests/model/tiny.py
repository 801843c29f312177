"""The small random segmentors of these tests: one plain ViT, one pyramid ViT, and one of each backbone family.

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

_PLAIN = {"depth": 4, "embed_dim": 48, "num_heads": 3}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "ViT": ("vit_tiny_patch16_224", _PLAIN),
    "DeiT3": ("deit3_small_patch16_224", _PLAIN),
    "BEiT": ("beit_base_patch16_224", _PLAIN),
    "BEiTv2 at 64": ("beitv2_base_patch16_224", _PLAIN | {"img_size": 64}),
    "EVA-02": ("eva02_tiny_patch14_224", _PLAIN),
    "DINOv2": ("vit_small_patch14_reg4_dinov2", _PLAIN),
    "DINOv3": ("vit_small_patch16_dinov3", _PLAIN),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 12, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 3, 4)},
    ),
    "PVTv2": ("pvt_v2_b0", {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}),
    "ConvNeXt": ("convnext_atto", {"dims": (8, 16, 24, 32), "depths": (1, 1, 1, 1)}),
    "MaxViT": ("maxvit_tiny_tf_224", {"embed_dim": (32, 32, 64, 64), "depths": (1, 1, 1, 1), "stem_width": 16}),
}
"""timm's name and arguments of a small variant of each family: its own blocks and position encoding, few channels."""


def family_segmentor(family: str, **changes: Any) -> Segmentor:
    name, args = FAMILIES[family]
    config = SegmentorConfig(backbone=name, backbone_args=args, num_classes=K, width=16, drop_path=0.0)
    return tiny_segmentor(config, **changes)


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
