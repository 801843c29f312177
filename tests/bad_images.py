"""Objects as they are met in a bucket, each with what must become of it: bad ones, and odd ones that are good.

Made by code, none from elsewhere. `BAD[key]` is an object's key and extension, its bytes when asked for, and either the
(height, width) that it decodes to or a part of the reason why it does not; `tolerance` is how far the mean of its
pixels may be from `picture` of that size.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
from PIL import Image

from repsep_model.images import UInt8
from tests.image_writers import bmp, exif_with, png, png_chunk, png_chunks, tiff

HEIGHT, WIDTH = 48, 80


@dataclass
class Case:
    """One kind of object. `shape` where it is decoded, else `reason`, as a failed row of the stage `decode` has it."""

    make: Callable[[], bytes]
    shape: tuple[int, int] | None = None
    reason: str = ""
    tolerance: float | None = None

    @cached_property
    def data(self) -> bytes:
        return self.make()


def picture(height: int = HEIGHT, width: int = WIDTH) -> UInt8:
    """A smooth ramp with another colour in each corner: which way is up can be seen, and JPEG keeps it."""
    y, x = np.mgrid[:height, :width]
    ramp = [y * 255 // height, x * 255 // width, (x + y) * 255 // (height + width)]
    return np.stack(ramp, axis=2).astype(np.uint8)


def grey() -> UInt8:
    return picture()[..., 1]


def encoded(image: Image.Image | UInt8, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(out, format=kind, **options)
    return out.getvalue()


@cache
def jpeg() -> bytes:
    return encoded(picture(), "JPEG", quality=95, subsampling=0)


@cache
def noisy(kind: str, **options: Any) -> bytes:
    """Noise fills the file with pixels: a cut at any share of it goes through them."""
    noise = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3)).astype(np.uint8)
    return encoded(noise, kind, **options)


def stored_as(orientation: int) -> UInt8:
    """What a camera stores so that this orientation turns it back to `picture`."""
    p = picture()
    turned = {1: p, 2: p[:, ::-1], 3: p[::-1, ::-1], 4: p[::-1], 5: p.transpose(1, 0, 2), 6: np.rot90(p, 1)}
    turned |= {7: p[::-1, ::-1].transpose(1, 0, 2), 8: np.rot90(p, -1)}
    return np.ascontiguousarray(turned[orientation])


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new) :]


def with_jpeg_size(data: bytes, height: int, width: int) -> bytes:
    """Another size in the frame header, whatever the scan holds."""
    return patched(data, data.index(b"\xff\xc0") + 5, struct.pack(">HH", height, width))


def ycck() -> bytes:
    """YCCK as Photoshop writes it: Pillow writes CMYK, here the planes YCbCr of the inverted picture and no black."""
    inverted = np.array(Image.fromarray(255 - picture()).convert("YCbCr"))
    planes = np.dstack([inverted, np.full((HEIGHT, WIDTH), 255, np.uint8)])
    data = encoded(Image.fromarray(255 - planes, "CMYK"), "JPEG", quality=95, subsampling=0)
    return patched(data, data.index(b"Adobe\0") + 11, b"\x02")


def header_only_png(width: int, height: int) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return png_chunks(png_chunk(b"IHDR", header), png_chunk(b"IDAT", zlib.compress(b"\0")), png_chunk(b"IEND", b""))


def bomb_png(side: int = 30_000) -> bytes:
    """A whole PNG: 900 megapixels of one bit, all black, in a hundredth of a megabyte."""
    squeeze = zlib.compressobj(9)
    row = bytes(1 + side // 8)
    pixels = b"".join(squeeze.compress(row * 1000) for _ in range(side // 1000)) + squeeze.flush()
    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    return png_chunks(png_chunk(b"IHDR", header), png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b""))


def text_bomb_png() -> bytes:
    """A comment of a few kilobytes that expands to 64 megabytes, before the pixels."""
    data = encoded(picture(), "PNG")
    return data[:33] + png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(1 << 26), 9)) + data[33:]


def frames(kind: str, **options: Any) -> bytes:
    """An animation whose first frame is the picture, and further ones are not."""
    more = [Image.fromarray(255 - picture()), Image.fromarray(np.zeros_like(picture()))]
    return encoded(picture(), kind, save_all=True, append_images=more, **options)


def planes16() -> Any:
    return (picture().astype(np.uint16) << 8) + 77


def palette_image() -> Image.Image:
    return Image.fromarray(picture()).quantize(64)


def utf16(text: str) -> bytes:
    return b"\xff\xfe" + text.encode("utf-16-le")


def random_bytes(count: int) -> bytes:
    return np.random.default_rng(3).integers(0, 256, count).astype(np.uint8).tobytes()


def good(make: Callable[[], bytes], tolerance: float | None = 3, shape: tuple[int, int] = (HEIGHT, WIDTH)) -> Case:
    return Case(make, shape=shape, tolerance=tolerance)


def bad(make: Callable[[], bytes] | bytes, reason: str) -> Case:
    return Case((lambda: make) if isinstance(make, bytes) else make, reason=reason)


def _cut(kind: str, share: float, **options: Any) -> Callable[[], bytes]:
    return lambda: (data := noisy(kind, **options))[: int(len(data) * share)]


NOT = "not an image"
CUT = "cannot be decoded"
LIMIT = "over the limit"
CUTS: Sequence[tuple[str, str, dict[str, Any]]] = (
    ("jpg", "JPEG", {}),
    ("progressive.jpg", "JPEG", {"progressive": True}),
    ("png", "PNG", {}),
    ("webp", "WEBP", {"lossless": True}),
    ("lossy.webp", "WEBP", {"quality": 90}),
    ("tif", "TIFF", {}),
    ("lzw.tif", "TIFF", {"compression": "tiff_lzw"}),
    ("bmp", "BMP", {}),
)

BAD: dict[str, Case] = {
    # No image at all.
    "zero-bytes.jpg": bad(b"", "the object is empty"),
    "one-byte.png": bad(b"\x89", NOT),
    "magic-only.jpg": bad(b"\xff\xd8\xff", CUT),
    "magic-only.png": bad(b"\x89PNG\r\n\x1a\n", CUT),
    "magic-only.tif": bad(b"II*\0", CUT),
    "magic-only.webp": bad(b"RIFF\x10\0\0\0WEBP", CUT),
    "magic-only.bmp": bad(b"BM", CUT),
    "nul-bytes.png": bad(bytes(4096), "zero bytes"),
    "random.jpg": bad(lambda: b"\x17" + random_bytes(4096), NOT),
    "error-page.jpg": bad(b"<!DOCTYPE html>\n<html><body>403 Forbidden</body></html>", "HTML"),
    "access-denied.jpg": bad(b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "XML"),
    "vector.png": bad(b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', "SVG"),
    "labels.png": bad(json.dumps({"image": "a.jpg", "boxes": [[0, 0, 5, 5]]}).encode(), "JSON"),
    "notes.jpg": bad(b"these are the notes of tuesday\n", "text"),
    "notes-utf16.jpg": bad(utf16("these are the notes of tuesday\r\n"), "text"),
    "lfs-pointer.png": bad(b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n", "LFS pointer"),
    "link.jpg": bad(b"../originals/0001.jpg", "text"),
    "archive.png": bad(b"PK\x03\x04" + bytes(60), "zip archive"),
    "packed.jpg": bad(b"\x1f\x8b\x08\0" + bytes(30), "gzip"),
    "document.tif": bad(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n", "PDF"),
    "script.jpg": bad(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "PostScript"),
    "pixmap.bmp": bad(b"P6\n2 2\n255\n" + bytes(12), "PNM"),
    "jpeg2000.jpg": bad(lambda: encoded(picture(), "JPEG2000"), "JPEG 2000"),
    "heic.jpg": bad(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64), "HEIC"),
    "avif.jpg": bad(b"\0\0\0\x1cftypavif\0\0\0\0avifmif1miaf" + bytes(64), "AVIF"),
    "jpeg-xl.jpg": bad(b"\xff\x0a" + bytes(20), "JPEG XL"),
    "photoshop.tif": bad(b"8BPS\0\x01" + bytes(30), "Photoshop"),
    # The wrong extension, and what is not a still picture.
    "really-a-png.jpg": good(lambda: encoded(picture(), "PNG"), 0),
    "really-a-jpeg.png": good(jpeg),
    "really-a-gif.bmp": good(lambda: encoded(palette_image(), "GIF"), 12),
    "animated-gif.png": good(lambda: frames("GIF"), 12),
    "animated.webp": good(lambda: frames("WEBP", lossless=True), 0),
    "animated.png": good(lambda: frames("PNG"), 0),
    "multi-picture.jpg": good(lambda: frames("MPO", quality=95)),
    "multi-page.tif": good(lambda: frames("TIFF"), 0),
    # Sizes.
    "one-pixel.png": good(lambda: encoded(picture(1, 1), "PNG"), 0, (1, 1)),
    "one-column.png": good(lambda: encoded(picture(20_000, 1), "PNG"), 0, (20_000, 1)),
    "one-row.jpg": good(lambda: encoded(picture(1, 20_000), "JPEG", quality=95, subsampling=0), 3, (1, 20_000)),
    "65500-wide.jpg": good(lambda: encoded(picture(8, 65_500), "JPEG", quality=95, subsampling=0), 3, (8, 65_500)),
    "bomb.png": bad(bomb_png, LIMIT),
    "bomb-header.png": bad(lambda: header_only_png(2**31 - 1, 2**31 - 1), LIMIT),
    "bomb-header.jpg": bad(lambda: with_jpeg_size(jpeg(), 65_535, 65_535), LIMIT),
    "bomb-header.tif": bad(lambda: tiff(picture(), {257: (4, [4_000_000_000])}), LIMIT),
    "bomb-header.bmp": bad(lambda: patched(encoded(picture(), "BMP"), 18, struct.pack("<ii", 2**30, 2**30)), LIMIT),
    "bomb-text.png": bad(text_bomb_png, CUT),
    "zero-width.png": bad(lambda: header_only_png(0, 10), CUT),
    "zero-height.jpg": bad(lambda: with_jpeg_size(jpeg(), 0, WIDTH), CUT),
    "zero-width.bmp": bad(lambda: patched(encoded(picture(), "BMP"), 18, struct.pack("<i", 0)), CUT),
    "zero-width.tif": bad(lambda: tiff(picture(), {256: (4, [0])}), CUT),
    "taller-than-it-is.jpg": bad(lambda: with_jpeg_size(jpeg(), 2 * HEIGHT, WIDTH), CUT),
    "taller-and-restarts.jpg": bad(
        lambda: with_jpeg_size(noisy("JPEG", restart_marker_blocks=1), 2 * HEIGHT, WIDTH), "ends before the last pixel"
    ),
    "wider-than-it-is.jpg": bad(lambda: with_jpeg_size(jpeg(), HEIGHT, 2 * WIDTH), CUT),
    "taller-than-it-is.bmp": bad(lambda: patched(encoded(picture(), "BMP"), 22, struct.pack("<i", 2 * HEIGHT)), CUT),
    "taller-than-it-is.tif": bad(lambda: tiff(picture(), {257: (4, [2 * HEIGHT])}), CUT),
    # Colours and depths.
    "cmyk.jpg": good(lambda: encoded(Image.fromarray(picture()).convert("CMYK"), "JPEG", quality=95), 6),
    "ycck.jpg": good(ycck, 4),
    "cmyk.tif": good(lambda: encoded(Image.fromarray(picture()).convert("CMYK"), "TIFF"), 0),
    "grey.jpg": good(lambda: encoded(grey(), "JPEG"), None),
    "progressive.jpg": good(lambda: encoded(picture(), "JPEG", quality=95, progressive=True)),
    "restarts.jpg": good(lambda: encoded(picture(), "JPEG", quality=95, restart_marker_blocks=2)),
    "all-mid-grey.jpg": good(lambda: encoded(np.full((HEIGHT, WIDTH, 3), 128, np.uint8), "JPEG"), None),
    "alpha.png": good(lambda: encoded(np.dstack([picture(), grey()]), "PNG"), 0),
    "grey-and-alpha.png": good(lambda: encoded(Image.fromarray(np.dstack([grey(), grey()]), "LA"), "PNG"), None),
    "palette.png": good(lambda: encoded(palette_image(), "PNG"), 12),
    "palette-with-transparency.png": good(lambda: encoded(palette_image(), "PNG", transparency=bytes(range(64))), 12),
    "one-bit.png": good(lambda: encoded(Image.fromarray(grey() > 99), "PNG"), None),
    "two-bit.png": good(lambda: encoded(Image.fromarray(picture()).quantize(4), "PNG", bits=2), 60),
    "16-bit.png": good(lambda: encoded(Image.fromarray(planes16()[..., 0]), "PNG"), None),
    "16-bit-rgb.png": good(lambda: png(planes16()), 0),
    "16-bit-interlaced.png": good(lambda: png(planes16(), interlaced=True), 0),
    "exif-after-the-pixels.png": good(lambda: png(stored_as(6), after=png_chunk(b"eXIf", exif_with(6)[6:])), 0),
    "16-bit.tif": good(lambda: encoded(Image.fromarray(planes16()[..., 0]), "TIFF"), None),
    "16-bit-rgb.tif": good(lambda: tiff(planes16()), 0),
    "16-bit-rgb-big-endian.tif": good(lambda: tiff(planes16(), order=">"), 0),
    "interlaced.png": good(lambda: png(picture(), interlaced=True), 0),
    "one-bit.tif": good(lambda: encoded(Image.fromarray(grey() > 99), "TIFF", compression="group4"), None),
    "deflate.tif": good(lambda: tiff(picture(), deflate=True), 0),
    "tiled-deflate.tif": good(lambda: tiff(picture(), deflate=True, tile=32), 0),
    "tiled.tif": good(lambda: tiff(picture(), tile=16), 0),
    "planar.tif": good(lambda: tiff(picture(), planar=True), 0),
    "big.tif": good(lambda: tiff(picture(), big=True), 0),
    "float.tif": bad(lambda: encoded(Image.fromarray(grey().astype(np.float32) / 255), "TIFF"), "float samples"),
    "integers-32-bit.tif": bad(lambda: encoded(Image.fromarray(grey().astype(np.int32)), "TIFF"), "integer samples"),
    "five-channels.tif": bad(lambda: tiff(np.dstack([picture(), picture()[..., :2]]), {277: (3, [5])}), CUT),
    "lossless.webp": good(lambda: encoded(picture(), "WEBP", lossless=True), 0),
    "alpha.webp": good(lambda: encoded(np.dstack([picture(), grey()]), "WEBP", lossless=True, exact=True), 0),
    "bottom-up.bmp": good(lambda: bmp(picture()), 0),
    "top-down.bmp": good(lambda: bmp(picture(), top_down=True), 0),
    "os2.bmp": good(lambda: bmp(picture(), os2=True), 0),
    "rle.bmp": good(lambda: bmp(grey(), rle=True), None),
    # Damage.
    "icc-garbage.jpg": good(lambda: encoded(picture(), "JPEG", quality=95, icc_profile=random_bytes(300))),
    "icc-garbage.png": good(lambda: encoded(picture(), "PNG", icc_profile=random_bytes(300)), 0),
    "icc-not-zlib.png": good(
        lambda: (d := encoded(picture(), "PNG"))[:33] + png_chunk(b"iCCP", b"x\0\0abc") + d[33:], 0
    ),
    "icc-garbage.tif": good(lambda: encoded(picture(), "TIFF", icc_profile=random_bytes(300)), 0),
    "exif-garbage.jpg": good(lambda: encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0" + random_bytes(99))),
    "exif-cut.jpg": good(lambda: encoded(picture(), "JPEG", quality=95, exif=exif_with(6)[:-9])),
    "exif-offset.jpg": good(lambda: encoded(picture(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff\xff\x7f")),
    "exif-orientation-9.jpg": good(lambda: encoded(picture(), "JPEG", quality=95, exif=exif_with(9))),
    "exif-orientation-0.png": good(lambda: encoded(picture(), "PNG", exif=exif_with(0)), 0),
    "no-end-marker.jpg": bad(lambda: jpeg()[:-2], "truncated"),
    "cut-and-ended.jpg": bad(lambda: jpeg()[: len(jpeg()) // 2] + b"\xff\xd9", "ends before the last pixel"),
    "trailing-garbage.jpg": good(lambda: jpeg() + random_bytes(500)),
    "zeros-in-the-middle.jpg": bad(lambda: patched(jpeg(), len(jpeg()) // 2, bytes(200)), "ends before the last pixel"),
    "two-frames.jpg": bad(lambda: jpeg()[: jpeg().index(b"\xff\xda")] + jpeg()[2:], CUT),
    "no-huffman-tables.jpg": good(lambda: jpeg().replace(b"\xff\xc4", b"\xff\xec")),  # the standard's, as in MJPEG
    "no-quantisation.jpg": bad(lambda: jpeg().replace(b"\xff\xdb", b"\xff\xec"), CUT),
    "header-crc.png": bad(lambda: patched(encoded(picture(), "PNG"), 29, b"\0\0\0\0"), CUT),
    "pixel-crc.png": bad(lambda: (d := encoded(picture(), "PNG"))[:-16] + b"\0\0\0\0" + d[-12:], "checksum"),
    "pixels-changed.png": bad(lambda: patched(noisy("PNG"), len(noisy("PNG")) // 2, b"\0\0\0\0"), "checksum"),
    "no-pixels.png": bad(lambda: encoded(picture(), "PNG")[:33] + png_chunk(b"IEND", b""), CUT),
    "no-end-chunk.png": good(lambda: encoded(picture(), "PNG")[:-12], 0),
    "strip-outside.tif": bad(lambda: tiff(picture(), {273: (4, [10_000_000])}), CUT),
    "directory-outside.tif": bad(b"II*\0\xff\xff\xff\x7f" + bytes(100), CUT),
    "directory-in-a-circle.tif": good(lambda: tiff(picture(), next_ifd=8), 0),
    "palette-outside.bmp": bad(lambda: patched(encoded(palette_image(), "BMP"), 46, struct.pack("<I", 70_000)), CUT),
    "riff-length.webp": bad(lambda: patched(noisy("WEBP"), 4, b"\xff\xff\xff\x0f"), CUT),
}
BAD |= {
    f"orientation-{n}.{end}": good(
        lambda n=n, kind=kind, options=options: encoded(stored_as(n), kind, exif=exif_with(n), **options), tolerance
    )
    for n in range(1, 9)
    for end, kind, options, tolerance in (
        ("jpg", "JPEG", {"quality": 95, "subsampling": 0}, 3),
        ("png", "PNG", {}, 0),
        ("webp", "WEBP", {"lossless": True}, 0),
    )
}
BAD |= {f"orientation-{n}.tif": good(lambda n=n: tiff(stored_as(n), {274: (3, [n])}), 0) for n in range(1, 9)}
BAD |= {
    f"cut-at-{percent}-percent.{end}": bad(_cut(kind, percent / 100, **options), CUT)
    for end, kind, options in CUTS
    for percent in (10, 50, 90, 99)
}
BAD |= {
    f"cut-at-{percent}-percent-deflate.tif": bad(
        lambda percent=percent: (d := tiff(picture(), deflate=True))[: len(d) * percent // 100], CUT
    )
    for percent in (50, 99)
}
