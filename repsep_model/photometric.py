"""Colour jitter of 8-bit RGB images, the same as torchvision's to one level of 255, at a fraction of its cost.

Brightness and contrast are tables of 256 entries, saturation a blend, all three in Pillow's loops over bytes; hue is
turned in RGB: value and chroma stay, so only where the channels stand between least and greatest has to be computed.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

GREY = np.array([0.2989, 0.587, 0.114])
"""Weight of red, green and blue in what torchvision takes for grey."""


def adjust_brightness(image: Image.Image, factor: float) -> Image.Image:
    """Every channel times the factor."""
    return image.point(_table(factor, 0.0) * 3)


def adjust_contrast(image: Image.Image, factor: float) -> Image.Image:
    """Away from the mean grey by the factor."""
    counts = np.array(image.histogram(), np.float64).reshape(3, 256)
    # Grey pixels are rounded down before their mean is taken, by half a level on average.
    mean = float(GREY @ (counts @ np.arange(256))) / (image.width * image.height) - 0.5
    return image.point(_table(factor, (1 - factor) * max(mean, 0.0)) * 3)


def adjust_saturation(image: Image.Image, factor: float) -> Image.Image:
    """Away from each pixel's own grey by the factor."""
    return Image.blend(image.convert("L").convert("RGB"), image, factor)


def adjust_hue(image: Image.Image, turn: float) -> Image.Image:
    """Hue turned by a share of the full circle, -0.5 to 0.5; value and saturation stay."""
    red, green, blue = (np.asarray(channel).astype(np.float32) for channel in image.split())
    greatest, least = np.maximum(np.maximum(red, green), blue), np.minimum(np.minimum(red, green), blue)
    chroma = greatest - least
    scale = np.float32(1) / np.maximum(chroma, 1)
    sector = 4 + (red - green) * scale  # 0 is red, 2 green, 4 blue
    np.copyto(sector, 2 + (blue - red) * scale, where=greatest == green)
    np.copyto(sector, (green - blue) * scale, where=greatest == red)
    sector += np.float32(6 * turn)
    least += np.float32(0.5)
    channels = []
    for centre in (0, 2, 4):
        away = np.abs(sector - np.float32(centre))
        away = np.abs(np.float32(3) - np.abs(np.float32(3) - away))  # round the circle, the shorter way
        level = np.clip(np.float32(2) - away, 0, 1)
        level *= chroma
        level += least
        channels.append(Image.fromarray(level.astype(np.uint8)))
    return Image.merge("RGB", channels)


def _table(factor: float, offset: float) -> list[int]:
    """What becomes of each level, rounded down as torchvision does."""
    levels = np.arange(256, dtype=np.float32) * np.float32(factor) + np.float32(offset)
    found: list[int] = np.clip(levels, 0, 255).astype(np.uint8).tolist()
    return found
