"""The decoders people put on a timm backbone (segmentation_models_pytorch), trained and judged as a `Segmentor` is.

A plain ViT has no pyramid. UPerNet and SegFormer get one as in ViTDet (Li et al. 2022, "Exploring Plain Vision
Transformer Backbones for Object Detection"): the taps by transposed convolutions and pooling at strides 4 to 32. DPT
makes its own. All have the width of our parts. SegFormer's and UPerNet's logits are at stride 4, DPT's at stride 2.
Shapes: B batch, K classes, H x W pixels, h x w grid at the peer's stride.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch.nn.functional as F
from segmentation_models_pytorch.decoders.dpt.decoder import DPTDecoder, DPTSegmentationHead
from segmentation_models_pytorch.decoders.segformer.decoder import SegformerDecoder
from segmentation_models_pytorch.decoders.upernet.decoder import UPerNetDecoder
from torch import Tensor, nn

from repsep_model.backbone import Backbone
from repsep_model.config import SegmentorConfig
from repsep_model.layers import ChannelNorm
from repsep_model.segmentor import SegmentorOutput, build_segmentor, upsample_logits

Decoder = Literal["upernet", "dpt", "segformer"]


@dataclass(frozen=True)
class PeerConfig:
    """What training and inference ask of a model's config."""

    num_classes: int
    stride: int
    window: int


class Peer(nn.Module):
    """uint8 or float images in 0..255, (B, 3, H, W) -> logits, through the interface of `Segmentor`."""

    mean: Tensor
    std: Tensor
    fixed_window = None
    plain = True
    multiple = 32

    def __init__(self, config: SegmentorConfig, decoder: Decoder, width: int = 96) -> None:
        super().__init__()
        ours = build_segmentor(config)  # for its backbone: the same random numbers as every other arm's
        self.backbone: Backbone = ours.backbone
        self.register_buffer("mean", ours.mean, persistent=False)
        self.register_buffer("std", ours.std, persistent=False)
        self.config = PeerConfig(config.num_classes, 2 if decoder == "dpt" else 4, config.window)
        channels = self.backbone.channels
        self.pyramid = None if decoder == "dpt" else _pyramid(channels)
        self.decoder: nn.Module
        self.head: nn.Module = nn.Conv2d(width, config.num_classes, 1)
        if decoder == "upernet":
            self.decoder = UPerNetDecoder([3, 0, *channels], decoder_channels=width)
        elif decoder == "segformer":
            self.decoder = SegformerDecoder([3, 0, *channels], segmentation_channels=width)
        else:
            between = [width // 2, width, 2 * width, 2 * width]
            self.decoder = DPTDecoder(channels, self.backbone.strides, False, "ignore", between, width)
            self.head = DPTSegmentationHead(width, config.num_classes).head

    def forward(self, images: Tensor) -> SegmentorOutput:
        logits = upsample_logits(self.forward_stride(images), self.config.stride, images.shape[-2:])
        return SegmentorOutput(logits, None)

    def forward_stride(self, images: Tensor) -> Tensor:
        """fp32 logits (B, K, h, w) over the padded image."""
        pixels = (images.float() - self.mean) / self.std
        pixels = F.pad(pixels, (0, -pixels.shape[-1] % self.multiple, 0, -pixels.shape[-2] % self.multiple))
        taps = self.backbone(pixels)
        if self.pyramid is None:
            decoded = self.decoder(taps, [None] * len(taps))
        else:
            maps = [scale(tap) for scale, tap in zip(self.pyramid, taps, strict=True)]
            decoded = self.decoder([pixels, pixels[:, :0], *maps])
        logits: Tensor = self.head(decoded)
        return logits.float()

    def for_inference(self) -> Peer:
        return self.eval()


def _pyramid(channels: list[int]) -> nn.ModuleList:
    """Stride 16 to strides 4, 8, 16 and 32."""

    def up(c: int) -> nn.Module:
        return nn.ConvTranspose2d(c, c, 2, stride=2)

    first, second, _, _ = channels
    steps: list[Any] = [
        nn.Sequential(up(first), ChannelNorm(first), nn.GELU(), up(first)),
        up(second),
        nn.Identity(),
        nn.MaxPool2d(2),
    ]
    return nn.ModuleList(steps)
