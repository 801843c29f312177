"""Sixteen image corruptions in five severities, to measure how a segmentation network degrades.

The set (four blurs, four noises, four digital, four weather) is the common part of "Cityscapes-C": Kamann &
Rother 2020, "Benchmarking the Robustness of Semantic Segmentation Models"; the camera effects they add (PSF
blur, intensity noise, geometric distortion) are left out. The recipes and the severity constants are those
of ImageNet-C: Hendrycks & Dietterich 2019, "Benchmarking Neural Network Robustness to Common Corruptions
and Perturbations" (github.com/hendrycks/robustness). Like Michaelis et al. 2019, "Benchmarking Robustness
in Object Detection" (github.com/bethgelab/imagecorruptions), we use them unscaled at any image size. Each
function names its constants, one per severity. The code is our own, over numpy, scipy.ndimage and Pillow.

Where it differs from the published programs, so that scores are comparable in kind and not digit by digit:

- frost: the published one blends in a photograph; here the ice is drawn (`_frost_texture`);
- glass blur: the pixel swaps run in sets that cannot touch each other, not in raster order, so that they
  vectorise;
- spatter: the rim of a drop is the border of its mask, where the published one runs a Canny filter over the
  drop;
- motion blur (and snow streaks): reflected borders, and a trail on whole pixels;
- results are rounded to the nearest grey level, not cut.

Severity is the label of the published constants. The mean pixel difference from the clean image grows with
each step of it, except in weather, where a step may trade one effect for another: snow 2 to 3 (larger
flakes, but fewer), spatter 3 to 4 (water, then mud), frost 3 to 4 (a fainter scene under the same ice), and
fog's draw of a cloud.

Shapes: H, W the image's height and width; 3 its RGB channels. Inside this file an image is float64 in
[0, 1]; what a corruption returns may exceed that range, `corrupt` clips it.
"""

import hashlib
import io
import itertools
import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy import ndimage

Floats = npt.NDArray[np.float64]
Corruption = Callable[[Floats, int, np.random.Generator], Floats]

SEVERITIES = (1, 2, 3, 4, 5)
SMALLEST_SIDE = 8


def corrupt(image: npt.NDArray[np.uint8], name: str, severity: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    """A corrupted copy of `image` (H, W, 3) RGB; the input is left as it is.

    `name` is a key of `CORRUPTIONS`, `severity` runs from 1 (mild) to 5. `rng` is consumed; take it from
    `corruption_rng` to get the same bytes in every process. Raises ValueError for an unknown name, a severity
    outside 1..5, or an image of another type or shape.
    """
    if name not in CORRUPTIONS:
        raise ValueError(f"unknown corruption {name!r}: pass one of {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise ValueError(f"severity is {severity!r}: pass a whole number from 1 (mild) to 5 (severe)")
    if image.dtype != np.uint8:
        raise ValueError(f"image has dtype {image.dtype}: pass uint8 RGB values from 0 to 255")
    if image.ndim != 3 or image.shape[2] != 3 or min(image.shape[:2]) < SMALLEST_SIDE:
        raise ValueError(
            f"image has shape {image.shape}: pass (H, W, 3) with H and W of at least {SMALLEST_SIDE} pixels"
        )
    image_HW3 = image.astype(np.float64) / 255.0
    corrupted_HW3 = CORRUPTIONS[name](image_HW3, int(severity), rng)
    return np.rint(np.clip(corrupted_HW3, 0.0, 1.0) * 255.0).astype(np.uint8)


def corruption_rng(key: str, name: str, severity: int) -> np.random.Generator:
    """The generator of one (image key, corruption, severity): the same in every process and order of work.

    Philox, a counter-based generator, keyed with the first 128 bits of SHA-256 over the three.
    """
    digest = hashlib.sha256(f"{key}\0{name}\0{severity}".encode()).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest[:16], "big")))


# Blur


