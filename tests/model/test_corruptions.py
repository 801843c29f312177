"""The sixteen corruptions: the contract of `corrupt`, and a few of them against a reference.

Shapes: H, W the image's height and width; 3 its RGB channels.
"""

import colorsys
import io
import itertools
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from scipy import ndimage

from repsep_model.corruptions import (
    CATEGORIES,
    CORRUPTIONS,
    SEVERITIES,
    _convolve,
    _disk_kernel,
    _plasma,
    _swap_nearby,
    _trail_kernel,
    corrupt,
    corruption_rng,
)

Pixels = npt.NDArray[np.uint8]
NOT_WEATHER = [name for name in CORRUPTIONS if name not in CATEGORIES["weather"]]


def street(height: int = 90, width: int = 130) -> Pixels:
    """A dark, weakly coloured scene with edges, texture and a bright sky, as a street image has them."""
    rng = np.random.default_rng(0)
    coarse_HW3 = ndimage.gaussian_filter(rng.normal(size=(height, width, 3)), (6, 6, 0.8))
    fine_HW1 = ndimage.gaussian_filter(rng.normal(size=(height, width, 1)), (0.7, 0.7, 0))
    image_HW3 = 75 + 500 * coarse_HW3 + 45 * fine_HW1
    image_HW3[: height // 4] += 110
    image_HW3[height // 2 :, width // 3 : width // 2] -= 40
    pixels: Pixels = np.clip(image_HW3, 0, 255).astype(np.uint8)
    return pixels


def difference(image_HW3: Pixels, name: str, severity: int, key: str = "street") -> float:
    """Mean absolute difference from the clean image. The draws are shared by the severities."""
    corrupted_HW3 = corrupt(image_HW3, name, severity, corruption_rng(key, name, 0))
    return float(np.abs(corrupted_HW3.astype(float) - image_HW3).mean())


def test_categories_hold_every_corruption_once() -> None:
    assert [name for names in CATEGORIES.values() for name in names] == list(CORRUPTIONS)
    assert {category: len(names) for category, names in CATEGORIES.items()} == {
        "blur": 4,
        "noise": 4,
        "digital": 4,
        "weather": 4,
    }


@pytest.mark.parametrize("shape", [(37, 53, 3), (60, 21, 3), (8, 9, 3)])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_shape_and_dtype_are_kept_and_input_is_not_modified(name: str, shape: tuple[int, int, int]) -> None:
    image_HW3 = street()[: shape[0], : shape[1]]
    before_HW3 = image_HW3.copy()
    image_HW3.flags.writeable = False
    for severity in SEVERITIES:
        corrupted_HW3 = corrupt(image_HW3, name, severity, corruption_rng("a", name, severity))
        assert corrupted_HW3.shape == shape
        assert corrupted_HW3.dtype == np.uint8
        assert not np.shares_memory(corrupted_HW3, image_HW3)
    np.testing.assert_array_equal(image_HW3, before_HW3)


@pytest.mark.parametrize("level", [0, 255])
@pytest.mark.parametrize("name", CORRUPTIONS)
def test_flat_black_and_white_images_raise_no_warning(name: str, level: int) -> None:
    image_HW3 = np.full((16, 24, 3), level, dtype=np.uint8)
    with np.errstate(all="raise", under="ignore"):
        for severity in SEVERITIES:
            corrupt(image_HW3, name, severity, corruption_rng("flat", name, severity))


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_same_key_gives_identical_bytes(name: str) -> None:
    first_HW3 = corrupt(street(), name, 3, corruption_rng("a/1.png", name, 3))
    second_HW3 = corrupt(street(), name, 3, corruption_rng("a/1.png", name, 3))
    assert first_HW3.tobytes() == second_HW3.tobytes()


@pytest.mark.parametrize("name", ["motion_blur", "glass_blur", *CATEGORIES["noise"], *CATEGORIES["weather"]])
def test_another_key_gives_other_bytes(name: str) -> None:
    first_HW3 = corrupt(street(), name, 3, corruption_rng("a/1.png", name, 3))
    other_HW3 = corrupt(street(), name, 3, corruption_rng("b/1.png", name, 3))
    assert first_HW3.tobytes() != other_HW3.tobytes()


@pytest.mark.parametrize("name", ["defocus_blur", "gaussian_blur", *CATEGORIES["digital"]])
def test_corruptions_without_chance_ignore_the_key(name: str) -> None:
    first_HW3 = corrupt(street(), name, 3, corruption_rng("a/1.png", name, 3))
    other_HW3 = corrupt(street(), name, 3, corruption_rng("b/1.png", name, 3))
    assert first_HW3.tobytes() == other_HW3.tobytes()


def test_generator_is_pinned_so_that_every_process_draws_the_same() -> None:
    drawn = corruption_rng("val/0001.png", "fog", 2).integers(0, 1000, 4)
    assert drawn.tolist() == [291, 227, 395, 832]


def test_generator_differs_in_each_of_key_name_and_severity() -> None:
    triples = itertools.product(("a", "b"), ("fog", "snow"), (1, 2))
    draws = {float(corruption_rng(*triple).random()) for triple in triples}
    assert len(draws) == 8


@pytest.mark.parametrize("name", NOT_WEATHER)
def test_each_step_of_severity_moves_further_from_the_clean_image(name: str) -> None:
    differences = [difference(street(), name, severity) for severity in SEVERITIES]
    assert differences == sorted(differences)
    assert 0 < differences[0] < differences[-1]


@pytest.mark.parametrize("name", CATEGORIES["weather"])
def test_weather_moves_further_from_the_clean_image_over_the_severities(name: str) -> None:
    # Not step by step, and for fog not for every cloud: see the head of the module.
    mild = [difference(street(), name, 1, key) for key in "abcdefgh"]
    severe = [difference(street(), name, 5, key) for key in "abcdefgh"]
    assert np.mean(severe) > 1.05 * np.mean(mild)


def test_gaussian_noise_has_the_published_deviation_and_no_bias() -> None:
    grey_HW3 = np.full((200, 200, 3), 128, dtype=np.uint8)
    noise_HW3 = corrupt(grey_HW3, "gaussian_noise", 2, np.random.default_rng(0)).astype(float) - 128
    assert noise_HW3.mean() == pytest.approx(0, abs=0.5)
    assert noise_HW3.std() == pytest.approx(0.12 * 255, rel=0.01)


def test_shot_noise_variance_is_value_over_photons() -> None:
    grey_HW3 = np.full((200, 200, 3), 102, dtype=np.uint8)
    noisy_HW3 = corrupt(grey_HW3, "shot_noise", 1, np.random.default_rng(0)) / 255
    assert noisy_HW3.mean() == pytest.approx(0.4, rel=0.01)
    assert noisy_HW3.var() == pytest.approx(0.4 / 60, rel=0.03)


def test_impulse_noise_hits_the_published_share_half_white_half_black() -> None:
    grey_HW3 = np.full((200, 200, 3), 128, dtype=np.uint8)
    noisy_HW3 = corrupt(grey_HW3, "impulse_noise", 5, np.random.default_rng(0))
    assert (noisy_HW3 == 255).mean() == pytest.approx(0.135, rel=0.03)
    assert (noisy_HW3 == 0).mean() == pytest.approx(0.135, rel=0.03)
    assert set(np.unique(noisy_HW3)) == {0, 128, 255}


def test_speckle_noise_leaves_black_alone() -> None:
    black_HW3 = np.zeros((16, 24, 3), dtype=np.uint8)
    assert not corrupt(black_HW3, "speckle_noise", 5, np.random.default_rng(0)).any()


@pytest.mark.parametrize(
    ("name", "severity", "change"),
    [
        ("brightness", 1, lambda h, s, v: (h, s, min(v + 0.1, 1))),
        ("brightness", 5, lambda h, s, v: (h, s, min(v + 0.5, 1))),
        ("saturate", 1, lambda h, s, v: (h, s * 0.3, v)),
        ("saturate", 4, lambda h, s, v: (h, min(s * 5 + 0.1, 1), v)),
    ],
)
def test_hsv_corruptions_match_colorsys(
    name: str, severity: int, change: Callable[[float, float, float], tuple[float, float, float]]
) -> None:
    image_HW3 = np.random.default_rng(0).integers(0, 256, (12, 16, 3), dtype=np.uint8)
    image_HW3[0, :3] = [[0, 0, 0], [90, 90, 90], [255, 255, 255]]
    expected = [colorsys.hsv_to_rgb(*change(*colorsys.rgb_to_hsv(*rgb))) for rgb in image_HW3.reshape(-1, 3) / 255]
    expected_HW3 = np.array(expected).reshape(image_HW3.shape) * 255
    corrupted_HW3 = corrupt(image_HW3, name, severity, np.random.default_rng(0))
    np.testing.assert_allclose(corrupted_HW3, expected_HW3, atol=0.5 + 1e-6)


def test_contrast_keeps_the_mean_and_scales_the_deviation() -> None:
    clean_HW3 = street()
    flat_HW3 = corrupt(clean_HW3, "contrast", 1, np.random.default_rng(0))
    np.testing.assert_allclose(flat_HW3.mean(axis=(0, 1)), clean_HW3.mean(axis=(0, 1)), atol=0.2)
    np.testing.assert_allclose(flat_HW3.std(axis=(0, 1)), 0.4 * clean_HW3.std(axis=(0, 1)), rtol=0.02)


@pytest.mark.parametrize(("severity", "quality"), [(1, 25), (2, 18), (3, 15), (4, 10), (5, 7)])
def test_jpeg_equals_pillow_at_the_published_quality(severity: int, quality: int) -> None:
    file = io.BytesIO()
    Image.fromarray(street()).save(file, "JPEG", quality=quality)
    corrupted_HW3 = corrupt(street(), "jpeg", severity, np.random.default_rng(0))
    np.testing.assert_array_equal(corrupted_HW3, np.asarray(Image.open(file)))


@pytest.mark.parametrize("kernel_KK", [_disk_kernel(3, 0.1), _disk_kernel(10, 0.5), _trail_kernel(20, 15, 30.0)])
def test_convolution_by_fft_matches_direct_convolution(kernel_KK: npt.NDArray[np.float64]) -> None:
    image_HW = street()[..., 0] / 255
    assert kernel_KK.sum() == pytest.approx(1)
    np.testing.assert_allclose(
        _convolve(image_HW, kernel_KK), ndimage.convolve(image_HW, kernel_KK, mode="mirror"), atol=1e-12
    )


@pytest.mark.parametrize("reach", [1, 2, 4])
def test_glass_swaps_keep_every_pixel_and_stay_local(reach: int) -> None:
    height, width = 23, 31
    rows_HW, columns_HW = np.indices((height, width)).astype(np.float64)
    marked_HW3 = np.stack((rows_HW * width + columns_HW, rows_HW, columns_HW), axis=2)
    swapped_HW3 = _swap_nearby(marked_HW3, reach, np.random.default_rng(0))
    assert sorted(swapped_HW3[..., 0].ravel()) == list(range(height * width))
    assert (swapped_HW3[..., 0] != marked_HW3[..., 0]).mean() > 0.5
    # Chains of swaps reach further than one, but typical moves stay local.
    assert np.abs(swapped_HW3[..., 1:] - marked_HW3[..., 1:]).mean() < 1.5 * reach


@pytest.mark.parametrize("shape", [(8, 9), (33, 70)])
def test_plasma_covers_any_shape_within_zero_and_one(shape: tuple[int, int]) -> None:
    plasma_HW = _plasma(*shape, decay=1.4, rng=np.random.default_rng(0))
    assert plasma_HW.shape == shape
    assert plasma_HW.min() >= 0
    assert plasma_HW.max() <= 1
    assert plasma_HW.std() > 0.05


def test_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'rain'.*motion_blur.*frost"):
        corrupt(street(), "rain", 1, np.random.default_rng(0))


@pytest.mark.parametrize("severity", [0, 6, -1])
def test_severity_out_of_range_is_refused(severity: int) -> None:
    with pytest.raises(ValueError, match=r"from 1 .* to 5"):
        corrupt(street(), "fog", severity, np.random.default_rng(0))


def test_wrong_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match="float64: pass uint8"):
        corrupt(street() / 255, "fog", 1, np.random.default_rng(0))  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(20, 20), (20, 20, 4), (3, 20, 20), (7, 20, 3), (1, 20, 20, 3)])
def test_wrong_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pass \(H, W, 3\)"):
        corrupt(np.zeros(shape, dtype=np.uint8), "fog", 1, np.random.default_rng(0))
