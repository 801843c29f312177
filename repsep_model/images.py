"""Encoded bytes to arrays and back: one rule for each kind of image file.

Photographs become uint8 RGB, masks are single-channel ids: never converted, never interpolated.

    what a file holds             what becomes of it
    ----------------------------  ---------------------------------------------------------------------------------
    the wrong extension           nothing: the kind is told by the first bytes alone
    JPEG                          RGB by libjpeg; grey repeated; CMYK and YCCK (Adobe's inverted ones too) by Pillow's
                                  plain formula; of an MPO the first picture
    PNG                           1, 2, 4, 8 bit, interlaced, palettes looked up; of an APNG the default image
    WebP                          lossy and lossless; of an animation the first frame
    TIFF                          the first page: strips, tiles or planes, 1 to 16 bit, CMYK, palettes, any compression
                                  that libtiff has; BigTIFF
    BMP                           bottom-up and top-down, 1 to 32 bit, RLE, OS/2
    GIF                           the first frame
    16 bits a channel             the high byte (of 12 bits the upper 8)
    32-bit integers, floats       refused: no range is agreed on for them
    alpha, transparent colours    dropped; the colours beneath stay as they are
    EXIF or TIFF orientation      applied; one that is damaged or not in 1 to 8 counts as upright
    ICC profile                   ignored, damaged or not
    a part of a file              refused, never half grey, wherever it was cut, also where an end marker follows or the
                                  header claims more; other damage in a JPEG's scan cannot be seen
    more pixels than the limit    refused before anything is decoded, by the header
    anything else                 refused: HEIC, AVIF, JPEG 2000, SVG, PDF, ...

Pixels are taken out of Pillow's buffer (4 bytes each) in bands of rows, and turned upright on their way: a decode peaks
at 7 bytes a pixel plus the file, and a large TIFF in strips or tiles (`repsep_model.tiff_bands`) at 3.
Shapes: H x W pixels, K classes.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from PIL.ImageFile import ImageFile

from repsep_model.image_files import ImageError, JpegFile, TiffFile, check_png, open_image, orientation_of
from repsep_model.jpeg_scan import may_end_early, with_more_bits
from repsep_model.tiff_bands import pieces

__all__ = [
    "MAX_PIXELS",
    "ImageError",
    "UInt8",
    "decode_image",
    "decode_mask",
    "encode_grey",
    "encode_mask",
    "image_size",
    "overlay",
]

UInt8 = NDArray[np.uint8]

MAX_PIXELS = 178_956_970
"""Larger images are refused, as Pillow does: a decompression bomb is a few kilobytes that decode to gigabytes."""

BAND_PIXELS = 1 << 17
"""How much is converted at a time: it stays in the cache, and malloc has it at hand."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an orientation upright."""

ON_ITS_SIDE = 5
"""From this orientation on rows are stored as columns."""

LARGE = 1 << 24
"""TIFFs over this many pixels are decoded a few strips or tiles at a time."""


def image_size(data: bytes) -> tuple[int, int]:
    """(height, width) after the orientation, from the header alone; raises ImageError."""
    image = open_image(data)
    width, height = image.size
    if image.format == "PNG":  # its EXIF may stand behind the pixels
        _check_size(image, MAX_PIXELS)
        _load(image, data)
    return (width, height) if orientation_of(image) >= ON_ITS_SIDE else (height, width)


def header_pixels(data: bytes) -> int:
    """Height times width by the header; nothing is decoded. Raises ImageError."""
    width, height = open_image(data).size
    return int(width * height)


