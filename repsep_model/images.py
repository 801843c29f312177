"""Encoded bytes to arrays and back: one rule for each kind of image file.

Photographs become uint8 RGB: EXIF orientation is applied, alpha is dropped, palettes, grey and CMYK are converted by
Pillow, 16-bit grey keeps its high byte. Masks are single-channel ids: never converted, never interpolated.
Shapes: H x W pixels, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

UInt8 = NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""Larger images are refused, as Pillow does: a decompression bomb is a few kilobytes that decode to gigabytes."""


class ImageError(ValueError):
    """An image that cannot be read; the message says why."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) after EXIF orientation, from the header alone; raises ImageError."""
    with _open(data) as image:
        width, height = image.size
        try:
            rotated = image.getexif().get(0x0112, 1) in (5, 6, 7, 8)
        except Exception as error:  # a PNG may hold its EXIF after the pixels: Pillow reads all of it
            raise ImageError(f"{image.format} cannot be decoded: {error}") from error
        return (width, height) if rotated else (height, width)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8:
    """JPEG, PNG, WebP, TIFF or BMP bytes -> (H, W, 3) uint8 RGB. Raises ImageError for anything not whole."""
    with _open(data) as image:
        if image.width * image.height > max_pixels:
            raise ImageError(f"{image.width} x {image.height} pixels are over the limit of {max_pixels}")
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16") or upright.mode == "I":
                upright = Image.fromarray((np.asarray(upright).astype(np.uint32) >> 8).astype(np.uint8))
            if upright.mode == "P" and "transparency" in upright.info:
                upright = upright.convert("RGBA")  # straight to RGB, Pillow warns
            return np.array(upright.convert("RGB"))  # a copy: torch wants writable memory
        except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
            raise ImageError(f"{image.format} cannot be decoded: {error}") from error


def decode_mask(data: bytes) -> UInt8:
    """A single-channel 8-bit image -> (H, W) uint8 ids. Raises ImageError, also for colour masks."""
    with _open(data) as image:
        # Grey of 1, 2 or 4 bits: Pillow would scale it to 0..255, which are other ids.
        packed = any(str(tile.args).startswith(("1", "L;", "('1", "('L;")) for tile in getattr(image, "tile", ()))
        if image.mode not in ("L", "P") or (image.mode == "L" and packed):
            raise ImageError(f"a mask must have one 8-bit channel of class ids, this one is {image.mode}")
        try:
            return np.array(image)
        except Exception as error:
            raise ImageError(f"{image.format} cannot be decoded: {error}") from error


def encode_mask(ids: UInt8, colours: Sequence[Sequence[int]]) -> bytes:
    """(H, W) uint8 ids -> indexed PNG whose palette holds the class colours. The same ids give the same bytes."""
    # The same bytes read as palette indices: convert("P") would make a palette of its own and other indices.
    image = Image.frombytes("P", (ids.shape[1], ids.shape[0]), np.ascontiguousarray(ids).tobytes())
    # Pillow writes as few bits as the palette needs, 8 from 17 colours on: with 5 colours an id of 255 would become 15.
    size = max(17, int(ids.max(initial=0)) + 1)
    palette = [*colours, *[(0, 0, 0)] * (size - len(colours))]
    image.putpalette([channel for colour in palette for channel in colour])
    out = io.BytesIO()
    image.save(out, format="PNG", compress_level=3)
    return out.getvalue()


def encode_grey(values: UInt8) -> bytes:
    """(H, W) uint8 -> 8-bit grey PNG."""
    out = io.BytesIO()
    Image.fromarray(values).save(out, format="PNG", compress_level=3)
    return out.getvalue()


def overlay(image: UInt8, ids: UInt8, colours: Sequence[Sequence[int]], opacity: float = 0.55) -> UInt8:
    """The image with its classes' colours on top, (H, W, 3) uint8; ids without a colour are left bare."""
    table = np.zeros((256, 3), np.float32)
    table[: len(colours)] = np.asarray(colours, np.float32)
    alpha = np.zeros((256, 1), np.float32)
    alpha[: len(colours)] = opacity
    blended = image * (1 - alpha[ids]) + table[ids] * alpha[ids]
    return blended.round().astype(np.uint8)


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("the object is empty")
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(str(error)) from error
    except Exception as error:
        raise ImageError(f"not an image that Pillow can read ({type(error).__name__})") from error
