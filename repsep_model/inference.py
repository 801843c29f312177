"""Images of any size to label maps: whole where they fit, otherwise by sliding windows in row bands.

A window's logits stay at stride s; rows that no later window can reach are upsampled, reduced to labels and dropped, so
the K x H x W logits never exist. Scales and mirroring are further views of the same image: each gives its own rows of
logits at the image's pixels, and their probabilities are averaged.
Shapes: B batch, K classes, H x W pixels, h x w grid at stride s, R rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from repsep_model.images import UInt8
from repsep_model.segmentor import Segmentor
from repsep_model.transforms import canvas

CANVAS = 32
"""Canvas sides are multiples of the first multiple of the model's own that reaches this: few shapes in a bucket."""

PIXEL_BUDGET = 4 * 1024 * 1024
"""Images over this many pixels go by windows, whatever the model."""

WINDOWED_PIXELS = {"cpu": 4 * 192 * 192, "cuda": 16 * 512 * 512}
"""Pixels of the windows that go through the model together: small windows one by one take half as long again."""

UPSAMPLE_BYTES = {"cpu": 4 * 1024 * 1024, "cuda": 64 * 1024 * 1024}
"""Logits that are upsampled together: on a CPU as many as its cache holds, which takes three quarters of the time."""


@dataclass(frozen=True)
class Segmentation:
    """Labels (H, W) uint8 and the probability of each label (H, W): float32, or uint8 0..255 asked for `as_bytes`."""

    labels: UInt8
    confidence: NDArray[Any]


@torch.inference_mode()
def segment_image(
    model: Segmentor,
    image: UInt8,
    *,
    pixel_budget: int | None = None,
    overlap: float = 0.25,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
    as_bytes: bool = False,
) -> Segmentation:
    """Segment one (H, W, 3) uint8 image, whole or by windows of `model.config.window` as `fits_whole` says.

    `overlap` is the share of a window that the next one covers again. The probabilities of all `scales` of the image,
    and with `flip` of their mirror images, are averaged. `dtype` bfloat16 runs the model under autocast. `as_bytes`
    gives the confidence as uint8, probability times 255 rounded, and never holds it as float32 at (H, W).
    """
    if model.training:  # drop path would make every call another
        raise ValueError("the model is in training mode; call model.eval(), or use model.for_inference()")
    _check(image, overlap, scales, dtype)
    views = []
    for scale in scales:
        seen = _scaled(image, scale)
        for mirrored in (False, True) if flip else (False,):
            view = seen[:, ::-1] if mirrored else seen
            if fits_whole(model, seen.shape[0], seen.shape[1], pixel_budget):
                pixels = canvas(view, canvas_multiple(model), fill_colour(model))
                bands = iter(_stride_logits(model, _as_batch(pixels), dtype))
            else:
                bands = _window_bands(model, view, overlap, dtype)
            views.append(_View(bands, model.config.stride, seen.shape[:2], image.shape[:2], mirrored))
    return _combine(views, model.config.num_classes, image.shape[0], image.shape[1], as_bytes)


