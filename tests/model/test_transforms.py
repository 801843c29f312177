"""Augmentation: image and mask stay together, and every random number follows from (seed, epoch, index).

Shapes: H x W pixels of the source, S the crop's side.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms.v2.functional as TF
from torch import Tensor
from torchvision.transforms import InterpolationMode

from repsep_model import photometric
from repsep_model.images import UInt8
from repsep_model.labels import IGNORE_INDEX
from repsep_model.transforms import Augmentation, augment, canvas, class_probabilities, sample_rng

FILL = (120, 110, 100)
GEOMETRY = Augmentation(crop=64, photometric=0.0)
UNSCALED = Augmentation(crop=64, scale=(1.0, 1.0), photometric=0.0)


def blocks(height: int = 150, width: int = 200) -> tuple[UInt8, UInt8]:
    """Blocks of classes 0..4, some ignored; the red channel is 40 times the class (250 where ignored)."""
    rng = np.random.default_rng(0)
    mask: UInt8 = rng.choice(np.array([0, 1, 2, 3, 4, IGNORE_INDEX], np.uint8), (height // 25 + 1, width // 25 + 1))
    mask = mask.repeat(25, axis=0).repeat(25, axis=1)[:height, :width]
    image = rng.integers(0, 256, (height, width, 3)).astype(np.uint8)
    image[..., 0] = np.where(mask == IGNORE_INDEX, 250, mask * 40)
    return image, mask


def coordinates(height: int = 150, width: int = 200) -> tuple[UInt8, UInt8]:
    """Red and green say where a pixel comes from; the mask follows from them."""
    y, x = np.mgrid[:height, :width]
    image = np.stack([y, x, 0 * x], axis=2).astype(np.uint8)
    return image, ((3 * y + 5 * x) % 7).astype(np.uint8)


def crop(
    source: tuple[UInt8, UInt8], how: Augmentation, *, index: int = 0, fill: Sequence[int] = FILL
) -> tuple[Tensor, Tensor]:
    return augment(*source, sample_rng(0, 0, index), how, fill)


def test_the_same_seed_epoch_and_index_give_the_same_sample_in_any_order() -> None:
    how = Augmentation(crop=64)
    keys = list(itertools.product([0, 1], [0, 3], [0, 9]))
    forward = {key: augment(*blocks(), sample_rng(*key), how, FILL) for key in keys}
    for key in reversed(keys):
        image, labels = augment(*blocks(), sample_rng(*key), how, FILL)
        assert torch.equal(image, forward[key][0])
        assert torch.equal(labels, forward[key][1])


def test_each_of_seed_epoch_and_index_changes_the_sample() -> None:
    draws = {sample_rng(*key).random() for key in itertools.product([0, 1, -1], [0, 1, 2], [0, 1, 2**39])}
    assert len(draws) == 27


def test_large_and_negative_seeds_keep_all_their_bits() -> None:
    seeds = [0, 5, 2**63, 2**63 + 1, 2**64 - 2, -1]
    assert len({sample_rng(seed, 0, 0).random() for seed in seeds}) == len(seeds)


def test_known_seed_draws_the_same_numbers_on_every_platform() -> None:
    assert sample_rng(0, 0, 0).integers(0, 2**32, 3).tolist() == [149215387, 49592932, 2628306354]


@pytest.mark.parametrize("size", [(150, 200), (64, 64), (40, 100), (30, 20)])
def test_output_is_square_uint8_whatever_the_source(size: tuple[int, int]) -> None:
    for index in range(4):
        image, labels = crop(blocks(*size), Augmentation(crop=64), index=index)
        assert (image.shape, labels.shape) == ((3, 64, 64), (64, 64))
        assert (image.dtype, labels.dtype) == (torch.uint8, torch.uint8)
        assert image.is_contiguous()
        assert labels.is_contiguous()


def test_unscaled_crop_is_a_piece_of_the_source_with_its_own_labels() -> None:
    flipped = 0
    for index in range(8):
        image, labels = crop(coordinates(), UNSCALED, index=index)
        y, x = image[0].long(), image[1].long()
        assert torch.equal(labels.long(), (3 * y + 5 * x) % 7)
        assert torch.equal(y[:, 0] - y[0, 0], torch.arange(64))
        step = int(x[0, 1] - x[0, 0])
        assert torch.equal(x[0] - x[0, 0], step * torch.arange(64))
        flipped += step == -1
    assert 0 < flipped < 8


def test_scaled_image_and_mask_stay_aligned() -> None:
    """Where all labels around a pixel agree, resampling cannot have mixed anything else in."""
    scales = set()
    for index in range(12):
        image, labels = crop(blocks(), GEOMETRY, index=index)
        around = F.pad(labels[None, None].float(), [2] * 4, mode="replicate")
        pure = (F.max_pool2d(around, 5, stride=1) == -F.max_pool2d(-around, 5, stride=1))[0, 0]
        pure &= (image != torch.tensor(FILL).view(3, 1, 1)).any(dim=0)
        expected = torch.where(labels == IGNORE_INDEX, 250, labels * 40)
        assert torch.equal(image[0][pure], expected[pure])
        scales.add(int(pure.sum()))
        assert pure.float().mean() > 0.3
    assert len(scales) > 6


def resized_then_cropped(
    source: tuple[UInt8, UInt8], rng: np.random.Generator, how: Augmentation
) -> tuple[Tensor, Tensor]:
    """The reference, by torchvision: scale all of it, cut the crop out, pad, flip. No photometric distortion."""
    image, mask = source
    scale = float(np.exp(rng.uniform(*np.log(how.scale))))
    size = [max(1, round(n * scale)) for n in mask.shape]
    pixels = TF.resize(torch.from_numpy(image).permute(2, 0, 1), size, InterpolationMode.BILINEAR, antialias=True)
    labels = TF.resize(torch.from_numpy(mask)[None], size, InterpolationMode.NEAREST_EXACT)
    for _ in range(10):
        top, left = (int(rng.integers(max(n - how.crop, 0) + 1)) for n in size)
        window = (..., slice(top, top + how.crop), slice(left, left + how.crop))
        counts = torch.bincount(labels[window].flatten(), minlength=256)[:IGNORE_INDEX]
        if counts.sum() and counts.max() <= how.max_class_share * counts.sum():
            break
    right_and_below = [0, 0, max(how.crop - size[1], 0), max(how.crop - size[0], 0)]
    cut = torch.cat([pixels[window].float(), labels[window].float()])
    filled = torch.stack([TF.pad(c[None], right_and_below, fill=f)[0] for c, f in zip(cut, (*FILL, 255), strict=True)])
    if rng.random() < how.flip:
        filled = filled.flip(2)
    return filled[:3].byte(), filled[3].byte()


@pytest.mark.parametrize("size", [(149, 211), (97, 64), (361, 479), (50, 300), (17, 23)])
def test_only_scaling_the_crop_is_the_same_as_scaling_all_of_it(size: tuple[int, int]) -> None:
    for index in range(12):
        how = replace(GEOMETRY, scale=(0.3, 2.5))
        pixels, labels = crop(blocks(*size), how, index=index)
        expected = resized_then_cropped(blocks(*size), sample_rng(0, 0, index), how)
        difference = (pixels.int() - expected[0].int()).abs()
        assert difference.max() <= 2, "the image is computed in whole levels twice, once for each direction"
        assert (difference > 1).float().mean() < 0.001
        assert (difference > 0).float().mean() < 0.2
        assert torch.equal(labels, expected[1])


def test_rows_whose_middle_lies_between_two_are_the_later_one() -> None:
    """In floating point it would be either, by the size: two thirds of 6 rows fall on a border in every third."""
    mask = np.arange(6, dtype=np.uint8)[:, None].repeat(64, axis=1)
    how = replace(GEOMETRY, scale=(1.5, 1.5), flip=0.0)
    _, labels = crop((np.zeros((6, 64, 3), np.uint8), mask), how)
    assert labels[:9, 0].tolist() == [0, 1, 1, 2, 3, 3, 4, 5, 5]


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("scale", [0.5, 0.61, 0.83, 0.97, 1.0, 1.21, 1.37, 1.93, 2.0])
def test_labels_change_exactly_where_the_scaled_image_does(scale: float, axis: int) -> None:
    """Half way between two colours is half way between two classes: not a pixel before, nor half a pixel."""
    mask = np.indices((97, 113))[axis].astype(np.uint8) // 12 % 2
    image = np.repeat(250 * mask[..., None], 3, axis=2)
    for index in range(3):
        pixels, labels = crop((image, mask), replace(GEOMETRY, scale=(scale, scale)), index=index)
        decided = (labels != IGNORE_INDEX) & ((pixels[0].int() - 125).abs() > 2)
        assert decided.sum() > 0.8 * (labels != IGNORE_INDEX).sum()
        assert torch.equal(pixels[0][decided] > 125, labels[decided] == 1)


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [(1, 1), (1, 150), (150, 1), (2, 3), (20, 150), (150, 20)])
def test_sources_smaller_than_the_crop_keep_all_their_pixels(size: tuple[int, int], scale: float) -> None:
    how = Augmentation(crop=64, scale=(scale, scale), flip=0.0)
    image, mask = blocks(*size)
    mask[:] = np.arange(size[1]) % 7
    pixels, labels = crop((image, mask), how)
    height, width = (min(64, max(1, round(side * scale))) for side in size)
    inside = torch.zeros(64, 64, dtype=torch.bool)
    inside[:height, :width] = True
    assert torch.equal(labels != IGNORE_INDEX, inside)
    assert labels[inside].max() < 7
    assert (pixels[:, ~inside] == torch.tensor(FILL)[:, None]).all()


def test_scaling_makes_no_new_label() -> None:
    for index in range(6):
        _, labels = crop(blocks(), GEOMETRY, index=index)
        assert set(labels.unique().tolist()) <= {0, 1, 2, 3, 4, IGNORE_INDEX}


@pytest.mark.parametrize("flip", [0.0, 1.0])
def test_padding_is_the_fill_colour_and_ignored(flip: float) -> None:
    how = Augmentation(crop=64, scale=(1.0, 1.0), flip=flip, photometric=0.0)
    image, labels = crop(coordinates(40, 50), how)
    padded = torch.ones(64, 64, dtype=torch.bool)
    padded[:40, slice(14, 64) if flip else slice(0, 50)] = False
    assert torch.equal(labels == IGNORE_INDEX, padded)
    assert (image[:, padded] == torch.tensor(FILL)[:, None]).all()
    assert (image[2][~padded] == 0).all()


def test_padding_keeps_the_fill_colour_under_photometric_distortion() -> None:
    for index in range(6):
        image, _ = crop(blocks(40, 50), replace(UNSCALED, flip=0.0, photometric=1.0), index=index)
        assert (image[:, 40:] == torch.tensor(FILL).view(3, 1, 1)).all()
        assert (image[:, :, 50:] == torch.tensor(FILL).view(3, 1, 1)).all()


def test_flip_mirrors_image_and_labels_alike() -> None:
    straight = crop(blocks(), Augmentation(crop=64, flip=0.0, photometric=0.0), index=3)
    mirrored = crop(blocks(), Augmentation(crop=64, flip=1.0, photometric=0.0), index=3)
    assert torch.equal(mirrored[0], straight[0].flip(2))
    assert torch.equal(mirrored[1], straight[1].flip(1))


def test_photometric_distortion_changes_colours_and_no_label() -> None:
    plain = crop(blocks(), GEOMETRY, index=1)
    distorted = crop(blocks(), Augmentation(crop=64, photometric=1.0), index=1)
    assert torch.equal(distorted[1], plain[1])
    difference = (distorted[0].float() - plain[0].float()).abs().mean()
    assert 2 < difference < 100


@pytest.mark.parametrize("probability", [0.0, 0.5, 1.0])
def test_contrast_comes_before_or_after_the_colours(probability: float, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []
    for name in ("brightness", "contrast", "saturation", "hue"):
        monkeypatch.setattr(photometric, f"adjust_{name}", lambda image, by, name=name: called.append(name) or image)
    first = ("brightness", "contrast", "saturation", "hue")
    last = ("brightness", "saturation", "hue", "contrast")
    orders = []
    for index in range(200):
        called.clear()
        crop(blocks(64, 64), replace(UNSCALED, photometric=probability), index=index)
        orders.append(tuple(called))
        assert orders[-1] in [tuple(name for name in order if name in called) for order in (first, last)]
    for name in first:
        assert abs(sum(name in order for order in orders) / 200 - probability) < 0.15
    if probability == 1:
        assert 60 < orders.count(first) < 140


def test_scale_stays_in_its_range_on_both_sides_of_one() -> None:
    source = np.zeros((100, 100, 3), np.uint8), np.zeros((100, 100), np.uint8)
    sides = []
    for index in range(40):
        _, labels = crop(source, Augmentation(crop=256, photometric=0.0), index=index)
        sides.append(int((labels != IGNORE_INDEX).any(dim=1).sum()))
    assert 50 <= min(sides) < 70
    assert 150 < max(sides) <= 200
    assert 10 < sum(side < 100 for side in sides) < 30


def share_of_commonest(labels: Tensor) -> float:
    counts = torch.bincount(labels.flatten(), minlength=256)[:IGNORE_INDEX]
    return float(counts.max() / counts.sum())


def test_crops_of_nearly_one_class_are_drawn_again() -> None:
    mask = np.zeros((300, 300), np.uint8)
    mask[120:180, 120:180] = 1
    source = np.zeros((300, 300, 3), np.uint8), mask
    unbalanced = []
    for limit in (1.01, 0.75):
        how = Augmentation(crop=64, scale=(1.0, 1.0), photometric=0.0, max_class_share=limit)
        shares = [share_of_commonest(crop(source, how, index=index)[1]) for index in range(60)]
        unbalanced.append(sum(share >= 0.75 for share in shares))
    assert unbalanced[0] > 45
    assert unbalanced[1] < 0.5 * unbalanced[0]


def test_crop_is_judged_by_the_pixels_that_it_holds() -> None:
    """At half the size every second column is left: which ones decides whether the left or the right half is mixed."""
    columns = np.arange(400)
    varied, plain = columns // 2 % 5, np.full(400, 5)
    mask = np.where((columns % 2 == 0) == (columns < 200), varied, plain).astype(np.uint8)[None].repeat(400, axis=0)
    how = replace(GEOMETRY, scale=(0.5, 0.5), flip=0.0)
    shares = [share_of_commonest(crop((np.zeros((400, 400, 3), np.uint8), mask), how, index=i)[1]) for i in range(60)]
    assert sum(share > how.max_class_share for share in shares) < 3, "10 tries find a mixed crop nearly always"


def test_limit_of_one_takes_every_labelled_crop() -> None:
    """As does one that nothing reaches: no crop is drawn a second time."""
    image, mask = coordinates()
    for index in range(8):
        crops = [
            crop((image, 0 * mask), replace(UNSCALED, max_class_share=limit), index=index)[0]
            for limit in (0.9, 1.0, 2.0)
        ]
        assert torch.equal(crops[1], crops[2])
        assert not torch.equal(crops[0], crops[1])


@pytest.mark.parametrize("label", [2, IGNORE_INDEX])
def test_source_of_one_label_still_gives_a_crop(label: int) -> None:
    source = np.zeros((100, 100, 3), np.uint8), np.full((100, 100), label, np.uint8)
    _, labels = crop(source, UNSCALED)
    assert labels.unique().tolist() == [label]


def test_augmentation_leaves_its_input_as_it_was() -> None:
    image, mask = blocks()
    before = image.copy(), mask.copy()
    for index in range(4):
        augment(image, mask, sample_rng(0, 0, index), Augmentation(crop=64, photometric=1.0), FILL)
    np.testing.assert_array_equal(image, before[0])
    np.testing.assert_array_equal(mask, before[1])


def test_read_only_and_strided_sources_give_the_same_crop() -> None:
    """torch warns of memory that it must not write to."""
    image, mask = blocks()
    expected = crop((image, mask), UNSCALED)
    read_only, strided = (image.copy(), mask.copy()), (image[:, ::-1].copy()[:, ::-1], np.asfortranarray(mask))
    for array in read_only:
        array.flags.writeable = False
    for source in (read_only, strided):
        found = crop(source, UNSCALED)
        assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop": 0}, "crop must be at least 1, got 0"),
        ({"scale": (0.0, 2.0)}, "scale is a range of factors over 0, low then high, got"),
        ({"scale": (2.0, 0.5)}, "scale is a range of factors over 0, low then high, got"),
        ({"scale": (0.5, math.nan)}, "scale is a range of factors over 0, low then high, got"),
        ({"flip": 1.1}, r"flip is a probability in 0\.\.1, got 1\.1"),
        ({"photometric": -0.1}, r"photometric is a probability in 0\.\.1, got -0\.1"),
    ],
)
def test_impossible_augmentation_is_refused_with_the_name_of_its_field(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**({"crop": 64} | change))


def test_canvas_holds_the_image_at_its_top_left_and_the_fill_elsewhere() -> None:
    image, _ = blocks(33, 50)
    out = canvas(image, 32, FILL)
    assert out.shape == (64, 64, 3)
    np.testing.assert_array_equal(out[:33, :50], image)
    outside = np.ones((64, 64), bool)
    outside[:33, :50] = False
    assert (out[outside] == FILL).all()


def test_canvas_of_an_image_that_fits_is_the_image() -> None:
    image, _ = blocks(64, 96)
    assert canvas(image, 32, FILL) is image


@pytest.mark.parametrize("temperature", [0.01, 0.1, 10.0])
def test_class_probabilities_are_the_softmax_of_rarity(temperature: float) -> None:
    pixels = [700, 100, 0, 150, 50]
    weights = [math.exp((1 - n / 1000) / temperature) if n else 0.0 for n in pixels]
    expected = [weight / sum(weights) for weight in weights]
    assert class_probabilities(pixels, temperature).tolist() == pytest.approx(expected, rel=1e-9)


def test_rarer_classes_are_drawn_more_often_and_all_alike_at_a_high_temperature() -> None:
    pixels = [10**12, 3 * 10**11, 10**11, 5]
    found = class_probabilities(pixels, 0.5)
    assert found.sum() == pytest.approx(1)
    assert (np.diff(found) > 0).all()
    assert class_probabilities(pixels, 1e6) == pytest.approx(0.25, rel=1e-5)


@pytest.mark.parametrize(
    ("pixels", "expected"),
    [([0, 0, 0], [0, 0, 0]), ([0, 8, 0], [0, 1, 0]), ([10**15, 1, 0], [0, 1, 0]), ([5, 5], [0.5, 0.5])],
)
def test_no_temperature_and_no_empty_class_make_a_probability_that_is_none(
    pixels: list[int], expected: list[float]
) -> None:
    assert class_probabilities(pixels, 1e-4).tolist() == expected
