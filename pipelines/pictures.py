"""Pictures of what a model saw: image, labels and prediction side by side, in the dataset's colours."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from repsep_model.images import UInt8, overlay

Colours = Sequence[Sequence[int]]
Sample = tuple[UInt8, UInt8, UInt8]
"""Image (H, W, 3), mask (H, W) and predicted labels (H, W)."""


def triptych(sample: Sample, colours: Colours, *, side: int | None = None) -> UInt8:
    """(h, 3w, 3) uint8; with `side` made smaller first, until neither height nor width is larger."""
    photo, *ids = (Image.fromarray(part) for part in sample)
    if side is not None:
        photo.thumbnail((side, side))
    image, *ids_hw = (
        np.asarray(part.resize(photo.size, Image.Resampling.NEAREST) if part.size != photo.size else part)
        for part in (photo, *ids)
    )
    return np.hstack([image, *(overlay(image, hw, colours) for hw in ids_hw)])


def stacked(pictures: Sequence[UInt8], *, gap: int = 4) -> UInt8:
    """Pictures of any size (h, w, 3) below each other on white, `gap` pixels apart."""
    width = max(picture.shape[1] for picture in pictures)
    rows = [np.pad(p, ((0, gap), (0, width - p.shape[1]), (0, 0)), constant_values=255) for p in pictures]
    return np.concatenate(rows)[:-gap]


def encoded(picture: UInt8, format: str) -> bytes:
    """As a PNG, or as a JPEG that is small."""
    out = io.BytesIO()
    Image.fromarray(picture).save(out, format, **({"quality": 88} if format == "JPEG" else {}))
    return out.getvalue()
