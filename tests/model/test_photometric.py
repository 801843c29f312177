"""Colour jitter is torchvision's, to one level of 255."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as TF
from PIL import Image

from repsep_model import photometric
from repsep_model.images import UInt8


def pictures() -> list[UInt8]:
    """Noise, all greys, pure colours, a dark and a bright ramp."""
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 256, (64, 80, 3)).astype(np.uint8)
    grey = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    pure = np.array(np.meshgrid(*[[0, 1, 127, 254, 255]] * 3), np.uint8).reshape(3, 25, 5).transpose(1, 2, 0).copy()
    return [noise, grey, pure, noise // 16, 255 - noise // 16, np.zeros((1, 1, 3), np.uint8)]


@pytest.mark.parametrize(
    ("name", "factors"),
    [
        ("brightness", [0.7, 0.93, 1.0, 1.3]),
        ("contrast", [0.7, 0.93, 1.0, 1.3]),
        ("saturation", [0.7, 0.93, 1.0, 1.3]),
        ("hue", [-0.5, -0.05, -0.013, 0.0, 0.02, 0.05, 0.31]),
    ],
)
def test_every_adjustment_is_torchvisions_to_one_level(name: str, factors: list[float]) -> None:
    ours, theirs = getattr(photometric, f"adjust_{name}"), getattr(TF, f"adjust_{name}")
    for picture in pictures():
        for factor in factors:
            found = np.asarray(ours(Image.fromarray(picture), factor)).astype(int)
            expected = theirs(torch.from_numpy(picture).permute(2, 0, 1), factor).permute(1, 2, 0).numpy()
            assert np.abs(found - expected).max() <= 1, (name, factor)


def test_turning_the_hue_by_a_third_moves_the_channels() -> None:
    picture = pictures()[0]
    turned = np.asarray(photometric.adjust_hue(Image.fromarray(picture), 1 / 3))
    assert np.abs(turned.astype(int) - np.roll(picture, 1, axis=2)).max() <= 1
