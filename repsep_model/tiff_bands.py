"""A large TIFF as a row of small ones: its strips, or its rows of tiles, a few at a time.

Pillow decodes a page whole, at 4 bytes a pixel. Strips and tiles are compressed each on its own, so some of them with
the tags that say how are a TIFF again, and nothing is decoded that a band does not need.
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from typing import Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from repsep_model.image_files import ImageError, TiffFile

PIECE_PIXELS = 1 << 20
"""About how large the small ones are."""

WIDTH, HEIGHT, BITS, COMPRESSION, SAMPLES, PLANES = 256, 257, 258, 259, 277, 284
STRIPS = (273, 279, 278)
TILES = (324, 325, 323)
"""The tags of offsets, lengths, and rows in each."""

# What says how pixels are stored: photometric, fill order, options of fax, predictor, palette, tiles, inks, ...
KEPT: tuple[int, ...] = (BITS, COMPRESSION, 262, 266, SAMPLES, PLANES, 292, 293, 317, 320, 322, 323, 332)
KEPT += (338, 339, 347, 529, 530, 531, 532)  # ... extra samples, sample format, JPEG tables, YCbCr

UNCOMPRESSED, OLD_JPEG, LONG = 1, 6, 4


def pieces(image: TiffFile, data: bytes) -> Iterator[tuple[int, TiffFile]] | None:
    """Consecutive bands of the page, none loaded, each with its first row; None for layouts that cannot be split.

    While they are iterated ImageError is raised for what lies outside of the file.
    """
    tags = image.tag_v2
    offset_tag, length_tag, rows_tag = TILES if TILES[0] in tags else STRIPS
    offsets, lengths = _numbers(tags.get(offset_tag)), _numbers(tags.get(length_tag))
    rows, width, height = tags.get(rows_tag, image.height), image.width, image.height
    if tags.get(PLANES, 1) != 1 or tags.get(COMPRESSION, 1) == OLD_JPEG or not isinstance(rows, int) or rows < 1:
        return None
    tile_width = tags.get(322, width) if offset_tag == TILES[0] else width
    across = -(-width // tile_width)
    if offset_tag == STRIPS[0] and len(offsets) == 1 and tags.get(COMPRESSION, 1) == UNCOMPRESSED:
        offsets, lengths, rows = _strips_of_one(image, offsets[0])
    if not (len(offsets) == len(lengths) == across * -(-height // rows)) or len(offsets) == across:
        return None
    step = max(1, PIECE_PIXELS // (rows * width))

    def each() -> Iterator[tuple[int, TiffFile]]:
        for first in range(0, -(-height // rows), step):
            part = slice(first * across, (first + step) * across)
            stored = [_cut(data, at, length) for at, length in zip(offsets[part], lengths[part], strict=True)]
            top = first * rows
            changed = {WIDTH: width, HEIGHT: min(step * rows, height - top), rows_tag: rows}
            yield top, TiffFile(io.BytesIO(_written(image, changed, offset_tag, length_tag, stored)))

    return each()


def _strips_of_one(image: TiffFile, start: int) -> tuple[list[int], list[int], int]:
    """Offsets and lengths of strips that one uncompressed strip can be taken for, and the rows in each."""
    bits = _numbers(image.tag_v2.get(BITS, 1))
    samples = image.tag_v2.get(SAMPLES, 1)
    in_row = -(-image.width * (sum(bits) if len(bits) == samples else bits[0] * samples) // 8)
    rows = max(1, PIECE_PIXELS // image.width)
    tops = range(0, image.height, rows)
    return [start + top * in_row for top in tops], [min(rows, image.height - top) * in_row for top in tops], rows


def _written(image: TiffFile, changed: dict[int, int], offset_tag: int, length_tag: int, stored: list[bytes]) -> bytes:
    """A TIFF of these strips or tiles, described as the image describes its own."""
    tags, old = ImageFileDirectory_v2(prefix=image.tag_v2.prefix), image.tag_v2
    for tag in KEPT:
        if tag in old:
            tags.tagtype[tag] = old.tagtype[tag]
            tags[tag] = old[tag]
    ends = [0]
    for part in stored:
        ends.append(ends[-1] + len(part))
    long: dict[int, Any] = changed | {offset_tag: tuple(ends[:-1]), length_tag: tuple(map(len, stored))}
    for tag, value in long.items():
        tags.tagtype[tag] = LONG
        tags[tag] = value
    if offset_tag == TILES[0]:  # Pillow adds where the pixels begin to the offsets of strips alone
        start = 8 + len(tags.tobytes(8))
        tags[offset_tag] = tuple(start + end for end in ends[:-1])
    out = io.BytesIO()
    tags.save(out)
    return out.getvalue() + b"".join(stored)


def _cut(data: bytes, at: int, length: int) -> bytes:
    if at + length > len(data):
        raise ImageError(f"TIFF cannot be decoded: it is truncated, pixels at {at} to {at + length} of {len(data)}")
    return data[at : at + length]


def _numbers(value: Any) -> list[int]:
    return list(value) if isinstance(value, tuple) else [] if value is None else [value]
