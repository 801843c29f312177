"""The pieces that the parts of the model share: normalisation over channels, the MLP, resizing, padding.

Shapes: B batch, C channels, h x w grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of a (B, C, h, w) map. Needs no statistics over the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ChannelMlp(nn.Sequential):
    """Two linear layers with GELU at every location of a (B, C, h, w) map."""

    def __init__(self, channels: int, ratio: int = 4) -> None:
        super().__init__(
            nn.Linear(channels, ratio * channels),
            nn.GELU(),
            nn.Linear(ratio * channels, channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = super().forward(x.permute(0, 2, 3, 1))  # type: ignore[no-untyped-call]
        return out.permute(0, 3, 1, 2)


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, *, *) to (B, C, *size): coarser maps bilinearly (align_corners=False), finer ones by averaging."""
    height, width = x.shape[-2:]
    if (height, width) == size:
        return x
    if height > size[0]:
        return F.adaptive_avg_pool2d(x, size)
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


def pad_replicate(x: Tensor, margin: int) -> Tensor:
    """(B, C, h, w) to (B, C, h + 2 margin, w + 2 margin): the values at the border go on outwards."""
    if not torch.compiler.is_dynamo_compiling():
        return F.pad(x, [margin] * 4, mode="replicate")
    # torch's compiler mistakes the memory layout of that padding's gradient (seen in 2.15).
    for dim in (2, 3):
        first, last = x.narrow(dim, 0, 1), x.narrow(dim, x.shape[dim] - 1, 1)
        x = torch.cat([first] * margin + [x] + [last] * margin, dim=dim)
    return x
