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

import numpy as np
import torch
import torchvision.transforms.v2.functional as TF
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import InterpolationMode

from repsep_model.images import UInt8
from repsep_model.labels import IGNORE_INDEX

Floats = NDArray[np.float64]

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
    """(H, W, 3) and (H, W) uint8 -> (3, S, S) and (S, S) uint8. Pads with the mean colour `fill` and IGNORE_INDEX."""
    height, width = mask.shape
    scale = float(np.exp(rng.uniform(*np.log(how.scale))))
    size = [max(1, round(height * scale)), max(1, round(width * scale))]
    # Read-only memory, such as a memory map's, is copied: torch wants it writable.
    pixels = torch.from_numpy(np.require(image, requirements=["C", "W"])).permute(2, 0, 1)
    labels = torch.from_numpy(np.require(mask, requirements=["C", "W"]))[None]
    if size != [height, width]:
        pixels = TF.resize(pixels, size, InterpolationMode.BILINEAR, antialias=scale < 1)
        # Plain NEAREST takes the corners of pixels for their centres: labels half a pixel beside the image.
        labels = TF.resize(labels, size, InterpolationMode.NEAREST_EXACT)
    top, left = _choose_crop(labels[0].numpy(), how, rng)
    side = how.crop
    pixels, labels = pixels[:, top : top + side, left : left + side], labels[:, top : top + side, left : left + side]
    flip = rng.random() < how.flip
    pixels = _photometric(pixels, rng, how.photometric)
    below, right = side - pixels.shape[1], side - pixels.shape[2]
    if below or right:
        padded = torch.tensor(fill, dtype=torch.uint8).view(3, 1, 1).repeat(1, side, side)
        padded[:, : side - below, : side - right] = pixels
        pixels = padded
        labels = TF.pad(labels, [0, 0, right, below], fill=[IGNORE_INDEX])
    if flip:
        pixels, labels = pixels.flip(2), labels.flip(2)
    return pixels.contiguous(), labels[0].contiguous()


def canvas(image: UInt8, multiple: int, fill: Sequence[int]) -> UInt8:
    """The image at the top left of a canvas whose sides are multiples of `multiple`, filled with the mean colour."""
    height, width = image.shape[:2]
    if height % multiple == 0 and width % multiple == 0:
        return image
    out = np.empty((height + -height % multiple, width + -width % multiple, 3), np.uint8)
    out[:] = np.asarray(fill, np.uint8)
    out[:height, :width] = image
    return out


def _choose_crop(scaled: UInt8, how: Augmentation, rng: np.random.Generator) -> tuple[int, int]:
    for _ in range(CROP_TRIES):
        top = int(rng.integers(max(scaled.shape[0] - how.crop, 0) + 1))
        left = int(rng.integers(max(scaled.shape[1] - how.crop, 0) + 1))
        crop = scaled[top : top + how.crop, left : left + how.crop]
        counts: NDArray[np.int64] = np.bincount(crop.ravel(), minlength=256)[:IGNORE_INDEX]
        if counts.sum() and counts.max() <= how.max_class_share * counts.sum():
            break
    return top, left


def _photometric(pixels: Tensor, rng: np.random.Generator, probability: float) -> Tensor:
    """Brightness, contrast, saturation and hue, each with `probability`; contrast before or after the last two.

    The order is SSD's, the ranges are milder.
    """
    draws = rng.random(4) < probability
    brightness, contrast, saturation = rng.uniform(0.7, 1.3, 3)
    hue = rng.uniform(-0.05, 0.05)
    contrast_first = rng.random() < 0.5
    if draws[0]:
        pixels = TF.adjust_brightness(pixels, float(brightness))
    if draws[1] and contrast_first:
        pixels = TF.adjust_contrast(pixels, float(contrast))
    if draws[2]:
        pixels = TF.adjust_saturation(pixels, float(saturation))
    if draws[3]:
        pixels = TF.adjust_hue(pixels, float(hue))
    if draws[1] and not contrast_first:
        pixels = TF.adjust_contrast(pixels, float(contrast))
    return pixels
