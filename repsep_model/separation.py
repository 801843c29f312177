"""Spatially adaptive separation: move a location away from what it is confused with, as far as that location needs.

The paper (arXiv 2212.13764) gives the name and the purpose, more separate deep representations; both mechanisms are
ours.
Shapes: B batch, D width, K classes, h x w grid, N = h * w.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repsep_model.layers import ChannelNorm, pad_replicate


class LocalSeparation(nn.Module):
    """F' = norm(F + alpha * lambda * (F - B) + rho * (F - mean F)), B a content-adaptive smoothing of F.

    Starts as the identity (before the norm): lambda and rho are 0. With `uniform`, B is the plain neighbourhood mean.
    """

    def __init__(self, width: int, context: int, *, size: int = 5, groups: int = 4, uniform: bool = False) -> None:
        super().__init__()
        if width % groups:
            raise ValueError(f"local separation needs a width divisible by {groups}, got {width}")
        self.size, self.groups = size, groups
        self.kernel = None if uniform else nn.Conv2d(width, groups * size * size, 1)
        self.alpha = nn.Conv2d(width + context, 1, 1)
        self.lambda_ = nn.Parameter(torch.zeros(width, 1, 1))
        self.rho = nn.Parameter(torch.zeros(width, 1, 1))
        self.norm = ChannelNorm(width)

    def smooth(self, f_BDhw: Tensor) -> Tensor:
        """B: each location's own softmax kernel over its size x size neighbourhood."""
        B, D, h, w = f_BDhw.shape
        if self.kernel is None:
            return F.avg_pool2d(pad_replicate(f_BDhw, self.size // 2), self.size, stride=1)
        weights = self.kernel(f_BDhw).view(B, self.groups, 1, self.size**2, h, w).softmax(dim=3)
        padded = pad_replicate(f_BDhw, self.size // 2).view(B, self.groups, D // self.groups, h + self.size - 1, -1)
        # A loop over shifts reads views of one padded map; an unfold would hold size^2 copies of it.
        out = torch.zeros_like(f_BDhw).view(B, self.groups, D // self.groups, h, w)
        for i in range(self.size**2):
            y, x = divmod(i, self.size)
            out = out + weights[:, :, :, i] * padded[..., y : y + h, x : x + w]
        return out.view(B, D, h, w)

    def forward(self, f_BDhw: Tensor, context: Tensor, coarse_BKhw: Tensor | None) -> Tensor:
        alpha = 2 * torch.sigmoid(self.alpha(context))
        contrast = f_BDhw - self.smooth(f_BDhw)
        offset = f_BDhw - f_BDhw.mean(dim=(2, 3), keepdim=True)
        out: Tensor = self.norm(f_BDhw + alpha * self.lambda_ * contrast + self.rho * offset)
        return out


class RegionSeparation(nn.Module):
    """F' = norm(F + alpha * MLP([F, own, rival])): by the soft region it belongs to, and by the one it may be.

    p are the coarse logits' probabilities and c_k the regions' centres: own = sum_k p_k c_k, and rival is the same over
    p_k (1 - p_k) normalised, which leans to the classes that the location hesitates between.
    """

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.alpha = nn.Conv2d(width + context, 1, 1)
        self.mix = nn.Sequential(
            nn.Conv2d(3 * width, width, 1), ChannelNorm(width), nn.GELU(), nn.Conv2d(width, width, 1)
        )
        self.norm = ChannelNorm(width)

    def forward(self, f_BDhw: Tensor, context: Tensor, coarse_BKhw: Tensor | None) -> Tensor:
        assert coarse_BKhw is not None
        own, rival = own_and_rival(f_BDhw, coarse_BKhw)
        alpha = 2 * torch.sigmoid(self.alpha(context))
        mixed = self.mix(torch.cat([f_BDhw, own.to(f_BDhw.dtype), rival.to(f_BDhw.dtype)], dim=1))
        out: Tensor = self.norm(f_BDhw + alpha * mixed)
        return out


def own_and_rival(f_BDhw: Tensor, coarse_BKhw: Tensor) -> tuple[Tensor, Tensor]:
    """Both centres at each location, (B, D, h, w) in fp32: sums over thousands of locations are too long for bf16."""
    with torch.autocast(f_BDhw.device.type, enabled=False):
        f_BDN = f_BDhw.float().flatten(2)
        p_BKN = coarse_BKhw.float().softmax(dim=1).flatten(2)
        centres_BDK = f_BDN @ p_BKN.transpose(1, 2) / p_BKN.sum(dim=2).clamp_min(1e-6)[:, None]
        q_BKN = p_BKN * (1 - p_BKN)
        q_BKN = q_BKN / q_BKN.sum(dim=1, keepdim=True).clamp_min(1e-6)
        return (centres_BDK @ p_BKN).view(f_BDhw.shape), (centres_BDK @ q_BKN).view(f_BDhw.shape)
