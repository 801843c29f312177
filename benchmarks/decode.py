"""Peak memory and time of decoding large images: python -m benchmarks.decode [--side 20000]

Each file is written once, into a temporary folder, and read and decoded by a process that does nothing else. Its peak
is VmHWM: the kernel's ru_maxrss of a child begins with its parent's.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

DECODE = """
import re, sys, time
from pathlib import Path
from repsep_model.images import decode_image
data = Path(sys.argv[1]).read_bytes()
before = time.process_time()
height, width, _ = decode_image(data, max_pixels=10**10).shape
seconds = time.process_time() - before
peak = re.search(r"VmHWM:\\s*(\\d+)", Path("/proc/self/status").read_text())[1]
print(height * width, len(data), seconds, int(peak) * 1024)
"""


def measure(file: Path) -> tuple[int, int, float, int]:
    """Pixels, bytes of the file, CPU seconds of decoding, and the peak of the process in bytes."""
    done = subprocess.run([sys.executable, "-c", DECODE, str(file)], capture_output=True, text=True, check=True)
    pixels, size, seconds, peak = done.stdout.split()
    return int(pixels), int(size), float(seconds), int(peak)


def photograph(side: int) -> Image.Image:
    """Smooth with a little noise, so that it compresses about as a photograph does."""
    patch = 1000
    y, x = np.mgrid[:patch, :patch]
    ramps = np.stack([y * 200 // patch, x * 200 // patch, (x + y) * 100 // patch], axis=2)
    noisy = (ramps + np.random.default_rng(0).integers(0, 20, (patch, patch, 3))).astype(np.uint8)
    image, tile = Image.new("RGB", (side, side)), Image.fromarray(noisy)
    for top in range(0, side, patch):
        for left in range(0, side, patch):
            image.paste(tile, (left, top))
    return image


def writers(side: int) -> dict[str, Callable[[Path], None]]:
    def saved(kind: str, **options: Any) -> Callable[[Path], None]:
        return lambda file: photograph(side).save(file, kind, **options)

    turned = Image.Exif()
    turned[0x0112] = 6
    return {
        "JPEG": saved("JPEG", quality=90),
        "JPEG on its side": saved("JPEG", quality=90, exif=turned.tobytes()),
        "JPEG progressive": saved("JPEG", quality=90, progressive=True),
        "TIFF uncompressed": saved("TIFF"),
        "TIFF one strip": saved("TIFF", strip_size=2**40),
        "TIFF LZW": saved("TIFF", compression="tiff_lzw"),
        "TIFF deflate": saved("TIFF", compression="tiff_adobe_deflate"),
        "TIFF JPEG": saved("TIFF", compression="jpeg"),
        "PNG": saved("PNG", compress_level=1),
    }


def rows(side: int, only: str) -> Iterator[str]:
    with tempfile.TemporaryDirectory() as folder:
        for name, write in writers(side).items():
            if only not in name:
                continue
            file = Path(folder) / "image"
            write(file)
            pixels, size, seconds, peak = measure(file)
            yield (
                f"{name:20} {size / 2**20:8.0f} {seconds:8.1f} {pixels / 1e6 / seconds:8.0f}"
                f" {peak / 2**30:10.2f} {peak / pixels:8.1f}"
            )


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--side", type=int, default=20_000)
    arguments.add_argument("--only", default="", help="files whose name contains this")
    options = arguments.parse_args()
    print(f"{options.side} x {options.side}       file MiB    CPU s     MP/s   peak GiB  B/pixel")
    for row in rows(options.side, options.only):
        print(row, flush=True)


if __name__ == "__main__":
    main()
