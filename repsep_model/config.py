"""What a segmentor is made of. One frozen record, saved beside the weights, from which the model can be built again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from repsep_model.labels import MAX_CLASSES

Separation = Literal["none", "local", "region"]

NO_BACKBONE_ARGS = {
    "num_classes": "the adapter, which takes the backbone without its head",
    "in_chans": "the adapter: images have 3 channels",
    "features_only": "the adapter, which takes the maps itself",
    "drop_path_rate": "drop_path",
    "pretrained": "build_segmentor(pretrained=...)",
}
"""Arguments of `timm.create_model` that `backbone_args` may not hold, with what sets them."""


@dataclass(frozen=True, kw_only=True)
class SegmentorConfig:
    """Architecture of a `Segmentor`; every field is an ablation switch or a size.

    The baseline "backbone + linear head" is `local_pathway=False, separation="none", cross_attention=0`. Controls, each
    of which takes one idea away and leaves the rest: `local_discrepancy=False`, `uniform_smoothing=True`,
    `attention_supervision=False`.
    """

    backbone: str
    """timm model name, for example `vit_base_patch16_224` or `pvt_v2_b0`."""

    num_classes: int
    """K, the number of classes (at most 255: 255 is the ignore index)."""

    backbone_args: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for `timm.create_model`, for example `{depth: 4}`."""

    width: int | None = None
    """D, channels of our parts; by default 256 on a plain ViT of 768 channels or more, otherwise 96."""

    stride: int = 8
    """s, pixels between the locations of our parts: 8, or 16 as the light preset."""

    drop_path: float = 0.1
    """Stochastic depth rate of the backbone in training."""

    local_pathway: bool = True
    """The second pathway that restores local detail."""

    local_discrepancy: bool = True
    """The pathway's discrepancy term; False is the control of the same parameters and cost that is given the
    neighbourhood's mean in its place."""

    uniform_smoothing: bool = False
    """The control whose neighbourhood means, those of the pathway and of `local` separation, are plain averages."""

    separation: Separation = "region"
    """How deep representations are separated: `none`, `local` or `region`."""

    cross_attention: int = 1
    """Layers of discriminative cross-attention; 0 leaves it out."""

    attention_supervision: bool = True
    """Whether training sees what the attention and region losses need; False is the control without them."""

    mean: tuple[float, float, float] | None = None
    """Per-channel mean in 0..1; by default what the backbone was trained with."""

    std: tuple[float, float, float] | None = None
    """Per-channel standard deviation in 0..1; by default what the backbone was trained with."""

    window: int = 512
    """Side in pixels of the sliding window: that of training's crops."""

    def __post_init__(self) -> None:
        for name in ("mean", "std"):
            value = getattr(self, name)
            if value is not None:
                if len(value) != 3:
                    raise ValueError(f"{name} needs 3 values, one per channel, got {value!r}")
                object.__setattr__(self, name, tuple(float(v) for v in value))
        for name in self.backbone_args:
            if name in NO_BACKBONE_ARGS:
                raise ValueError(f"backbone_args may not hold {name}: it is set by {NO_BACKBONE_ARGS[name]}")
        if type(self.num_classes) is not int:  # NumPy's integers could not be saved as JSON
            raise ValueError(f"num_classes must be an int, got {self.num_classes!r}")
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(f"num_classes must be 1 to {MAX_CLASSES}, got {self.num_classes}")
        if self.stride not in (4, 8, 16, 32):
            raise ValueError(f"stride must be 4, 8, 16 or 32, got {self.stride}")
        if self.separation not in get_args(Separation):
            raise ValueError(f"separation must be one of {get_args(Separation)}, got {self.separation!r}")
        if self.cross_attention < 0:
            raise ValueError(f"cross_attention counts layers: 0 or more, got {self.cross_attention}")
        if self.width is not None and self.width < 8:
            raise ValueError(f"width must be at least 8, got {self.width}")
        if not 0 <= self.drop_path < 1:
            raise ValueError(f"drop_path must be 0 or more and under 1, got {self.drop_path}")
        if self.window < 1:
            raise ValueError(f"window must be at least 1, got {self.window}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values that JSON can hold."""
        return asdict(self) | {"backbone_args": dict(self.backbone_args)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SegmentorConfig:
        """The inverse of `to_dict`; an unknown key is a ValueError, for it means a newer or foreign file."""
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(values) - known):
            raise ValueError(f"unknown segmentor setting {', '.join(unknown)}; known: {', '.join(sorted(known))}")
        return cls(**values)
