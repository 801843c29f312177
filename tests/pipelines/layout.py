"""Small data sets in the default layout, made by hand: what is in them, and what is wrong with them, is chosen here.

Shapes: H x W pixels.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipelines.dataset import Dataset

Bytes = NDArray[np.uint8]

CLASSES: list[dict[str, Any]] = [
    {"id": 0, "name": "sky", "color": [70, 130, 180]},
    {"id": 1, "name": "road", "color": [128, 64, 128]},
    {"id": 2, "name": "tree", "color": [107, 142, 35]},
]
HEIGHT, WIDTH = 24, 32


def write_classes(folder: Path, classes: Sequence[dict[str, Any]] = CLASSES, **more: Any) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "classes.json").write_text(json.dumps({"classes": list(classes)} | more))


def picture(number: int, height: int = HEIGHT, width: int = WIDTH) -> Bytes:
    """(H, W, 3), another one for every number."""
    return np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)


def ids(number: int, height: int = HEIGHT, width: int = WIDTH) -> Bytes:
    """(H, W) ids of CLASSES in blocks, some ignored."""
    rng = np.random.default_rng(1000 + number)
    coarse = rng.choice(np.array([0, 1, 2, 255], np.uint8), (height // 4 + 1, width // 4 + 1), p=[0.4, 0.3, 0.2, 0.1])
    return np.kron(coarse, np.ones((4, 4), np.uint8))[:height, :width]


def encoded(pixels: Bytes, kind: str = "PNG", **how: Any) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind, **how)
    return out.getvalue()


def write_pair(
    folder: Path, key: str, number: int, *, image: bytes | None = None, mask: bytes | None = b"", suffix: str = ".jpg"
) -> None:
    """images/<key>.jpg and masks/<key>.png; `mask=None` leaves it out."""
    for part, ending, data in (
        ("images", suffix, image if image is not None else encoded(picture(number), "JPEG")),
        ("masks", ".png", encoded(ids(number)) if mask == b"" else mask),
    ):
        if data is not None:
            path = folder / part / f"{key}{ending}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def write_source(folder: Path, keys: Sequence[str]) -> Path:
    """A source with a pair for each key."""
    write_classes(folder, name="drawn")
    for number, key in enumerate(keys):
        write_pair(folder, key, number)
    return folder


def rows_of(dataset: Dataset, split: str) -> list[dict[str, Any]]:
    """Every row of a split, in order."""
    found = []
    for shard in dataset.manifest["splits"][split]["shards"]:
        with dataset.folder.open(shard["file"]) as handle:
            found += pq.read_table(handle).to_pylist()
    return found


def rejects_of(workspace: Path) -> dict[str, str]:
    """Key -> reason, of the only preparation in a workspace."""
    (file,) = workspace.rglob("rejects.parquet")
    return {row["key"]: row["reason"] for row in pq.read_table(file).to_pylist()}
