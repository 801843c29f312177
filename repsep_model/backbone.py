"""One adapter over timm: any vision transformer becomes four maps with their strides, at any image size.

Plain ViT: the tokens after L/4, L/2, 3L/4 and L blocks, prefix tokens removed. Pyramid ViT: its four stages.

What sizes a family takes is asked of the model itself, by forward passes on the meta device, not kept in a list of
families: most take any multiple of their coarsest stride, window-based ones (MaxViT) multiples of their window's extent
in pixels, and those with position tables for one size (BEiT, CoAtNet, Hiera, MViTv2) that size only. The last get the
image in tiles of their size; nothing is resized, so nothing is distorted.
Shapes: B batch, C_m channels and r_m stride of tap m, H x W pixels (multiples of `multiple`).
Credit: timm (Ross Wightman), whose verbs `forward_intermediates` and `prune_intermediate_layers` do the work.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Mapping
from typing import Any

import timm
import torch
from torch import Tensor, nn

TAPS = 4

INDEXED = ("mvitv2",)
"""timm's files of models that read position tables by index: on the meta device, where nothing has a value, any size
would seem to do. They are held to their own size."""


class Backbone(nn.Module):
    """A timm model reduced to its four taps.

    Raises ValueError for a name that timm does not know, a model without `forward_intermediates`, or one that gives
    no maps at any size that is tried.
    """

    model: Any  # timm's verbs are not part of nn.Module's type

    def __init__(self, name: str, *, drop_path: float = 0.0, args: Mapping[str, Any]) -> None:
        super().__init__()
        args = _known_arguments(name, args, drop_path)
        self.model = _create(name, args)
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
        with torch.device("meta"):
            probe = _create(name, args)
        self.multiple, self.window = self._sizes(name, probe, args)
        """Image sides must be multiples of `multiple`; `window` is the one side that the model takes, if it is one."""
        self.model.prune_intermediate_layers(self.taps, prune_norm=True, prune_head=True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """timm's verb. Raises ValueError for a model that has no such thing."""
        try:
            self.model.set_grad_checkpointing(enable)
        except (AttributeError, AssertionError) as error:
            if enable:
                name = self.model.pretrained_cfg["architecture"]
                raise ValueError(f"backbone {name!r} has no gradient checkpointing; leave it off") from error

    @property
    def mean_std(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Normalisation in 0..1 that the weights were trained with."""
        cfg = self.model.pretrained_cfg
        return tuple(cfg["mean"]), tuple(cfg["std"])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Normalised (B, 3, H, W) -> four maps (B, C_m, H/r_m, W/r_m)."""
        if self.window is None or images.shape[-2:] == (self.window, self.window):
            return self._maps(self.model, images)
        rows, columns = images.shape[-2] // self.window, images.shape[-1] // self.window
        return [_join_tiles(tap, rows, columns) for tap in self._maps(self.model, _split_tiles(images, rows, columns))]

    def _maps(self, model: Any, images: Tensor) -> list[Tensor]:
        maps: list[Tensor] = model.forward_intermediates(
            images, indices=self.taps, output_fmt="NCHW", intermediates_only=True
        )
        return maps

    def _sizes(self, name: str, probe: Any, args: Mapping[str, Any]) -> tuple[int, int | None]:
        """(multiple, window) that `probe`, a copy on the meta device, accepts."""
        free = math.lcm(*self.strides)
        height, width = _native_size(probe, args)
        indexed = type(probe).__module__.rpartition(".")[2] in INDEXED
        if not indexed and self._accepts(probe, 2 * free, 3 * free) and self._accepts(probe, free, free):
            return free, None
        if height != width:
            raise ValueError(f"backbone {name!r} is built for {height} x {width} pixels only; give a square img_size")
        if not indexed and self._accepts(probe, 2 * height, 3 * height):
            return height, None
        if self._accepts(probe, height, height):
            return height, height
        raise ValueError(f"backbone {name!r} gives no maps of strides {self.strides}; choose another")

    def _accepts(self, probe: Any, height: int, width: int) -> bool:
        try:
            with torch.device("meta"), torch.no_grad():
                maps = self._maps(probe.eval(), torch.empty(1, 3, height, width))
        except (AssertionError, RuntimeError, ValueError, IndexError):
            return False
        expected = [(height // stride, width // stride) for stride in self.strides]
        return [tuple(m.shape[-2:]) for m in maps] == expected


def _split_tiles(images: Tensor, rows: int, columns: int) -> Tensor:
    """(B, 3, rows * S, columns * S) -> (B * rows * columns, 3, S, S)."""
    B, C, H, W = images.shape
    tiles = images.reshape(B, C, rows, H // rows, columns, W // columns).permute(0, 2, 4, 1, 3, 5)
    return tiles.reshape(B * rows * columns, C, H // rows, W // columns)


def _join_tiles(tiles: Tensor, rows: int, columns: int) -> Tensor:
    """(B * rows * columns, C, h, w) -> (B, C, rows * h, columns * w)."""
    C, h, w = tiles.shape[1:]
    return tiles.reshape(-1, rows, columns, C, h, w).permute(0, 3, 1, 4, 2, 5).reshape(-1, C, rows * h, columns * w)


def _plain_taps(depth: int, name: str) -> list[int]:
    if depth < TAPS:
        raise ValueError(f"backbone {name!r} has {depth} blocks, at least {TAPS} are needed")
    return [depth * m // TAPS - 1 for m in range(1, TAPS + 1)]


def _native_size(model: Any, args: Mapping[str, Any]) -> tuple[int, int]:
    """(height, width) that the model was built for."""
    known = getattr(getattr(model, "patch_embed", model), "img_size", None)
    size = args.get("img_size") or known or model.pretrained_cfg["input_size"][1:]
    return (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))


def _known_arguments(name: str, args: Mapping[str, Any], drop_path: float) -> dict[str, Any]:
    """The arguments, with drop path and timm's switch for images of any size where the model's class has them.

    timm's entry points hide the parameters behind **kwargs, so the class of a model is asked.
    """
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise ValueError(f"timm does not know a backbone called {name!r}{hint} (see timm.list_models())")
    with torch.device("meta"):
        parameters = inspect.signature(type(_create(name, {})).__init__).parameters
    known = {"dynamic_img_size": True, "drop_path_rate": drop_path}
    return {key: value for key, value in known.items() if key in parameters} | dict(args)


def _create(name: str, args: Mapping[str, Any]) -> nn.Module:
    try:
        model = timm.create_model(name, num_classes=0, **args)
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise ValueError(f"backbone {name!r} cannot be built with {dict(args)}: {error}") from error
    assert isinstance(model, nn.Module)
    return model
