"""A contact sheet of all 16 corruptions in 5 severities, to be looked at.

    python benchmarks/corruptions.py [--image photo.jpg] --out corruptions.png

Without a photograph it takes a generated scene.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from pipelines.scenes import render_scene
from repsep_model.corruptions import CATEGORIES, SEVERITIES, corrupt, corruption_rng
from repsep_model.images import UInt8, decode_image

TILE = (160, 120)
MARGIN = 110
HEADER = 18


def contact_sheet(image: UInt8) -> Image.Image:
    """One row a corruption, named on the left; the clean image first, then severity 1 to 5."""
    names = [name for members in CATEGORIES.values() for name in members]
    width, height = TILE
    sheet = Image.new("RGB", (MARGIN + width * (1 + len(SEVERITIES)), HEADER + height * len(names)), "white")
    draw = ImageDraw.Draw(sheet)
    for column, title in enumerate(["clean", *(f"severity {s}" for s in SEVERITIES)]):
        draw.text((MARGIN + column * width + 4, 3), title, fill="black")
    for row, name in enumerate(names):
        top = HEADER + row * height
        draw.text((4, top + height // 2 - 6), name, fill="black")
        tiles = [image, *(corrupt(image, name, s, corruption_rng("sheet", name, s)) for s in SEVERITIES)]
        for column, tile in enumerate(tiles):
            small = Image.fromarray(tile).resize(TILE, Image.Resampling.LANCZOS)
            sheet.paste(small, (MARGIN + column * width, top))
    return sheet


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--image", type=Path)
    parser.add_argument("--out", type=Path, default=Path("corruptions.png"))
    options = parser.parse_args()
    image = decode_image(options.image.read_bytes()) if options.image else np.asarray(render_scene(0, 3)[0])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(image).save(options.out)
    print(f"{options.out}: {image.shape[1]} x {image.shape[0]} pixels, 16 corruptions x 5 severities")


if __name__ == "__main__":
    main()
