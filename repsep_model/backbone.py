"""One adapter over timm: any vision transformer becomes four maps with their strides, at any image size.

Plain ViT: the tokens after L/4, L/2, 3L/4 and L blocks, prefix tokens removed. Pyramid ViT: its four stages.
Shapes: B batch, C_m channels and r_m stride of tap m, H x W pixels (multiples of `multiple`).
Credit: timm (Ross Wightman), whose verbs `forward_intermediates` and `prune_intermediate_layers` do the work.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

TAPS = 4


class Backbone(nn.Module):
    """A timm model reduced to its four taps.

    Raises ValueError for a name that timm does not know or a model that has no `forward_intermediates`.
    """

    model: Any  # timm's verbs are not part of nn.Module's type

    def __init__(self, name: str, *, pretrained: bool = False, drop_path: float = 0.0, args: Mapping[str, Any]) -> None:
        super().__init__()
        self.model = _create(name, pretrained=pretrained, drop_path=drop_path, args=args)
        if not hasattr(self.model, "forward_intermediates"):
            raise ValueError(
                f"backbone {name!r} gives no intermediate maps (timm's forward_intermediates); choose another"
            )
        info = list(self.model.feature_info)
        strides = [int(entry["reduction"]) for entry in info]
        self.plain = len(set(strides)) == 1
        self.taps = _plain_taps(len(info), name) if self.plain else list(range(len(info)))[-TAPS:]
        if len(self.taps) < TAPS:
            raise ValueError(f"backbone {name!r} has {len(info)} maps, {TAPS} are needed; choose a deeper one")
        self.strides = [strides[tap] for tap in self.taps]
        self.channels = [int(info[tap]["num_chs"]) for tap in self.taps]
        self.multiple = math.lcm(*self.strides)
        """Image sides must be multiples of this."""
        self.model.prune_intermediate_layers(self.taps, prune_norm=True, prune_head=True)

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Normalisation in 0..1 that the weights were trained with."""
        cfg = self.model.pretrained_cfg
        return tuple(cfg["mean"]), tuple(cfg["std"])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised (B, 3, H, W) -> four maps (B, C_m, H/r_m, W/r_m)."""
        maps: list[Tensor] = self.model.forward_intermediates(
            images, indices=self.taps, output_fmt="NCHW", intermediates_only=True
        )
        return maps


def _plain_taps(depth: int, name: str) -> list[int]:
    if depth < TAPS:
        raise ValueError(f"backbone {name!r} has {depth} blocks, at least {TAPS} are needed")
    return [depth * m // TAPS - 1 for m in range(1, TAPS + 1)]


def _create(name: str, *, pretrained: bool, drop_path: float, args: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name.split('_')[0]}*")[:5]
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"timm does not know a backbone called {name!r}{hint} (see timm.list_models())")
    flags: dict[str, Any] = {"drop_path_rate": drop_path}
    if "dynamic_img_size" in _constructor_parameters(name):
        flags["dynamic_img_size"] = True
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=0, **(flags | dict(args)))
    except (TypeError, RuntimeError) as error:
        if pretrained:
            raise ValueError(f"no pretrained weights for backbone {name!r}: {error}") from error
        raise ValueError(f"backbone {name!r} cannot be built with {dict(args)}: {error}") from error
    assert isinstance(model, nn.Module)
    return model


def _constructor_parameters(name: str) -> set[str]:
    """Parameters of the model's class: timm's entry points hide them behind **kwargs, so the module is asked."""
    with torch.device("meta"):
        return set(inspect.signature(type(timm.create_model(name, num_classes=0)).__init__).parameters)