def decode_image(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8:
    """JPEG, PNG, WebP, TIFF, BMP or GIF bytes -> (H, W, 3) uint8 RGB. Raises ImageError for anything not whole."""
    upright, orientation, doubtful = _decoded(data, max_pixels)
    if doubtful:  # by now Pillow's buffer is gone, so there may be another one
        _compare(upright, orientation, data)
    return upright


def decode_mask(data: bytes, max_pixels: int = MAX_PIXELS) -> UInt8:
    """A single-channel 8-bit image -> (H, W) uint8 ids. Raises ImageError, also for colour masks."""
    image = open_image(data)
    _check_size(image, max_pixels)
    # Grey of 1, 2 or 4 bits: Pillow would scale it to 0..255, which are other ids.
    packed = any(str(tile.args).startswith(("1", "L;", "('1", "('L;")) for tile in image.tile)
    if image.mode not in ("L", "P") or (image.mode == "L" and packed):
        raise ImageError(f"a mask must have one 8-bit channel of class ids, this one is {image.mode}")
    turn = TURNS.get(orientation_of(_load(image, data)))
    return np.array(image if turn is None else image.transpose(turn))


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


def _decoded(data: bytes, max_pixels: int) -> tuple[UInt8, int, bool]:
    """The image upright, the orientation it was stored in, and whether it may be less than whole."""
    image = open_image(data)
    _check_size(image, max_pixels)
    if image.mode in ("I", "F"):
        what = "float" if image.mode == "F" else "32-bit or signed integer"
        raise ImageError(f"{image.format} holds {what} samples, which have no agreed range: save it with 8 or 16 bits")
    high_byte = 4 if any("I;12" in str(tile.args) for tile in image.tile) else 8
    parts = _parts(image, data)
    orientation = orientation_of(image)
    width, height = image.size[::-1] if orientation >= ON_ITS_SIDE else image.size
    upright = np.empty((height, width, 3), np.uint8)
    for top, part in parts:
        _place(upright, orientation, top, part.height)[:] = _rgb(_turned(part, orientation), high_byte)
    return upright, orientation, isinstance(image, JpegFile) and may_end_early(image)


def _check_size(image: ImageFile, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        raise ImageError(f"{image.width} x {image.height} pixels are over the limit of {max_pixels}")


def _load(image: ImageFile, data: bytes | None = None) -> ImageFile:
    try:
        if data is not None and image.format == "PNG":
            check_png(data)
        image.load()
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
        raise ImageError(f"{image.format} cannot be decoded: {error}") from error
    image.info.pop("transparency", None)  # else Pillow warns when it looks up a palette
    return image


def _parts(image: ImageFile, data: bytes) -> Iterator[tuple[int, Image.Image]]:
    """Consecutive rows of the image, loaded, each with the first one's number; raises ImageError."""
    if (
        isinstance(image, TiffFile)
        and image.width * image.height > LARGE
        and (small := pieces(image, data)) is not None
    ):
        return ((top + row, band) for top, piece in small for row, band in _bands(_load(piece)))
    return _bands(_load(image, data))


def _bands(image: Image.Image) -> Iterator[tuple[int, Image.Image]]:
    """Yields consecutive rows of the image with the first one's number."""
    rows = max(1, BAND_PIXELS // image.width)
    if rows >= image.height:
        yield 0, image
        return
    for top in range(0, image.height, rows):
        yield top, image.crop((0, top, image.width, min(top + rows, image.height)))


def _rgb(band: Image.Image, high_byte: int) -> UInt8:
    """(R, W, 3), or (R, W, 1) of a grey band; wider than 8 bits, what is above `high_byte`."""
    if band.mode.startswith("I;16"):
        grey: UInt8 = (np.asarray(band) >> high_byte).astype(np.uint8)
        return grey[..., None]
    if band.mode == "L":
        return np.asarray(band)[..., None]
    try:
        return np.asarray(band if band.mode == "RGB" else band.convert("RGB"))
    except ValueError as error:
        raise ImageError(f"cannot be decoded: Pillow does not convert {band.mode} to RGB") from error


def _turned(band: Image.Image, orientation: int) -> Image.Image:
    return band if orientation == 1 else band.transpose(TURNS[orientation])


def _place(upright: UInt8, orientation: int, top: int, rows: int) -> UInt8:
    """The part of the upright image (H, W, 3) that so many stored rows become, a view."""
    lengthwise = upright.swapaxes(0, 1) if orientation >= ON_ITS_SIDE else upright
    start = lengthwise.shape[0] - top - rows if orientation in (3, 4, 6, 7) else top
    part = lengthwise[start : start + rows]
    return part.swapaxes(0, 1) if orientation >= ON_ITS_SIDE else part


def _compare(upright: UInt8, orientation: int, data: bytes) -> None:
    """Raises ImageError if a JPEG's pixels change with bits that follow its scan: then it ended early."""
    try:
        same = all(
            (_place(upright, orientation, top, band.height) == _rgb(_turned(band, orientation), 8)).all()
            for top, band in _bands(_load(with_more_bits(data)))
        )
    except Exception:  # the bits were decoded
        same = False
    if not same:
        raise ImageError("JPEG cannot be decoded: its scan ends before the last pixel")
