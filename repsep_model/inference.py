"""Images of any size to label maps: whole where they fit, otherwise by sliding windows in row bands.

A window's logits stay at stride s; rows that no later window can reach are upsampled, reduced to labels and dropped, so
the K x H x W logits never exist. Scales and mirroring are further views of the same image: each gives its own rows of
logits at the image's pixels, and their probabilities are averaged.
Shapes: B batch, K classes, H x W pixels, h x w grid at stride s, R rows of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from repsep_model.images import UInt8
from repsep_model.segmentor import Segmentor, upsample_logits
from repsep_model.transforms import canvas

CANVAS = 32
"""Canvas sides are multiples of the first multiple of the model's own that reaches this: few shapes in a bucket."""

PIXEL_BUDGET = 4 * 1024 * 1024
"""Images over this many pixels go by windows."""

UPSAMPLE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Segmentation:
    """Labels (H, W) uint8 and the probability of each label (H, W) float32."""

    labels: UInt8
    confidence: NDArray[np.float32]


@torch.inference_mode()
def segment_image(
    model: Segmentor,
    image: UInt8,
    *,
    pixel_budget: int = PIXEL_BUDGET,
    overlap: float = 0.25,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Segmentation:
    """Segment one (H, W, 3) uint8 image; over `pixel_budget` pixels by windows of `model.config.window`.

    `overlap` is the share of a window that the next one covers again. The probabilities of all `scales` of the image,
    and with `flip` of their mirror images, are averaged. `dtype` bfloat16 runs the model under autocast.
    """
    if model.training:  # drop path would make every call another
        raise ValueError("the model is in training mode; call model.eval(), or use model.for_inference()")
    if not scales or min(scales) <= 0:
        raise ValueError(f"scales must be one or more positive factors, got {tuple(scales)}")
    if not 0 <= overlap < 1:
        raise ValueError(f"overlap is a share of a window, 0 or more and under 1, got {overlap}")
    height, width = image.shape[:2]
    if tuple(scales) == (1.0,) and not flip and fits_whole(model, height, width, pixel_budget):
        batch = _as_batch(canvas(image, canvas_multiple(model), fill_colour(model)))
        labels, confidence = segment_batch(model, batch, dtype=dtype)
        return Segmentation(labels[0, :height, :width].numpy(), confidence[0, :height, :width].numpy())
    views = []
    for scale in scales:
        scaled = _scaled(image, scale)
        whole = fits_whole(model, scaled.shape[0], scaled.shape[1], pixel_budget)
        for mirrored in (False, True) if flip else (False,):
            bands = _grid_bands(model, scaled[:, ::-1] if mirrored else scaled, whole, overlap, dtype)
            views.append(_View(bands, model.config.stride, scaled.shape[:2], (height, width), mirrored))
    return _combine(views, model.config.num_classes, height, width)


@torch.inference_mode()
def segment_batch(
    model: Segmentor, images_B3HW: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A batch of one shape -> labels (B, H, W) uint8 and confidence (B, H, W) float32, on the CPU."""
    logits = _stride_logits(model, images_B3HW, dtype)
    labels, confidences = [], []
    for one in logits:  # one image at a time: K x H x W floats are the largest thing here
        logits_KHW = upsample_logits(one[None], model.config.stride, images_B3HW.shape[-2:])[0]
        label, confidence = _most_likely(logits_KHW)
        labels.append(label.to(torch.uint8).cpu())
        confidences.append(confidence.cpu())
    return torch.stack(labels), torch.stack(confidences)


def fits_whole(model: Segmentor, height: int, width: int, pixel_budget: int) -> bool:
    """Whether an image is given to the model in one piece: within the budget, and within a window that is fixed."""
    side = model.fixed_window
    return height * width <= pixel_budget and (side is None or max(height, width) <= side)


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


def _scaled(image: UInt8, scale: float) -> UInt8:
    if scale == 1:
        return image
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))


def _combine(views: Sequence[_View], num_classes: int, height: int, width: int) -> Segmentation:
    """Labels of the views' mean probability, a few rows of the image at a time."""
    labels = np.empty((height, width), np.uint8)
    confidence = np.empty((height, width), np.float32)
    rows = max(1, UPSAMPLE_BYTES // (4 * num_classes * width))
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        if len(views) == 1:
            label, best = _most_likely(views[0].read(top, bottom))
        else:
            mean_KRW = _probabilities(views[0].read(top, bottom))
            for view in views[1:]:
                mean_KRW += _probabilities(view.read(top, bottom))
            best, label = mean_KRW.div_(len(views)).max(dim=0)
        labels[top:bottom] = label.numpy()
        confidence[top:bottom] = best.numpy()
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
        self, bands: Iterator[Tensor], stride: int, seen: tuple[int, ...], size: tuple[int, int], mirrored: bool
    ) -> None:
        self.bands, self.mirrored = bands, mirrored
        self.width = size[1]
        self.pixels_per_cell = [stride * whole / part for whole, part in zip(size, seen, strict=True)]
        self.rows = -(-seen[0] // stride)
        self.held = torch.empty(0)
        self.first = 0
        """The grid row that `held` begins with."""

    def read(self, top: int, bottom: int) -> Tensor:
        """Logits (K, bottom - top, W) of the image's rows; `top` never goes back."""
        places = (torch.arange(top, bottom) + 0.5) / self.pixels_per_cell[0] - 0.5
        below = places.floor()
        low, high = (row.clamp(0, self.rows - 1).long() for row in (below, below + 1))
        while self.held.numel() == 0 or self.first + self.held.shape[1] <= int(high[-1]):
            band = next(self.bands)
            self.held = torch.cat([self.held, band], dim=1) if self.held.numel() else band
        done = int(low[0]) - self.first
        self.held, self.first = self.held[:, done:], self.first + done
        share = (places - below)[:, None]
        band_KRw = self.held[:, low - self.first].lerp_(self.held[:, high - self.first], share)
        # One column more, so that rounding never leaves the result a pixel short; it repeats the last one: a clamp.
        padded = F.pad(band_KRw[None], (0, 1, 0, 0), mode="replicate")
        scale = (1.0, self.pixels_per_cell[1])
        wide = F.interpolate(padded, scale_factor=scale, mode="bilinear", align_corners=False)[0, :, :, : self.width]
        return wide.flip(2) if self.mirrored else wide


def _grid_bands(model: Segmentor, image: UInt8, whole: bool, overlap: float, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yields logits (K, R, w) of the grid downwards: all of it, or what sliding windows have finished."""
    stride = model.config.stride
    grid_h, grid_w = -(-image.shape[0] // stride), -(-image.shape[1] // stride)
    if whole:
        pixels = canvas(image, canvas_multiple(model), fill_colour(model))
        logits = _stride_logits(model, _as_batch(pixels), dtype)[0, :, :grid_h, :grid_w]
        yield logits.cpu()
        return
    cells = window_side(model) // stride
    tops = _starts(grid_h, cells, overlap)
    lefts = _starts(grid_w, cells, overlap)
    ramp = torch.minimum(torch.arange(1, cells + 1), torch.arange(cells, 0, -1)).float()
    ramp = ramp.clamp_max(max(1, overlap * cells))
    weight = ramp[:, None] * ramp[None, :]

    total = torch.zeros(model.config.num_classes, cells, lefts[-1] + cells)
    norm = torch.zeros(cells, lefts[-1] + cells)
    for number, top in enumerate(tops):
        for left in lefts:
            pixels = _window(image, top * stride, left * stride, cells * stride, fill_colour(model))
            logits = _stride_logits(model, _as_batch(pixels), dtype)[0].cpu()
            total[:, :, left : left + cells] += logits * weight
            norm[:, left : left + cells] += weight
        done = cells if number == len(tops) - 1 else tops[number + 1] - top
        yield (total[:, :done] / norm[:done])[:, : grid_h - top, :grid_w]
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


def _as_batch(pixels: UInt8) -> Tensor:
    # An image from shared memory is read-only, a mirrored one has negative strides: torch takes neither.
    return torch.from_numpy(np.require(pixels, requirements=["C", "W"])).permute(2, 0, 1)[None]


def _starts(length: int, cells: int, overlap: float) -> list[int]:
    """Evenly stepped window starts that cover `length`; the last window ends at or after the end."""
    if length <= cells:
        return [0]
    step = max(1, round(cells * (1 - overlap)))
    return [*range(0, length - cells, step), length - cells]
