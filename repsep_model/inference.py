"""Images of any size to label maps: whole where they fit, otherwise by sliding windows in row bands.

A window's logits stay at stride s; rows that no later window can reach are upsampled, reduced to labels and dropped, so
the K x H x W logits never exist. A whole image is one window: both ways share every line.
Shapes: B batch, K classes, H x W pixels, h x w grid at stride s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from repsep_model.images import UInt8
from repsep_model.segmentor import Segmentor, upsample_logits
from repsep_model.transforms import canvas

CANVAS = 32
"""Canvas sides are multiples of this (and of the model's own), so that few shapes occur in a bucket of images."""

PIXEL_BUDGET = 4 * 1024 * 1024
"""Images over this many pixels go by windows."""

UPSAMPLE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True)
class Segmentation:
    """Labels (H, W) uint8 and the probability of each label (H, W) float32."""

    labels: UInt8
    confidence: NDArray[np.float32]


def segment_image(
    model: Segmentor,
    image: UInt8,
    *,
    pixel_budget: int = PIXEL_BUDGET,
    overlap: float = 0.25,
    dtype: torch.dtype = torch.float32,
) -> Segmentation:
    """Segment one (H, W, 3) uint8 image; over `pixel_budget` pixels by windows of `model.config.window`.

    `overlap` is the share of a window that the next one covers again; `dtype` bfloat16 runs the model under autocast.
    """
    if model.training:  # drop path would make every call another
        raise ValueError("the model is in training mode; call model.eval(), or use model.for_inference()")
    height, width = image.shape[:2]
    if height * width <= pixel_budget:
        # An image from shared memory is read-only, a mirrored one has negative strides: torch takes neither.
        pixels = np.require(canvas(image, canvas_multiple(model), fill_colour(model)), requirements=["C", "W"])
        batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
        labels, confidence = segment_batch(model, batch, dtype=dtype)
        return Segmentation(labels[0, :height, :width].numpy(), confidence[0, :height, :width].numpy())
    return _segment_windows(model, image, overlap=overlap, dtype=dtype)


@torch.inference_mode()
def segment_batch(
    model: Segmentor, images_B3HW: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """A batch of one shape -> labels (B, H, W) uint8 and confidence (B, H, W) float32, on the CPU."""
    logits = _stride_logits(model, images_B3HW, dtype)
    labels, confidences = [], []
    for one in logits:  # one image at a time: K x H x W floats are the largest thing here
        logits_KHW = upsample_logits(one[None], model.config.stride, images_B3HW.shape[-2:])[0]
        confidence, label = logits_KHW.softmax(dim=0).max(dim=0)
        labels.append(label.to(torch.uint8).cpu())
        confidences.append(confidence.cpu())
    return torch.stack(labels), torch.stack(confidences)


def canvas_multiple(model: Segmentor) -> int:
    """What canvas sides are rounded up to."""
    return int(np.lcm(CANVAS, model.multiple))


def fill_colour(model: Segmentor) -> tuple[int, int, int]:
    """The model's mean colour in 0..255: what is outside an image looks like nothing."""
    r, g, b = (round(float(v)) for v in model.mean.flatten())
    return r, g, b


def _stride_logits(model: Segmentor, images_B3HW: Tensor, dtype: torch.dtype) -> Tensor:
    device = model.mean.device
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        return model.forward_stride(images_B3HW.to(device))


@torch.inference_mode()
def _segment_windows(model: Segmentor, image: UInt8, *, overlap: float, dtype: torch.dtype) -> Segmentation:
    height, width = image.shape[:2]
    labels = np.empty((height, width), np.uint8)
    confidence = np.empty((height, width), np.float32)
    stride = model.config.stride
    for row, grid_KRw in _finished_rows(model, image, overlap=overlap, dtype=dtype):
        for top, logits in _upsampled(grid_KRw, row, stride, height, width):
            best, label = logits.softmax(dim=0).max(dim=0)
            labels[top : top + label.shape[0]] = label.cpu().numpy()
            confidence[top : top + label.shape[0]] = best.cpu().numpy()
    return Segmentation(labels, confidence)


def _finished_rows(
    model: Segmentor, image: UInt8, *, overlap: float, dtype: torch.dtype
) -> Iterator[tuple[int, Tensor]]:
    """Yields (first grid row, blended logits (K, rows, w)) downwards; neighbours share one row for upsampling."""
    stride, multiple = model.config.stride, canvas_multiple(model)
    side = max(multiple, model.config.window // multiple * multiple)
    fill = fill_colour(model)
    grid_h, grid_w = -(-image.shape[0] // stride), -(-image.shape[1] // stride)
    cells = side // stride
    tops = _starts(grid_h, cells, overlap)
    lefts = _starts(grid_w, cells, overlap)
    ramp = torch.minimum(torch.arange(1, cells + 1), torch.arange(cells, 0, -1)).float()
    ramp = ramp.clamp_max(max(1, overlap * cells))
    weight = ramp[:, None] * ramp[None, :]

    total = torch.zeros(model.config.num_classes, cells, lefts[-1] + cells)
    norm = torch.zeros(cells, lefts[-1] + cells)
    carried: Tensor | None = None
    for number, top in enumerate(tops):
        for left in lefts:
            window = np.empty((side, side, 3), np.uint8)
            window[:] = fill
            part = image[top * stride : top * stride + side, left * stride : left * stride + side]
            window[: part.shape[0], : part.shape[1]] = part
            logits = _stride_logits(model, torch.from_numpy(window).permute(2, 0, 1)[None], dtype)[0].cpu()
            total[:, :, left : left + cells] += logits * weight
            norm[:, left : left + cells] += weight
        last = number == len(tops) - 1
        done = cells if last else tops[number + 1] - top
        blended = (total[:, :done] / norm[:done])[:, :, :grid_w]
        first = top
        if carried is not None:
            blended, first = torch.cat([carried, blended], dim=1), top - 1
        yield first, blended
        carried = blended[:, -1:]
        total = F.pad(total[:, done:], (0, 0, 0, done))
        norm = F.pad(norm[done:], (0, 0, 0, done))


def _starts(length: int, cells: int, overlap: float) -> list[int]:
    """Evenly stepped window starts that cover `length`; the last window ends at or after the end."""
    if length <= cells:
        return [0]
    step = max(1, round(cells * (1 - overlap)))
    return [*range(0, length - cells, step), length - cells]


def _upsampled(grid_KRw: Tensor, first: int, stride: int, height: int, width: int) -> Iterator[tuple[int, Tensor]]:
    """Yields (first pixel row, logits (K, rows, W)) for the pixel rows that lie between these grid rows, bilinearly.

    Pixel row y reads grid rows around (y + 0.5) / s - 0.5, as align_corners=False does; the image's edges are clamped.
    """
    K, R, _ = grid_KRw.shape
    begin = 0 if first == 0 else first * stride + stride // 2
    is_end = (first + R) * stride >= height
    end = height if is_end else (first + R - 1) * stride + stride // 2
    rows = max(1, UPSAMPLE_BYTES // (4 * K * width))
    for top in range(begin, end, rows):
        y = (torch.arange(top, min(top + rows, end)) + 0.5) / stride - 0.5 - first
        low = y.floor().clamp(0, R - 1).long()
        high = (y.floor() + 1).clamp(0, R - 1).long()
        share = (y - y.floor()).view(1, -1, 1)
        band = grid_KRw[:, low] * (1 - share) + grid_KRw[:, high] * share
        wide = F.interpolate(
            band[None], size=(band.shape[1], band.shape[2] * stride), mode="bilinear", align_corners=False
        )
        yield top, wide[0, :, :, :width]