def motion_blur(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """A one-sided Gaussian trail. (radius, sigma): (10, 3), (15, 5), (15, 8), (15, 12), (20, 15) pixels."""
    radius, sigma = ((10, 3), (15, 5), (15, 8), (15, 12), (20, 15))[severity - 1]
    return _convolve(image_HW3, _trail_kernel(radius, sigma, rng.uniform(-45.0, 45.0)))


def defocus_blur(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """A disk. (radius, smoothing of its rim): (3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5) pixels."""
    radius, rim = ((3, 0.1), (4, 0.5), (6, 0.5), (8, 0.5), (10, 0.5))[severity - 1]
    return _convolve(image_HW3, _disk_kernel(radius, rim))


def glass_blur(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Pixels change places nearby, as behind frosted glass, between two Gaussian blurs.

    (sigma, reach, rounds): (0.7, 1, 2), (0.9, 2, 1), (1, 2, 3), (1.1, 3, 2), (1.5, 4, 2).
    """
    sigma, reach, rounds = ((0.7, 1, 2), (0.9, 2, 1), (1.0, 2, 3), (1.1, 3, 2), (1.5, 4, 2))[severity - 1]
    shuffled_HW3 = _gaussian(image_HW3, sigma)
    for _ in range(rounds):
        shuffled_HW3 = _swap_nearby(shuffled_HW3, reach, rng)
    return _gaussian(shuffled_HW3, sigma)


def gaussian_blur(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Standard deviation 1, 2, 3, 4, 6 pixels."""
    return _gaussian(image_HW3, (1, 2, 3, 4, 6)[severity - 1])


# Noise


def gaussian_noise(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Sensor noise in low light. Standard deviation 0.08, 0.12, 0.18, 0.26, 0.38 of the full range."""
    scale = (0.08, 0.12, 0.18, 0.26, 0.38)[severity - 1]
    return image_HW3 + rng.normal(0.0, scale, image_HW3.shape)


def impulse_noise(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Salt and pepper, drawn for each channel. Share of values hit: 0.03, 0.06, 0.09, 0.17, 0.27."""
    share = (0.03, 0.06, 0.09, 0.17, 0.27)[severity - 1]
    draw_HW3 = rng.random(image_HW3.shape)
    salted_HW3 = np.where(draw_HW3 < share / 2, 1.0, image_HW3)
    return np.where(draw_HW3 > 1.0 - share / 2, 0.0, salted_HW3)


def shot_noise(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Photons are counted (Poisson). Photons for a white value: 60, 25, 12, 5, 3."""
    photons = (60, 25, 12, 5, 3)[severity - 1]
    return rng.poisson(image_HW3 * photons) / photons


def speckle_noise(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Noise in proportion to the value. Standard deviation 0.15, 0.2, 0.35, 0.45, 0.6 of the value."""
    scale = (0.15, 0.2, 0.35, 0.45, 0.6)[severity - 1]
    return image_HW3 * (1.0 + rng.normal(0.0, scale, image_HW3.shape))


# Digital


def brightness(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """The V of HSV is raised by 0.1, 0.2, 0.3, 0.4, 0.5 and clipped; hue and saturation stay."""
    value_HW1: Floats = image_HW3.max(axis=2, keepdims=True)
    raised_HW1: Floats = np.minimum(value_HW1 + (0.1, 0.2, 0.3, 0.4, 0.5)[severity - 1], 1.0)
    # With H and S fixed, RGB is proportional to V; black has neither, and becomes grey.
    return np.where(value_HW1 > 0, image_HW3 * (raised_HW1 / np.maximum(value_HW1, 1e-9)), raised_HW1)


def contrast(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Values move to their channel's mean, keeping 0.4, 0.3, 0.2, 0.1, 0.05 of the distance."""
    mean_113: Floats = image_HW3.mean(axis=(0, 1), keepdims=True)
    return mean_113 + (0.4, 0.3, 0.2, 0.1, 0.05)[severity - 1] * (image_HW3 - mean_113)


def saturate(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """The S of HSV becomes `factor * S + offset`, clipped: (0.3, 0), (0.1, 0), (2, 0), (5, 0.1), (20, 0.2).

    Severities 1 and 2 take colour out, 3 to 5 put it in. A grey pixel has no hue and counts as red (hue 0),
    as in the published program: from severity 4 on, grey turns to pink.
    """
    factor, offset = ((0.3, 0.0), (0.1, 0.0), (2.0, 0.0), (5.0, 0.1), (20.0, 0.2))[severity - 1]
    value_HW1: Floats = image_HW3.max(axis=2, keepdims=True)
    spread_HW1: Floats = value_HW1 - image_HW3.min(axis=2, keepdims=True)
    saturation_HW1 = spread_HW1 / np.maximum(value_HW1, 1e-9)
    # RGB = V * (1 - S * depth), where depth depends on the hue alone.
    depth_HW3: Floats = (value_HW1 - image_HW3) / np.maximum(spread_HW1, 1e-9)
    depth_HW3 = np.where(spread_HW1 > 0, depth_HW3, np.array([0.0, 1.0, 1.0]))
    return value_HW1 * (1.0 - np.clip(factor * saturation_HW1 + offset, 0.0, 1.0) * depth_HW3)


def jpeg(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """JPEG at quality 25, 18, 15, 10, 7, with Pillow's default chroma subsampling."""
    file = io.BytesIO()
    pixels_HW3 = np.rint(image_HW3 * 255.0).astype(np.uint8)
    Image.fromarray(pixels_HW3).save(file, "JPEG", quality=(25, 18, 15, 10, 7)[severity - 1])
    return np.asarray(Image.open(file), dtype=np.float64) / 255.0


# Weather


def snow(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Flakes that streak downwards, over a whitened scene.

    Published constants, a row per severity: mean and deviation of the flake noise, its zoom, threshold of a
    flake, radius and sigma of the streaks in pixels, share of the scene that is not whitened.
    """
    mean, deviation, zoom, threshold, radius, sigma, kept = (
        (0.1, 0.3, 3.0, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2.0, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4.0, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    height, width = image_HW3.shape[:2]
    noise = rng.normal(mean, deviation, (math.ceil(height / zoom), math.ceil(width / zoom)))
    flakes_HW: Floats = ndimage.zoom(noise, zoom, order=1)[:height, :width]
    flakes_HW = np.where(flakes_HW < threshold, 0.0, np.minimum(flakes_HW, 1.0))
    streaks_HW = _convolve(flakes_HW, _trail_kernel(radius, sigma, rng.uniform(-135.0, -45.0)))
    grey_HW1: Floats = (image_HW3 @ np.array([0.299, 0.587, 0.114]))[..., None]
    whitened_HW3: Floats = kept * image_HW3 + (1.0 - kept) * np.maximum(image_HW3, 1.5 * grey_HW1 + 0.5)
    return whitened_HW3 + (streaks_HW + streaks_HW[::-1, ::-1])[..., None]


def spatter(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Drops on the lens: water at severities 1 to 3, mud at 4 and 5.

    Published constants, a row per severity: mean, deviation and smoothing of the liquid noise, its threshold,
    and the strength of the water's gleam or the smoothing of the mud.
    """
    mean, deviation, sigma, threshold, last = (
        (0.65, 0.3, 4, 0.69, 0.6),
        (0.65, 0.3, 3, 0.68, 0.6),
        (0.65, 0.3, 2, 0.68, 0.5),
        (0.65, 0.3, 1, 0.65, 1.5),
        (0.67, 0.4, 1, 0.65, 1.5),
    )[severity - 1]
    liquid_HW = _gaussian(rng.normal(mean, deviation, image_HW3.shape[:2]), sigma)
    liquid_HW = np.where(liquid_HW < threshold, 0.0, liquid_HW)
    if severity <= 3:
        turquoise_3 = np.array([175, 238, 238]) / 255.0
        return image_HW3 + last * _water_gleam(liquid_HW)[..., None] * turquoise_3
    cover_HW1 = _gaussian((liquid_HW > 0).astype(np.float64), last)[..., None]
    cover_HW1 = np.where(cover_HW1 < 0.8, 0.0, cover_HW1)
    mud_3 = np.array([63, 42, 20]) / 255.0
    return (1.0 - cover_HW1) * image_HW3 + cover_HW1 * mud_3


def fog(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """A plasma cloud is added and the sum scaled back to the image's own maximum.

    (thickness, decay of the cloud's detail): (1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4).
    """
    thickness, decay = ((1.5, 2.0), (2.0, 2.0), (2.5, 1.7), (2.5, 1.5), (3.0, 1.4))[severity - 1]
    height, width = image_HW3.shape[:2]
    brightest = float(image_HW3.max())
    fogged_HW3 = image_HW3 + thickness * _plasma(height, width, decay, rng)[..., None]
    return fogged_HW3 * brightest / (brightest + thickness)


def frost(image_HW3: Floats, severity: int, rng: np.random.Generator) -> Floats:
    """Ice on the lens. (image, ice) weights: (1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75)."""
    image_weight, ice_weight = ((1.0, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[severity - 1]
    height, width = image_HW3.shape[:2]
    return image_weight * image_HW3 + ice_weight * _frost_texture(height, width, rng)


CORRUPTIONS: dict[str, Corruption] = {
    "motion_blur": motion_blur,
    "defocus_blur": defocus_blur,
    "glass_blur": glass_blur,
    "gaussian_blur": gaussian_blur,
    "gaussian_noise": gaussian_noise,
    "impulse_noise": impulse_noise,
    "shot_noise": shot_noise,
    "speckle_noise": speckle_noise,
    "brightness": brightness,
    "contrast": contrast,
    "saturate": saturate,
    "jpeg": jpeg,
    "snow": snow,
    "spatter": spatter,
    "fog": fog,
    "frost": frost,
}

CATEGORIES: dict[str, tuple[str, ...]] = {
    "blur": ("motion_blur", "defocus_blur", "glass_blur", "gaussian_blur"),
    "noise": ("gaussian_noise", "impulse_noise", "shot_noise", "speckle_noise"),
    "digital": ("brightness", "contrast", "saturate", "jpeg"),
    "weather": ("snow", "spatter", "fog", "frost"),
}


# Filters and textures


def _gaussian(image: Floats, sigma: float) -> Floats:
    """Gaussian blur of (H, W) or (H, W, 3) over its first two axes."""
    blurred: Floats = ndimage.gaussian_filter(image, sigma, mode="nearest", axes=(0, 1))
    return blurred


def _convolve(image: Floats, kernel_KK: Floats) -> Floats:
    """(H, W) or (H, W, 3) convolved with an odd kernel, borders reflected; by FFT, as they reach 81 x 81."""
    height, width = image.shape[:2]
    radius = kernel_KK.shape[0] // 2
    padding = [(radius, radius), (radius, radius), (0, 0)][: image.ndim]
    padded = np.pad(image, padding, mode="reflect")
    grid = padded.shape[:2]
    transfer = np.fft.rfft2(kernel_KK, s=grid)
    transfer = transfer.reshape(transfer.shape + (1,) * (image.ndim - 2))
    filtered = np.fft.irfft2(np.fft.rfft2(padded, axes=(0, 1)) * transfer, s=grid, axes=(0, 1))
    return filtered[2 * radius : 2 * radius + height, 2 * radius : 2 * radius + width]


def _trail_kernel(radius: int, sigma: float, degrees: float) -> Floats:
    """Half a Gaussian, 2 * radius + 1 pixels long, that leaves the kernel's centre at an angle; sums to 1."""
    steps = np.arange(2 * radius + 1)
    weights = np.exp(-0.5 * (steps / sigma) ** 2)
    rows = np.rint(steps * math.sin(math.radians(degrees))).astype(np.intp)
    columns = np.rint(steps * math.cos(math.radians(degrees))).astype(np.intp)
    kernel_KK = np.zeros((4 * radius + 1, 4 * radius + 1))
    np.add.at(kernel_KK, (2 * radius + rows, 2 * radius + columns), weights / weights.sum())
    return kernel_KK


def _disk_kernel(radius: int, rim: float) -> Floats:
    """A disk, its rim smoothed by `rim` pixels over 3 x 3 up to radius 8 and 5 x 5 above; sums to 1."""
    reach = 1 if radius <= 8 else 2
    offsets = np.arange(-radius - reach, radius + reach + 1)
    disk_KK = (offsets[:, None] ** 2 + offsets**2 <= radius**2).astype(np.float64)
    smooth_KK: Floats = ndimage.gaussian_filter(disk_KK, rim, radius=reach)
    return smooth_KK / float(smooth_KK.sum())


def _swap_nearby(image_HW3: Floats, reach: int, rng: np.random.Generator) -> Floats:
    """Every pixel in turn changes places with one at an offset in [-reach, reach) on both axes.

    Pixels 2 * reach apart have disjoint neighbourhoods, so all those of one lattice swap at once.
    """
    height, width = image_HW3.shape[:2]
    stride = 2 * reach
    offsets_2HW = rng.integers(-reach, reach, (2, height, width))
    # Clipping at the border brings the partner nearer, so that it stays in the neighbourhood.
    rows_HW = np.clip(np.arange(height)[:, None] + offsets_2HW[0], 0, height - 1)
    columns_HW = np.clip(np.arange(width) + offsets_2HW[1], 0, width - 1)
    partners_HW = rows_HW * width + columns_HW
    pixels_HW = np.arange(height * width).reshape(height, width)
    source = pixels_HW.ravel().copy()
    for phase in rng.permutation(stride * stride):
        lattice = np.s_[phase // stride :: stride, phase % stride :: stride]
        here, there = pixels_HW[lattice].ravel(), partners_HW[lattice].ravel()
        source[here], source[there] = source[there], source[here]
    return image_HW3.reshape(-1, 3)[source].reshape(image_HW3.shape)


def _plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> Floats:
    """A plasma fractal in [0, 1]: diamond-square on a torus that doubles until it covers (height, width).

    The published program multiplies its noise by the amplitude twice; hence the `decay**2` per doubling.
    """
    grid: Floats = np.zeros((1, 1))
    amplitude = 1.0
    while grid.shape[0] < max(height, width):
        side = grid.shape[0]
        noise = rng.uniform(-amplitude, amplitude, (3, side, side))
        rows_below = np.roll(grid, -1, axis=0)
        centres = (grid + rows_below + np.roll(grid + rows_below, -1, axis=1)) / 4 + noise[0]
        across = (grid + np.roll(grid, -1, axis=1) + centres + np.roll(centres, 1, axis=0)) / 4 + noise[1]
        down = (grid + rows_below + centres + np.roll(centres, 1, axis=1)) / 4 + noise[2]
        grid = np.stack((np.stack((grid, across), axis=2), np.stack((down, centres), axis=2)), axis=1)
        grid = grid.reshape(2 * side, 2 * side)
        amplitude /= decay**2
    grid = (grid - grid.min()) / (grid.max() - grid.min())
    return grid[:height, :width]


def _water_gleam(liquid_HW: Floats) -> Floats:
    """Light on drops (where `liquid_HW` > 0), in [0, 1]: distance from the rim, equalised and embossed."""
    wet_HW = liquid_HW > 0
    rim_HW = wet_HW & ~ndimage.binary_erosion(wet_HW, border_value=1)
    if not rim_HW.any():
        return np.zeros_like(liquid_HW)
    distance_HW = np.minimum(ndimage.distance_transform_edt(~rim_HW), 20.0)
    levels_HW = ndimage.uniform_filter(distance_HW, 3).astype(np.uint8)
    counts = np.bincount(levels_HW.ravel(), minlength=256)
    lowest = counts[levels_HW.min()]
    equalised = (np.cumsum(counts) - lowest) / max(levels_HW.size - lowest, 1) * 255.0
    emboss = np.array([[-2.0, -1.0, 0.0], [-1.0, 1.0, 1.0], [0.0, 1.0, 2.0]])
    relief_HW = np.clip(ndimage.correlate(equalised[levels_HW], emboss, mode="mirror"), 0.0, 255.0)
    gleam_HW: Floats = liquid_HW * ndimage.uniform_filter(relief_HW, 3)
    return gleam_HW / max(float(gleam_HW.max()), 1e-9)


def _frost_texture(height: int, width: int, rng: np.random.Generator) -> Floats:
    """Ice (H, W, 3) in [0, 1]: feathers of three sizes in a haze, dense or open after a plasma fractal."""
    place_2HW = np.indices((height, width)).astype(np.float64)
    bend_2HW = np.stack([_plasma(height, width, 1.35, rng) - 0.5 for _ in range(2)])
    ice_HW = np.zeros((height, width))
    for feathers_per_side in (4, 7, 12):
        size = max(height, width) / feathers_per_side
        ice_HW = np.maximum(ice_HW, _feathers(place_2HW + size * bend_2HW, size, rng))
    density_HW = _plasma(height, width, 1.45, rng)
    grain_HW = _plasma(height, width, 1.1, rng)
    ice_HW = ice_HW * (0.35 + 0.9 * density_HW) + 0.55 * density_HW + 0.5 * grain_HW - 0.27
    ice_HW3: Floats = np.clip(ice_HW, 0.0, 1.0)[..., None] * np.array([0.88, 0.95, 1.0])
    return ice_HW3


def _feathers(place_2HW: Floats, size: float, rng: np.random.Generator) -> Floats:
    """One layer of frost: at each seed of a jittered lattice a spine with slanted barbs, at its own angle.

    `place_2HW` holds the (row, column) at which each pixel reads the layer; up to `size` outside the image.
    """
    cell_2HW = np.floor(place_2HW / size).astype(np.intp) + 2
    lattice = np.indices(tuple(cell_2HW.max(axis=(1, 2)) + 2))
    seeds_2N = ((lattice - 2 + rng.random(lattice.shape)) * size).reshape(2, -1)
    angles_N = rng.uniform(0.0, 2.0 * math.pi, seeds_2N.shape[1])
    nearest_HW = np.full(place_2HW.shape[1:], np.inf)
    owner_HW = np.zeros(place_2HW.shape[1:], dtype=np.intp)
    for row_step, column_step in itertools.product((-1, 0, 1), repeat=2):
        candidate_HW = (cell_2HW[0] + row_step) * lattice.shape[2] + cell_2HW[1] + column_step
        distance_HW = ((place_2HW - seeds_2N[:, candidate_HW]) ** 2).sum(axis=0)
        owner_HW = np.where(distance_HW < nearest_HW, candidate_HW, owner_HW)
        nearest_HW = np.minimum(distance_HW, nearest_HW)
    down_HW, right_HW = place_2HW - seeds_2N[:, owner_HW]
    angle_HW = angles_N[owner_HW]
    along_HW = np.cos(angle_HW) * right_HW + np.sin(angle_HW) * down_HW
    aside_HW = np.abs(np.cos(angle_HW) * down_HW - np.sin(angle_HW) * right_HW)
    barb_2HW = np.stack(((along_HW - 0.6 * aside_HW) / 1.4, aside_HW / 7.0))
    barbs_HW = ndimage.map_coordinates(rng.random((128, 128)), barb_2HW, order=1, mode="grid-wrap") ** 2
    spine_HW = np.exp(-((aside_HW / 1.2) ** 2) - np.abs(along_HW) / (0.4 * size))
    feathers_HW: Floats = barbs_HW * np.exp(-aside_HW / (0.4 * size)) + 0.5 * spine_HW
    return feathers_HW
