"""Discriminative cross-attention: class queries gather regions that compete for each location.

The paper (arXiv 2212.13764) gives the name and the purpose, more discriminative region representations through
auxiliary supervision; the inside is ours.
Shapes: B batch, D width, K classes, h x w grid, N = h * w.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from repsep_model.layers import ChannelNorm


@dataclass(frozen=True)
class Regions:
    """What cross-attention finds: region vectors of length 1, class scores, and the last layer's attention."""

    regions_BKD: Tensor
    scores_BKhw: Tensor
    attention_BKhw: Tensor


class CrossAttentionLayer(nn.Module):
    """One exchange between K queries and N locations."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm = nn.LayerNorm(width)
        self.query = nn.Linear(width, width)
        self.key_value = nn.Conv2d(width, 2 * width, 1)
        self.ffn = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, queries_BKD: Tensor, f_BDhw: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the queries that have read their regions, (B, K, D), and the attention logits (B, K, N)."""
        key_BDN, value_BDN = self.key_value(f_BDhw).flatten(2).chunk(2, dim=1)
        query_BKD = self.query(self.query_norm(queries_BKD))
        attention_BKN = (query_BKD @ key_BDN).float() * query_BKD.shape[-1] ** -0.5
        share_BKN = attention_BKN.softmax(dim=1)  # over classes: regions compete for each location
        weight_BKN = share_BKN / share_BKN.sum(dim=2, keepdim=True).clamp_min(1e-6)
        regions_BKD = weight_BKN.to(value_BDN.dtype) @ value_BDN.transpose(1, 2)
        queries_BKD = queries_BKD + regions_BKD
        return queries_BKD + self.ffn(queries_BKD), attention_BKN


class DiscriminativeCrossAttention(nn.Module):
    """F' -> class scores tau * cos(R_k, embed(F')) + presence(R_k), to be added to a linear classifier's.

    R_k is the projection of class k's query after the last layer: what the class looks like in this image. What all
    regions share is taken out of them, and what all locations share out of these, before they are compared: else each
    region is mostly the image's mean, and the cosines hardly differ. `presence` says whether the class is there at all:
    the region of one that is absent is made of what it is confused with.
    """

    def __init__(self, width: int, num_classes: int, layers: int, *, tau: float = 4.0) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(num_classes, width) * 0.02)
        self.layers = nn.ModuleList(CrossAttentionLayer(width) for _ in range(layers))
        self.region_norm = nn.LayerNorm(width)
        self.region = nn.Linear(width, width)
        self.embed = nn.Sequential(ChannelNorm(width), nn.Conv2d(width, width, 1))
        self.tau = nn.Parameter(torch.tensor([tau]))  # one value, but no scalar: fully_shard takes none
        self.presence = nn.Linear(width, 1)
        nn.init.zeros_(self.presence.weight)
        nn.init.zeros_(self.presence.bias)

    def forward(self, f_BDhw: Tensor) -> Regions:
        B, _, h, w = f_BDhw.shape
        queries_BKD = self.queries.expand(B, -1, -1)
        for layer in self.layers:
            queries_BKD, attention_BKN = layer(queries_BKD, f_BDhw)
        found_BKD = self.region_norm(queries_BKD)
        regions_BKD = self.region(found_BKD).float()
        regions_BKD = F.normalize(regions_BKD - regions_BKD.mean(dim=1, keepdim=True), dim=2)
        embedded_BDN = self.embed(f_BDhw).flatten(2).float()
        embedded_BDN = F.normalize(embedded_BDN - embedded_BDN.mean(dim=2, keepdim=True), dim=1)
        scores_BKN = self.tau * (regions_BKD @ embedded_BDN) + self.presence(found_BKD).float()
        return Regions(regions_BKD, scores_BKN.view(B, -1, h, w), attention_BKN.view(B, -1, h, w))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        name = f"{prefix}tau"
        if name in state_dict:  # models that were saved with a scalar
            state_dict[name] = state_dict[name].reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