@torch.inference_mode()
def segment_batch(
    model: Segmentor,
    images_B3HW: Tensor,
    sizes: Sequence[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    as_bytes: bool = False,
) -> list[Segmentation]:
    """Images on canvases of one shape; `sizes` are their own (height, width), fewer than B where the rest is blank.

    The confidence is float32, or with `as_bytes` uint8 as `segment_image` gives it.
    """
    stride, classes = model.config.stride, model.config.num_classes
    grids = _stride_logits(model, images_B3HW, dtype)
    return [
        _combine([_View(iter([grid]), stride, size, size, False)], classes, *size, as_bytes)
        for grid, size in zip(grids, sizes, strict=False)  # blanks have no size
    ]


def fits_whole(model: Segmentor, height: int, width: int, pixel_budget: int | None) -> bool:
    """Whether an image is given to the model in one piece: within the budget, and within a window that is fixed.

    Without a budget of one's own it is `PIXEL_BUDGET`, and a plain ViT takes only what is within its window: its
    positions were learned on crops of that size, and stretched over a whole image they are others (docs/evidence.md).
    """
    side = window_side(model) if model.plain and pixel_budget is None else model.fixed_window
    budget = PIXEL_BUDGET if pixel_budget is None else pixel_budget
    return height * width <= budget and (side is None or max(height, width) <= side)


def canvas_multiple(model: Segmentor) -> int:
    """What canvas sides are rounded up to."""
    return -(-CANVAS // model.multiple) * model.multiple


def fill_colour(model: Segmentor) -> tuple[int, int, int]:
    """The model's mean colour in 0..255: what is outside an image looks like nothing."""
    r, g, b = (round(float(v)) for v in model.mean.flatten())
    return r, g, b


def _stride_logits(model: Segmentor, images_B3HW: Tensor, dtype: torch.dtype) -> Tensor:
    device = model.mean.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model.forward_stride(images_B3HW.to(device))


def _check(image: UInt8, overlap: float, scales: Sequence[float], dtype: torch.dtype) -> None:
    """Raises ValueError. Other than 0..255 would be cut to whole numbers: a picture in 0..1 becomes a black one."""
    shape: tuple[int, ...] = tuple(getattr(image, "shape", ()))
    kind = getattr(image, "dtype", type(image).__name__)
    if kind != np.uint8 or len(shape) != 3 or shape[2] != 3 or 0 in shape:
        raise ValueError(f"image is {kind} of shape {shape}: pass a numpy array (H, W, 3) of uint8, RGB, 0..255")
    if not isinstance(scales, Sequence) or not scales or not all(0 < s < float("inf") for s in scales):
        raise ValueError(f"scales must be one or more positive factors, got {scales}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share of a window, 0 or more and under 1, got {overlap}")
    if dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"dtype must be torch.float32 or torch.bfloat16, got {dtype}")


def _scaled(image: UInt8, scale: float) -> UInt8:
    if scale == 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _combine(views: Sequence[_View], num_classes: int, height: int, width: int, as_bytes: bool) -> Segmentation:
    """Labels of the views' mean probability, a few rows of the image at a time."""
    labels = np.empty((height, width), np.uint8)
    confidence = np.empty((height, width), np.uint8 if as_bytes else np.float32)
    rows = max(1, UPSAMPLE_BYTES.get(views[0].held.device.type, 0) // (4 * num_classes * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        if len(views) == 1:
            label, best = _most_likely(views[0].read(top, bottom))
        else:
            mean_KRW = _probabilities(views[0].read(top, bottom))
            for view in views[1:]:
                mean_KRW += _probabilities(view.read(top, bottom))
            best, label = mean_KRW.div_(len(views)).max(dim=0)
        if as_bytes:
            best = best.mul_(255).round_().to(torch.uint8)
        labels[top:bottom] = label.to(torch.uint8).cpu().numpy()
        confidence[top:bottom] = best.cpu().numpy()
    return Segmentation(labels, confidence)


# torch's softmax over the first of three dimensions is several times slower on a CPU than its parts are.


def _most_likely(logits_KHW: Tensor) -> tuple[Tensor, Tensor]:
    """The likeliest class of each pixel and its probability, both (H, W)."""
    best, label = logits_KHW.max(dim=0)
    return label, 1 / (logits_KHW - best).exp_().sum(dim=0)


def _probabilities(logits_KHW: Tensor) -> Tensor:
    shares = (logits_KHW - logits_KHW.amax(dim=0)).exp_()
    return shares.div_(shares.sum(dim=0))


class _View:
    """One scaled, perhaps mirrored, version of an image: its logits at any row of the image, read downwards.

    `bands` are consecutive rows (K, R, w) of the view's grid; `seen` and `size` are (height, width) of the view and of
    the image in pixels. It interpolates bilinearly, once, from the grid to the image's pixels: pixel y of the image is
    at (y + 0.5) * seen / size / s - 0.5 of the grid, as align_corners=False has it, and the grid's ends are clamped.
    """

    def __init__(
        self, bands: Iterator[Tensor], stride: int, seen: tuple[int, ...], size: tuple[int, ...], mirrored: bool
    ) -> None:
        self.bands, self.mirrored = bands, mirrored
        self.width = size[1]
        self.pixels_per_cell = [stride * whole / part for whole, part in zip(size, seen, strict=True)]
        self.held = next(bands)
        self.first = 0
        """The grid row that `held` begins with."""

    def read(self, top: int, bottom: int) -> Tensor:
        """Logits (K, bottom - top, W) of the image's rows; `top` never goes back."""
        places = (torch.arange(top, bottom, device=self.held.device) + 0.5) / self.pixels_per_cell[0] - 0.5
        below = places.floor().long()
        wanted = int(below[-1]) + 1
        while self.first + self.held.shape[1] <= wanted and (band := next(self.bands, None)) is not None:
            self.held = torch.cat([self.held, band], dim=1)
        end = self.first + self.held.shape[1] - 1
        low, high = below.clamp(0, end), (below + 1).clamp(0, end)
        done = int(low[0]) - self.first
        self.held, self.first = self.held[:, done:], self.first + done
        share = (places - below)[:, None]
        band_KRw = self.held[:, low - self.first].lerp_(self.held[:, high - self.first], share)
        # One column more, so that rounding never leaves the result a pixel short; it repeats the last one: a clamp.
        padded = F.pad(band_KRw[None], (0, 1, 0, 0), mode="replicate")
        scale = (1.0, self.pixels_per_cell[1])
        wide = F.interpolate(padded, scale_factor=scale, mode="bilinear", align_corners=False)[0, :, :, : self.width]
        return wide.flip(2) if self.mirrored else wide


def _window_bands(model: Segmentor, image: UInt8, overlap: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields logits (K, R, w) of the grid downwards: rows that no later window can reach."""
    stride, cells = model.config.stride, window_side(model) // model.config.stride
    grid_h, grid_w = -(-image.shape[0] // stride), -(-image.shape[1] // stride)
    tops, lefts = _starts(grid_h, cells, overlap), _starts(grid_w, cells, overlap)
    device = model.mean.device
    ramp = torch.minimum(torch.arange(1, cells + 1), torch.arange(cells, 0, -1)).float().to(device)
    ramp = ramp.clamp_max(max(1, overlap * cells))
    weight = ramp[:, None] * ramp[None, :]

    total = torch.zeros(model.config.num_classes, cells, lefts[-1] + cells, device=device)
    norm = torch.zeros(cells, lefts[-1] + cells, device=device)
    together = max(1, WINDOWED_PIXELS.get(device.type, 0) // (cells * stride) ** 2)
    for number, top in enumerate(tops):
        for start in range(0, len(lefts), together):
            some = lefts[start : start + together]
            windows = [_window(image, top * stride, x * stride, cells * stride, fill_colour(model)) for x in some]
            for left, logits in zip(some, _stride_logits(model, _as_batch(*windows), dtype), strict=True):
                total[:, :, left : left + cells] += logits * weight
                norm[:, left : left + cells] += weight
        done = cells if number == len(tops) - 1 else tops[number + 1] - top
        # One row and column beyond the image where there are some: its last pixels lie between these and the last ones.
        yield (total[:, :done] / norm[:done])[:, : grid_h + 1 - top, : grid_w + 1]
        total[:, : cells - done] = total[:, done:].clone()
        total[:, cells - done :] = 0
        norm = F.pad(norm[done:], (0, 0, 0, done))


def window_side(model: Segmentor) -> int:
    """Side in pixels of the sliding window: the configured one as far as the model's own multiple allows."""
    multiple = canvas_multiple(model)
    return model.fixed_window or max(multiple, model.config.window // multiple * multiple)


def _window(image: UInt8, top: int, left: int, side: int, fill: Sequence[int]) -> UInt8:
    """The (side, side, 3) part of the image at a pixel; what sticks out is the fill colour."""
    window = np.empty((side, side, 3), np.uint8)
    part = image[top : top + side, left : left + side]
    if part.shape != window.shape:
        window[:] = np.asarray(fill, np.uint8)
    window[: part.shape[0], : part.shape[1]] = part
    return window


def _as_batch(*pixels: UInt8) -> Tensor:
    # An image from shared memory is read-only, a mirrored one has negative strides: torch takes neither.
    batch = pixels[0][None] if len(pixels) == 1 else np.stack(pixels)
    return torch.from_numpy(np.require(batch, requirements=["C", "W"])).permute(0, 3, 1, 2)


def _starts(length: int, cells: int, overlap: float) -> list[int]:
    """Evenly stepped window starts that cover `length`; the last window ends at or after the end."""
    if length <= cells:
        return [0]
    step = max(1, round(cells * (1 - overlap)))
    return [*range(0, length - cells, step), length - cells]
