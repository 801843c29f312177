"""What Pillow reads and does not write: TIFF in tiles and planes, old and odd BMP, interlaced PNG, bare EXIF."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

SIZES = {1: "B", 2: "B", 3: "H", 4: "I", 7: "B", 16: "Q"}
"""struct formats of TIFF's BYTE, ASCII, SHORT, LONG, UNDEFINED and LONG8."""


def exif_with(orientation: int) -> bytes:
    """An EXIF block that holds the orientation alone."""
    return b"Exif\0\0II*\0" + struct.pack("<IHHHIHHI", 8, 1, 0x0112, 3, 1, orientation, 0, 0)


def tiff(
    array: Any,
    changes: Mapping[int, tuple[int, Sequence[int]]] | None = None,
    *,
    order: str = "<",
    tile: int = 0,
    rows_per_strip: int = 7,
    planar: bool = False,
    deflate: bool = False,
    big: bool = False,
    next_ifd: int = 0,
) -> bytes:
    """(H, W) or (H, W, C) of uint8 or uint16 as TIFF, its directory before its pixels.

    `changes` replaces tags: {tag: (type, values)}. `tile` is the side of square tiles instead of strips.
    """
    array = np.atleast_3d(array)
    height, width, channels = array.shape
    bits = 8 * array.itemsize
    parts = [
        zlib.compress(part) if deflate else part
        for layer in (np.split(array, channels, axis=2) if planar else [array])
        for part in _parts(layer.astype(array.dtype.newbyteorder(order)), tile, rows_per_strip)
    ]
    tags: dict[int, tuple[int, Sequence[int]]] = {
        256: (4, [width]),
        257: (4, [height]),
        258: (3, [bits] * channels),
        259: (3, [8 if deflate else 1]),
        262: (3, [2 if channels >= 3 else 1]),
        277: (3, [channels]),
        284: (3, [2 if planar else 1]),
    }
    tags |= {322: (3, [tile]), 323: (3, [tile])} if tile else {278: (4, [rows_per_strip])}
    offsets, counts = (324, 325) if tile else (273, 279)
    kind = 16 if big else 4
    tags |= {offsets: (kind, [0] * len(parts)), counts: (kind, [len(p) for p in parts])} | dict(changes or {})
    start = len(_directory(tags, order, big, next_ifd))
    if offsets not in (changes or {}):
        ends = np.cumsum([start, *map(len, parts)])
        tags[offsets] = kind, [int(end) for end in ends[:-1]]
    return _directory(tags, order, big, next_ifd) + b"".join(parts)


def _parts(layer: Any, tile: int, rows: int) -> Iterator[bytes]:
    height, width = layer.shape[:2]
    if not tile:
        yield from (layer[top : top + rows].tobytes() for top in range(0, height, rows))
        return
    padded = np.pad(layer, ((0, -height % tile), (0, -width % tile), (0, 0)))
    for top in range(0, height, tile):
        yield from (padded[top : top + tile, left : left + tile].tobytes() for left in range(0, width, tile))


def _directory(tags: Mapping[int, tuple[int, Sequence[int]]], order: str, big: bool, next_ifd: int) -> bytes:
    """Header, directory and the values that do not fit into it."""
    mark = b"II" if order == "<" else b"MM"
    word, room = ("Q", 8) if big else ("I", 4)
    head = mark + (struct.pack(f"{order}HHHQ", 43, 8, 0, 16) if big else struct.pack(f"{order}HI", 42, 8))
    count = struct.pack(f"{order}{'Q' if big else 'H'}", len(tags))
    at = len(head) + len(count) + len(tags) * (4 + 2 * room) + room
    entries, beyond = b"", b""
    for tag, (kind, values) in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}{SIZES[kind]}", *values)
        if len(packed) > room:
            where = struct.pack(order + word, at + len(beyond))
            beyond += packed + bytes(len(packed) % 2)
        else:
            where = packed.ljust(room, b"\0")
        entries += struct.pack(f"{order}HH{word}", tag, kind, len(values)) + where
    return head + count + entries + struct.pack(order + word, next_ifd) + beyond


def bmp(array: Any, *, top_down: bool = False, os2: bool = False, rle: bool = False) -> bytes:
    """(H, W, 3) as 24-bit BMP, or (H, W) with a grey palette, then perhaps run-length encoded."""
    height, width = array.shape[:2]
    grey = array.ndim == 2
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256)) if grey else b""
    rows = array if top_down else array[::-1]
    if rle:
        pixels = b"".join(b"".join(bytes([1, value]) for value in row) + b"\0\0" for row in rows.tolist()) + b"\0\1"
    else:
        rows = rows if grey else rows[..., ::-1]
        pixels = b"".join(row.tobytes() + bytes(-row.nbytes % 4) for row in np.ascontiguousarray(rows))
    bits = 8 if grey else 24
    if os2:
        header = struct.pack("<IHHHH", 12, width, height, 1, bits)
    else:
        high = -height if top_down else height
        header = struct.pack("<IiiHHIIiiII", 40, width, high, 1, bits, int(rle), len(pixels), 0, 0, 0, 0)
    start = 14 + len(header) + len(palette)
    return b"BM" + struct.pack("<IHHI", start + len(pixels), 0, 0, start) + header + palette + pixels


def png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_chunks(*chunks: bytes) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png(array: Any, *, interlaced: bool = False, chunk: int = 1 << 20, after: bytes = b"") -> bytes:
    """(H, W) or (H, W, 3) of uint8 or uint16; `chunk` bytes in each IDAT, `after` are chunks behind the pixels."""
    array = np.asarray(array)
    height, width = array.shape[:2]
    values = array.astype(array.dtype.newbyteorder(">"))
    adam7 = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1))
    passes = [values[y::dy, x::dx] for y, x, dy, dx in adam7] if interlaced else [values]
    rows = b"".join(b"\0" + row.tobytes() for part in passes if part.size for row in np.ascontiguousarray(part))
    pixels = zlib.compress(rows)
    colour = 2 if array.ndim == 3 else 0
    header = struct.pack(">IIBBBBB", width, height, 8 * array.itemsize, colour, 0, 0, int(interlaced))
    return png_chunks(
        png_chunk(b"IHDR", header),
        *(png_chunk(b"IDAT", pixels[i : i + chunk]) for i in range(0, len(pixels), chunk)),
        after,
        png_chunk(b"IEND", b""),
    )
