"""The local pathway: separation at the level of local patches, beside the transformer and decoupled from it.

The paper (arXiv 2212.13764) gives the purpose and that the pathway is decoupled; the inside of the block is ours.
Shapes: B batch, D width, h x w grid at stride s, C_m channels of tap m, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from repsep_model.layers import ChannelMlp, ChannelNorm, pad_replicate, resize

UNSHUFFLE = 4  # the stem starts at stride 4: 3-channel convolutions at full resolution are slow


class LocalDiscrepancy(nn.Module):
    """u minus the mean of its neighbourhood, (B, D, h, w) -> (B, D, h, w).

    The depthwise kernel is a delta minus a softmax of learned weights (of zeros where it is `uniform`), so it sums to
    zero by construction and a constant map gives exactly 0.
    """

    weights: Tensor

    def __init__(self, width: int, size: int = 3, *, uniform: bool = False) -> None:
        super().__init__()
        self.size = size
        weights = torch.zeros(width, size * size)
        if uniform:
            self.register_buffer("weights", weights, persistent=False)
        else:
            self.weights = nn.Parameter(weights)

    def forward(self, u_BDhw: Tensor) -> Tensor:
        # A zero-sum kernel ignores any constant per channel; taking one out first makes a constant map exactly 0 and
        # keeps bf16's rounding small beside a large offset.
        u_BDhw = u_BDhw - u_BDhw[..., :1, :1].detach()
        smoothing = self.weights.softmax(dim=1).view(-1, 1, self.size, self.size)
        padded = pad_replicate(u_BDhw, self.size // 2)
        return u_BDhw - F.conv2d(padded, smoothing.to(padded.dtype), groups=u_BDhw.shape[1])


class LocalSeparationBlock(nn.Module):
    """P, T_m -> P: bring the tap to the pathway, enhance its local discrepancy where a gate says so, refine.

    With `enhance_discrepancy` off the neighbourhood's mean takes the discrepancy's place: the same parameters and cost.
    """

    def __init__(
        self,
        width: int,
        tap_channels: int,
        *,
        enhance_discrepancy: bool = True,
        uniform_smoothing: bool = False,
        layer_scale: float = 0.1,
    ) -> None:
        super().__init__()
        self.enhance_discrepancy = enhance_discrepancy
        self.tap_norm = ChannelNorm(tap_channels)
        self.tap = nn.Conv2d(tap_channels, width, 1)
        self.discrepancy = LocalDiscrepancy(width, uniform=uniform_smoothing)
        self.gate = nn.Conv2d(2 * width, width, 1)
        self.mix = nn.Conv2d(width, width, 5, padding=2, groups=width)
        self.norm = ChannelNorm(width)
        self.mlp = ChannelMlp(width)
        self.gamma = nn.Parameter(torch.full((width, 1, 1), layer_scale))

    def forward(self, p_BDhw: Tensor, tap: Tensor) -> Tensor:
        u = p_BDhw + resize(self.tap(self.tap_norm(tap)), (p_BDhw.shape[-2], p_BDhw.shape[-1]))
        d = self.discrepancy(u)
        if not self.enhance_discrepancy:
            d = u - d
        u = u + torch.sigmoid(self.gate(torch.cat([u, d], dim=1))) * d
        out: Tensor = p_BDhw + self.gamma * self.mlp(self.norm(self.mix(u)))
        return out


class LocalPathway(nn.Module):
    """Images and taps -> P_4, (B, D, H/s, W/s)."""

    def __init__(
        self,
        width: int,
        stride: int,
        tap_channels: Sequence[int],
        *,
        enhance_discrepancy: bool = True,
        uniform_smoothing: bool = False,
    ) -> None:
        super().__init__()
        hidden = max(width // 2, 32)
        self.stem = nn.Sequential(
            nn.PixelUnshuffle(UNSHUFFLE),
            nn.Conv2d(3 * UNSHUFFLE**2, hidden, 3, padding=1),
            ChannelNorm(hidden),
            nn.GELU(),
            nn.Conv2d(hidden, width, 3, stride=stride // UNSHUFFLE, padding=1),
        )
        self.blocks = nn.ModuleList(
            LocalSeparationBlock(width, c, enhance_discrepancy=enhance_discrepancy, uniform_smoothing=uniform_smoothing)
            for c in tap_channels
        )
        self.grad_checkpointing = False

    def forward(self, images_B3HW: Tensor, taps: Sequence[Tensor]) -> Tensor:
        p_BDhw: Tensor = self.stem(images_B3HW)
        for block, tap in zip(self.blocks, taps, strict=True):
            if self.grad_checkpointing and self.training:
                p_BDhw = checkpoint(block, p_BDhw, tap, use_reentrant=False)
            else:
                p_BDhw = block(p_BDhw, tap)
        return p_BDhw
