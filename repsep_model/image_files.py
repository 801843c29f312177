"""Opening encoded images: what kind the bytes are, by their first bytes alone, and which way is up.

Pillow's plugins are called directly. Image.open would try some forty kinds, among them ones that start other programs
(EPS runs Ghostscript), and warns or fails over a limit of the whole process where ours belongs to a call. Nothing here
is decoded yet.
"""

from __future__ import annotations

import io
import re
import struct
import zlib
from collections.abc import Callable

from PIL import BmpImagePlugin, GifImagePlugin, Image, JpegImagePlugin, PngImagePlugin, TiffImagePlugin, WebPImagePlugin
from PIL.ImageFile import ImageFile

ORIENTATION = 0x0112
"""The tag of EXIF and TIFF: 1 to 8, after which 1 is upright and 5 to 8 lie on their side."""


class ImageError(ValueError):
    """An image that cannot be read; the message says why."""


class JpegFile(JpegImagePlugin.JpegImageFile):
    """A JPEG, or the first picture of an MPO, whose EXIF is left alone: damage in it is no damage to the pixels."""

    def _read_dpi_from_exif(self) -> None:
        pass


class TiffFile(TiffImagePlugin.TiffImageFile):
    """The first page of a TIFF, as stored: Pillow would turn it upright in a second buffer."""

    orientation: int = 1

    def _setup(self) -> None:
        self.orientation = self.tag_v2.pop(ORIENTATION, 1)
        super()._setup()

    def load_prepare(self) -> None:
        if self._im is None:  # here Pillow would ask for its own limit
            self.im = Image.new(self.mode, self.size, None).im
        super().load_prepare()

    def load_end(self) -> None:
        """Pillow would read the EXIF, and fail where that is damaged."""


KINDS: tuple[tuple[str, re.Pattern[bytes], Callable[[io.BytesIO], ImageFile]], ...] = (
    ("JPEG", re.compile(rb"\xff\xd8\xff"), JpegFile),
    ("PNG", re.compile(rb"\x89PNG\r\n\x1a\n"), PngImagePlugin.PngImageFile),
    ("WebP", re.compile(rb"RIFF....WEBP", re.DOTALL), WebPImagePlugin.WebPImageFile),
    ("TIFF", re.compile(rb"II[*+]\0|MM\0[*+]"), TiffFile),  # + is BigTIFF
    ("BMP", re.compile(rb"BM"), BmpImagePlugin.BmpImageFile),
    ("GIF", re.compile(rb"GIF8[79]a"), GifImagePlugin.GifImageFile),
)

# What else is met under an image's name: the reason should say it, for nobody looks into each of a thousand objects.
OTHERS: tuple[tuple[re.Pattern[bytes], str], ...] = (
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer: the image itself was never fetched"),
    (re.compile(rb"\s*(<\?xml[^>]*>\s*)?(<!--.*?-->\s*)*(<!DOCTYPE svg[^>]*>\s*)?<svg", re.DOTALL | re.I), "SVG"),
    (re.compile(rb"\s*(<!DOCTYPE html|<html|<head|<body)", re.I), "an HTML page"),
    (re.compile(rb"\s*<\?xml|\s*<[A-Za-z]+>"), "XML"),
    (re.compile(rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51"), "JPEG 2000, which is not taken"),
    (re.compile(rb"....ftyp(avif|avis)", re.DOTALL), "AVIF, which is not taken"),
    (re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL), "HEIC, which is not taken"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "JPEG XL, which is not taken"),
    (re.compile(rb"%!PS|\xc5\xd0\xd3\xc6"), "PostScript, which is not taken"),
    (re.compile(rb"%PDF"), "PDF, which is not taken"),
    (re.compile(rb"8BPS"), "a Photoshop document, which is not taken"),
    (re.compile(rb"P[1-7]\s"), "a portable pixmap (PNM), which is not taken"),
    (re.compile(rb"PK\x03\x04"), "a zip archive"),
    (re.compile(rb"\x1f\x8b"), "gzip data"),
    (re.compile(rb"PAR1"), "Parquet"),
    (re.compile(rb"\s*[{\[]"), "JSON"),
    (re.compile(rb"\0+\Z"), "nothing but zero bytes"),
    (re.compile(rb"\xff\xfe|\xfe\xff|\xef\xbb\xbf|[\t\n\r\x20-\x7e]+\Z"), "text"),
)


def open_image(data: bytes) -> ImageFile:
    """The image as Pillow has it, header read and pixels not; raises ImageError."""
    if not data:
        raise ImageError("the object is empty")
    for kind, magic, plugin in KINDS:
        if magic.match(data):
            try:
                return plugin(io.BytesIO(data))
            except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error and more
                raise ImageError(f"{kind} cannot be decoded, its header is damaged or cut: {error}") from error
    head = data[:512]
    seen = next((f": it is {what}" for pattern, what in OTHERS if pattern.match(head)), "")
    raise ImageError(f"not an image that Pillow can read as JPEG, PNG, WebP, TIFF, BMP or GIF{seen}")


def check_png(data: bytes) -> None:
    """Raises ImageError if a checksum of the pixels differs: Pillow does not ask, zlib misses it in small images."""
    at, view, met = 8, memoryview(data), False
    while at + 8 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + 8 + length
        if kind == b"IDAT":
            met = True
            if data[end : end + 4] != struct.pack(">I", zlib.crc32(view[at + 4 : end])) and end + 4 <= len(data):
                raise ImageError("the checksum of its pixels differs")
        elif met:
            return
        at = end + 4


def orientation_of(image: ImageFile) -> int:
    """1 to 8, of the EXIF or TIFF tag; 1 where there is none or it makes no sense. XMP is not asked.

    The pixels of a PNG must be loaded: its EXIF may stand behind them.
    """
    if isinstance(image, TiffFile):
        return image.orientation if image.orientation in range(1, 9) else 1
    exif = image.info.get("exif")
    return _exif_orientation(exif) if isinstance(exif, bytes) else 1


def _exif_orientation(exif: bytes) -> int:
    # By hand: Pillow warns of much that is wrong with an EXIF, and a reader's warnings may be another's errors.
    exif = exif.removeprefix(b"Exif\0\0")
    order = {b"II": "<", b"MM": ">"}.get(exif[:2])
    if order is None:
        return 1
    try:
        (start,) = struct.unpack_from(f"{order}I", exif, 4)
        (entries,) = struct.unpack_from(f"{order}H", exif, start)
        for entry in range(start + 2, start + 2 + 12 * entries, 12):
            tag, kind, _, value = struct.unpack_from(f"{order}HHIH", exif, entry)
            if tag == ORIENTATION:
                return value if kind == 3 and value in range(1, 9) else 1
    except struct.error:
        pass
    return 1
