"""Paired image and mask augmentation, the counter-based randomness behind it, and which classes are shown more often.

Every random number of a sample comes from `sample_rng(seed, epoch, index)`: nothing depends on which worker or thread
asks.
Shapes: H x W pixels of the source, S the crop's side, K classes.
Credits: the crop's largest class share after mmsegmentation's cat_max_ratio, photometric distortion after SSD (Liu et
al. 2016), rare-class sampling after DAFormer (Hoyer et al. 2022).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, floor

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from repsep_model import photometric
from repsep_model.images import UInt8
from repsep_model.labels import IGNORE_INDEX

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]

CROP_TRIES = 10


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Training augmentation: scale jitter, crop, flip, photometric distortion."""

    crop: int
    """S, side of the square crop in pixels."""
    scale: tuple[float, float] = (0.5, 2.0)
    """Range of the random scale, drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    photometric: float = 0.5
    """Probability of each of brightness, contrast, saturation and hue jitter."""
    max_class_share: float = 0.75
    """A crop in which one class has more of the labelled pixels, or which has none, is drawn again, up to 10 times."""

    def __post_init__(self) -> None:
        if self.crop < 1:
            raise ValueError(f"crop must be at least 1, got {self.crop}")
        low, high = self.scale
        if not 0 < low <= high:
            raise ValueError(f"scale is a range of factors over 0, low then high, got {self.scale}")
        for name in ("flip", "photometric"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name} is a probability in 0..1, got {value}")


def sample_rng(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The generator of one sample in one epoch; a function of its arguments only (Philox, counter-based)."""
    key = np.array([seed & (2**64 - 1), (epoch << 40) + index], dtype=np.uint64)  # a list would pass through float64
    return np.random.Generator(np.random.Philox(key=key))


def class_probabilities(pixels: Sequence[int], temperature: float) -> Floats:
    """(K,) how often to draw each class: in proportion to exp((1 - its share of `pixels`) / temperature).

    The lower the temperature, the more often the rare ones; DAFormer takes 0.01. A class without a pixel has 0.
    """
    counts = np.asarray(pixels, np.float64)
    share = counts / max(counts.sum(), 1)
    rarest = share.min(where=counts > 0, initial=1)
    # Relative to the rarest class, whose weight is 1: exp(1 / 0.001) would overflow.
    weights: Floats = np.exp(np.where(counts > 0, (rarest - share) / temperature, -np.inf))
    return weights / max(float(weights.sum()), 1)


def augment(
    image: UInt8, mask: UInt8, rng: np.random.Generator, how: Augmentation, fill: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """(H, W, 3) and (H, W) uint8 -> (3, S, S) and (S, S) uint8. Pads with the mean colour `fill` and IGNORE_INDEX.

    The same as to scale the whole image and then to cut the crop from it; only what the crop shows is computed.
    """
    height, width = mask.shape
    scale = float(np.exp(rng.uniform(*np.log(how.scale))))
    rows, columns = (_centres(n, max(1, round(n * scale))) for n in (height, width))
    top, left = _choose_crop(mask, rows, columns, how, rng)
    side = how.crop
    labels = _taken(mask, rows[top : top + side], columns[left : left + side])
    box = (top, top + labels.shape[0], left, left + labels.shape[1])
    flip = rng.random() < how.flip
    pixels = np.asarray(_photometric(_scaled(image, (len(rows), len(columns)), box), rng, how.photometric))
    if labels.shape != (side, side):
        pixels, labels = (
            _padded(pixels, side, np.asarray(fill, np.uint8)),
            _padded(labels, side, np.uint8(IGNORE_INDEX)),
        )
    if flip:
        pixels, labels = pixels[:, ::-1], labels[:, ::-1]
    # Copied where they are Pillow's or turned: torch wants memory that is contiguous and writable.
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), torch.from_numpy(labels.copy())


