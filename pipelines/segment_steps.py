"""The three steps of bulk segmentation as plain callables: read and decode, segment, encode and commit.

They pass Arrow tables to each other and know nothing of Ray, so that threads can drive them as well. An image that
cannot be read or segmented keeps its row, with the stage and the reason, and goes through to the end.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from pipelines.commits import CONFIDENCE, FAILED, MASKS, OK, Output, object_key
from pipelines.config import SegmentConfig
from pipelines.errors import StorageError
from pipelines.models import load_files
from pipelines.storage import Folder
from repsep_model.images import ImageError, UInt8, decode_image, encode_grey, encode_mask
from repsep_model.inference import canvas_multiple, fill_colour, fits_whole, segment_batch, segment_image
from repsep_model.transforms import canvas

IO_THREADS = 8
LISTED_SCHEMA = pa.schema([("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
IMAGE_SCHEMA = pa.schema(
    [
        *LISTED_SCHEMA,
        ("pixels", pa.large_binary()),  # (H, W, 3) uint8
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("seconds", pa.float32()),
    ]
)
LABEL_SCHEMA = pa.schema([*IMAGE_SCHEMA, ("confidence", pa.large_binary())]).set(
    3, pa.field("labels", pa.large_binary())
)


class ReadImages:
    """Listed objects -> decoded images."""

    def __init__(self, source: str, config: SegmentConfig) -> None:
        self.source, self.config = Folder(source), config
        self.pool = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="read")

    def __call__(self, todo: pa.Table) -> pa.Table:
        return pa.Table.from_pylist(list(self.pool.map(self.read, todo.to_pylist())), schema=IMAGE_SCHEMA)

    def read(self, row: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        found: dict[str, Any] = {"pixels": None, "height": None, "width": None, "stage": None, "error": None}
        try:
            image = decode_image(self.source.read(row["key"]), self.config.max_pixels)
            found |= {"pixels": image.tobytes(), "height": image.shape[0], "width": image.shape[1]}
        except StorageError as error:
            found |= {"stage": "read", "error": str(error)}
        except ImageError as error:
            found |= {"stage": "decode", "error": str(error)}
        return row | found | {"seconds": time.perf_counter() - began}


class SegmentImages:
    """Decoded images -> labels and confidence. Holds the model; one call at a time.

    Images of one canvas shape share a call. The model is always called with `model_batch` images, short groups padded
    with blanks, so that an image's mask does not depend on its neighbours.
    """

    def __init__(self, files: Mapping[str, bytes], config: SegmentConfig) -> None:
        self.config = config
        device = "cuda" if torch.cuda.is_available() else "cpu"
        if device == "cpu":
            torch.set_num_threads(1)
        self.model = load_files(files).to(device)
        self.dtype = torch.bfloat16 if config.bf16 else torch.float32

    def __call__(self, images: pa.Table) -> pa.Table:
        rows = images.to_pylist()
        groups: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            row |= {"labels": None, "confidence": None}
            if row["error"] is None:
                groups[self._shape(row)].append(row)
        for shape, members in groups.items():
            size = self.config.model_batch
            for start in range(0, len(members), size):
                self._segment(members[start : start + size], shape)
        for row in rows:
            del row["pixels"]
        return pa.Table.from_pylist(rows, schema=LABEL_SCHEMA)

    def _shape(self, row: dict[str, Any]) -> tuple[int, int]:
        """The canvas's size; (0, 0) for images that go by windows, each alone."""
        if not fits_whole(self.model, row["height"], row["width"], self.config.pixel_budget):
            return 0, 0
        multiple = canvas_multiple(self.model)
        return tuple(-(-row[side] // multiple) * multiple for side in ("height", "width"))

    def _segment(self, rows: list[dict[str, Any]], shape: tuple[int, int]) -> None:
        began = time.perf_counter()
        images = [np.frombuffer(r["pixels"], np.uint8).reshape(r["height"], r["width"], 3) for r in rows]
        try:
            found = self._windows(images) if shape == (0, 0) else self._whole(images, shape)
        except (RuntimeError, MemoryError) as error:  # torch says out of memory with a RuntimeError
            for row in rows:
                row |= {"stage": "segment", "error": f"{type(error).__name__}: {error}"}
            return
        seconds = (time.perf_counter() - began) / len(rows)
        for row, (labels, confidence) in zip(rows, found, strict=True):
            row |= {"labels": labels.tobytes(), "confidence": confidence.tobytes(), "seconds": row["seconds"] + seconds}

    def _windows(self, images: list[UInt8]) -> list[tuple[UInt8, UInt8]]:
        found = [segment_image(self.model, image, pixel_budget=0, dtype=self.dtype) for image in images]
        return [(f.labels, _as_bytes(f.confidence)) for f in found]

    def _whole(self, images: list[UInt8], shape: tuple[int, int]) -> list[tuple[UInt8, UInt8]]:
        batch = np.zeros((self.config.model_batch, *shape, 3), np.uint8)
        for i, image in enumerate(images):
            batch[i] = canvas(image, canvas_multiple(self.model), fill_colour(self.model))
        labels, confidence = segment_batch(self.model, torch.from_numpy(batch).permute(0, 3, 1, 2), dtype=self.dtype)
        sizes = [image.shape[:2] for image in images]
        return [(labels[i, :h, :w].numpy(), _as_bytes(confidence[i, :h, :w].numpy())) for i, (h, w) in enumerate(sizes)]


@dataclass(frozen=True)
class CommitSettings:
    """Where masks go and how they look; hashable, so that a process makes one committer for many batches."""

    source: str
    target: str
    colours: tuple[tuple[int, ...], ...]
    confidence: bool
    model_version: str


class CommitMasks:
    """Labels -> masks in the output, then the batch's rows. Returns the rows' keys and states for the driver."""

    def __init__(self, settings: CommitSettings) -> None:
        self.settings = settings
        self.source, self.output = Folder(settings.source), Output(Folder(settings.target))
        self.pool = ThreadPoolExecutor(IO_THREADS, thread_name_prefix="write")

    def __call__(self, labels: pa.Table) -> pa.Table:
        rows = list(self.pool.map(self.write, labels.to_pylist()))
        self.output.commit(rows)
        columns = ("key", "status", "stage", "error", "height", "width")
        return pa.Table.from_pylist([{name: row[name] for name in columns} for row in rows])

    def write(self, found: dict[str, Any]) -> dict[str, Any]:
        began = time.perf_counter()
        folder, key = self.output.folder, found["key"]
        row: dict[str, Any] = {
            name: found[name] for name in ("key", "etag", "size", "height", "width", "stage", "error")
        }
        row |= {
            "uri": self.source.uri_of(key),
            "model_version": self.settings.model_version,
            "status": FAILED if found["error"] else OK,
        }
        if not found["error"]:
            size = (found["height"], found["width"])
            labels = np.frombuffer(found["labels"], np.uint8).reshape(size)
            confidence = np.frombuffer(found["confidence"], np.uint8).reshape(size)
            where = object_key(MASKS, key, ".png", root=folder.path, local=folder.local)
            folder.write(where, encode_mask(labels, self.settings.colours))
            if self.settings.confidence:
                folder.write(
                    object_key(CONFIDENCE, key, ".png", root=folder.path, local=folder.local), encode_grey(confidence)
                )
            row |= {
                "mask_uri": folder.uri_of(where),
                "pixels": np.bincount(labels.ravel(), minlength=len(self.settings.colours)).tolist(),
                "confidence": float(confidence.mean()) / 255,
            }
        return row | {"seconds": found["seconds"] + time.perf_counter() - began, "finished_at": datetime.now(UTC)}


def failed_row(
    todo: Mapping[str, Any], *, source: Folder, model_version: str, stage: str, error: str
) -> dict[str, Any]:
    """The row of an image that no step could finish."""
    row = {
        "uri": source.uri_of(todo["key"]),
        "status": FAILED,
        "stage": stage,
        "error": error,
        "model_version": model_version,
    }
    return {name: todo[name] for name in ("key", "etag", "size")} | row | {"finished_at": datetime.now(UTC)}


def _as_bytes(confidence: Any) -> UInt8:
    """Probabilities as 0..255."""
    scaled: UInt8 = np.rint(confidence * 255).astype(np.uint8)
    return scaled
