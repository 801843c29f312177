"""Whether a JPEG's scan holds all the pixels that its header promises.

libjpeg fills what is missing before the end marker with mid-grey, and Pillow says nothing of its warning. But grey in
the last corner of a picture is rare enough to look twice: bytes put before the end marker are skipped where the scan is
complete, and become pixels where it is not. What is missing of the last block alone is not seen.
"""

from __future__ import annotations

import io
import re
import struct

from PIL.ImageFile import ImageFile

from repsep_model.image_files import JpegFile

_MARKER = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]")  # neither a stuffed 0xff, nor a restart, nor a fill byte
_EOI = 0xD9
# With every restart marker, for a scan may also end where the next one is expected.
_MORE_BITS = b"".join(b"\x55" * 16 + bytes([0xFF, 0xD0 + n]) for n in range(8)) + b"\x55" * 16


def may_end_early(image: ImageFile) -> bool:
    """Whether the last pixel of a loaded JPEG is what libjpeg fills with."""
    last = image.getpixel((image.width - 1, image.height - 1))
    return all(126 <= value <= 129 for value in (last if isinstance(last, tuple) else (last or 0,)))


def with_more_bits(data: bytes) -> JpegFile:
    """The same JPEG with more bits at the end of its last scan; raises what Pillow raises."""
    end = _end_of_image(data)
    return JpegFile(io.BytesIO(data[:end].rstrip(b"\xff") + _MORE_BITS + data[end:]))


def _end_of_image(data: bytes) -> int:
    """Where the end marker of the first picture is."""
    at = 2
    while (found := _MARKER.search(data, at)) is not None:
        kind, at = data[found.end() - 1], found.end()
        if kind == _EOI:
            return found.start()
        at += struct.unpack_from(">H", data, at)[0]
    return len(data)