def canvas(image: UInt8, multiple: int, fill: Sequence[int]) -> UInt8:
    """The image at the top left of a canvas whose sides are multiples of `multiple`, filled with the mean colour."""
    height, width = image.shape[:2]
    if height % multiple == 0 and width % multiple == 0:
        return image
    out = np.empty((height + -height % multiple, width + -width % multiple, 3), np.uint8)
    out[:] = np.asarray(fill, np.uint8)
    out[:height, :width] = image
    return out


def _centres(source: int, target: int) -> Indices:
    """(target,): the source's row in which the middle of each scaled row lies.

    To take the rows at their corners, as many resize functions do, leaves the labels half a pixel beside the image.
    """
    return (2 * np.arange(target) + 1) * source // (2 * target)


def _taken(mask: UInt8, rows: Indices, columns: Indices) -> UInt8:
    return mask[rows].take(columns, axis=1)


def _choose_crop(
    mask: UInt8, rows: Indices, columns: Indices, how: Augmentation, rng: np.random.Generator
) -> tuple[int, int]:
    """Top and left of the crop in the scaled mask, which these rows and columns make."""
    for _ in range(CROP_TRIES):
        top = int(rng.integers(max(len(rows) - how.crop, 0) + 1))
        left = int(rng.integers(max(len(columns) - how.crop, 0) + 1))
        crop = _taken(mask, rows[top : top + how.crop], columns[left : left + how.crop])
        counts = Image.fromarray(crop).histogram()[:IGNORE_INDEX]
        total = sum(counts)
        if total and max(counts) <= how.max_class_share * total:
            break
    return top, left


def _scaled(image: UInt8, size: tuple[int, int], box: tuple[int, int, int, int]) -> Image.Image:
    """The box (top, bottom, left, right) of the image scaled to `size`: bilinear, antialiased where it shrinks."""
    top, bottom, left, right = box
    if size == image.shape[:2]:
        return Image.fromarray(np.ascontiguousarray(image[top:bottom, left:right]))
    first_row, last_row, above, below = _window(top, bottom, size[0], image.shape[0])
    first_column, last_column, before, behind = _window(left, right, size[1], image.shape[1])
    part = Image.fromarray(np.ascontiguousarray(image[first_row:last_row, first_column:last_column]))
    return part.resize((right - left, bottom - top), Image.Resampling.BILINEAR, (before, above, behind, below))


def _window(start: int, stop: int, target: int, source: int) -> tuple[int, int, float, float]:
    """What of the source's rows the scaled rows start..stop-1 need, and where within it they begin and end."""
    factor = source / target
    reach = max(factor, 1) + 1  # of the bilinear filter, and one for rounding
    first, last = max(0, floor(start * factor - reach)), min(source, ceil(stop * factor + reach))
    return first, last, start * factor - first, min(stop * factor - first, last - first)


def _padded(array: UInt8, side: int, value: UInt8 | np.uint8) -> UInt8:
    out = np.empty((side, side, *array.shape[2:]), np.uint8)
    out[:] = value
    out[: array.shape[0], : array.shape[1]] = array
    return out


def _photometric(image: Image.Image, rng: np.random.Generator, probability: float) -> Image.Image:
    """Brightness, contrast, saturation and hue, each with `probability`; contrast before or after the last two.

    The order is SSD's, the ranges are milder.
    """
    draws = rng.random(4) < probability
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, 3).tolist()
    hue = float(rng.uniform(-0.05, 0.05))
    contrast_first = rng.random() < 0.5
    if draws[0]:
        image = photometric.adjust_brightness(image, brightness)
    if draws[1] and contrast_first:
        image = photometric.adjust_contrast(image, contrast)
    if draws[2]:
        image = photometric.adjust_saturation(image, saturation)
    if draws[3]:
        image = photometric.adjust_hue(image, hue)
    if draws[1] and not contrast_first:
        image = photometric.adjust_contrast(image, contrast)
    return image
