"""The steps of bulk segmentation at both ends of the model: read and decode, encode and commit.

Plain callables over rows, so that Ray tasks and threads alike can drive them; without torch, so that a process which
only reads or writes is small. An image that a step cannot take keeps its row, with the stage and the reason, and goes
through to the end. Shapes: H x W pixels, K classes.
"""

from __future__ import annotations

import os
import socket
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines import counters
from pipelines.bulk.commits import CONFIDENCE, FAILED, MASKS, OK, Output, object_key
from pipelines.config import SegmentConfig
from pipelines.errors import RepsepError, StorageError
from pipelines.retries import GaveUpError
from pipelines.storage import Folder
from repsep_model.images import ImageError, decode_image, encode_grey, encode_mask, header_pixels

Row = dict[str, Any]
"""One image on its way: key, etag, size; then pixels (H, W, 3); then labels (H, W), and confidence_map where it is
wanted; all uint8. Without pixels and without an error it is large: the model's step reads and decodes it itself."""

FETCH_BYTES = 256 * 1024 * 1024
"""Encoded bytes that a reading process holds at most, but for a single larger object."""

OBJECT_BYTES = 4 * 1024 * 1024 * 1024
"""Larger objects are no images."""

LARGE_PIXELS = 64 * 1024 * 1024
"""Decoded images over this are not handed from process to process: with the copies they would fill both."""

COUNTED_PIXELS = 1 << 20  # NOTE np.bincount makes eight bytes of each pixel first

_TAKEN = [
    ("n", pa.int64()),  # position in the plan
    ("key", pa.string()),
    ("etag", pa.string()),
    ("size", pa.int64()),
    ("height", pa.int32()),
    ("width", pa.int32()),
    ("stage", pa.string()),
    ("error", pa.string()),
    ("passing", pa.bool_()),  # the store gave no answer for a while: no word on the image
    ("read_s", pa.float32()),
    ("reader", pa.int64()),
]
IMAGE_SCHEMA = pa.schema([*_TAKEN, ("pixels", pa.large_binary())])
LABEL_SCHEMA = pa.schema(
    [
        *_TAKEN,
        ("segment_s", pa.float32()),
        ("segmenter", pa.int64()),
        ("confidence", pa.float64()),
        ("labels", pa.large_binary()),
        ("confidence_map", pa.large_binary()),
    ]
)
DONE_SCHEMA = pa.schema(
    [
        *(f for f in LABEL_SCHEMA if f.name not in ("labels", "confidence", "confidence_map", "etag", "size")),
        ("write_s", pa.float32()),
        ("writer", pa.int64()),
        ("status", pa.string()),
        ("part", pa.string()),  # the commit part, in its first row
    ]
)
"""What the driver learns of an image. A row without status was not committed: it, or all its batch, is not done."""


def to_table(rows: Iterable[Row], schema: pa.Schema) -> pa.Table:
    """Rows as a table. Pixels are not copied: each image's memory is a chunk of its column."""
    rows = list(rows)
    columns = []
    for field in schema:
        values = [row.get(field.name) for row in rows]
        if pa.types.is_large_binary(field.type):
            columns.append(pa.chunked_array([_chunk(v) for v in values], pa.large_binary()))
        else:
            columns.append(pa.chunked_array([pa.array(values, field.type)]))
    return pa.table(columns, schema=schema)


def to_rows(table: pa.Table, channels: Mapping[str, int]) -> list[Row]:
    """The table's rows; columns named in `channels` become (H, W) arrays, or (H, W, C) for more than one channel."""
    rows: list[Row] = table.select([name for name in table.column_names if name not in channels]).to_pylist()
    for name, count in channels.items():
        for row, value in zip(rows, table[name], strict=True):
            shape = (row["height"], row["width"], count) if count > 1 else (row["height"], row["width"])
            row[name] = np.frombuffer(value.as_buffer(), np.uint8).reshape(shape) if value.is_valid else None
    return rows


def _chunk(pixels: np.ndarray[Any, Any] | None) -> pa.Array:
    if pixels is None:
        return pa.nulls(1, pa.large_binary())
    data = pa.py_buffer(np.ascontiguousarray(pixels))
    offsets = pa.py_buffer(np.array([0, data.size], np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def worker_id() -> int:
    """A number for this process, also among those of other machines."""
    return (zlib.crc32(socket.gethostname().encode()) & 0x7FFFFFFF) << 32 | os.getpid()  # it has to fit int64


def decode(row: Row, fetch: Callable[[], bytes], max_pixels: int, *, large_pixels: int | None = None) -> Row:
    """The row with its pixels, or with the stage and the reason for which there are none.

    An image that has over `large_pixels` by its header is left as it is.
    """
    began = time.perf_counter()
    found: Row = {"pixels": None, "height": None, "width": None, "stage": None, "error": None}
    try:
        data = fetch()
    except Exception as error:
        found |= {"stage": "read", "error": reason_of(error), "passing": isinstance(error.__cause__, GaveUpError)}
    else:
        counters.BYTES_READ.add(len(data))
        try:
            if large_pixels is None or not large_pixels < header_pixels(data) <= max_pixels:
                found["pixels"] = image = decode_image(data, max_pixels)
                found |= {"height": image.shape[0], "width": image.shape[1]}
        except Exception as error:
            found |= {"stage": "decode", "error": reason_of(error)}
    return row | found | {"read_s": time.perf_counter() - began, "reader": worker_id()}


class PassingError(StorageError):
    """The store gave no answer for a while: no word on the object, which another round may have."""


def reason_of(error: Exception) -> str:
    """For a row: our own errors say all that a person needs, of others the kind is needed too."""
    if isinstance(error, RepsepError | ImageError):
        return str(error)
    return f"{type(error).__name__}: {error}".removesuffix(": ")


class ReadImages:
    """Listed objects -> decoded images, one at a time; the next ones are fetched meanwhile."""

    def __init__(self, source: str, config: SegmentConfig) -> None:
        self.source, self.config = Folder(source), config
        self.pool = ThreadPoolExecutor(config.runtime.threads, thread_name_prefix="read")

    def __call__(self, todo: Iterable[Row]) -> Iterator[Row]:
        waiting: deque[tuple[Row, Future[bytes]]] = deque()
        held = 0
        for row in todo:
            while waiting and (len(waiting) >= self.config.runtime.threads or held + row["size"] > FETCH_BYTES):
                held -= waiting[0][0]["size"]
                yield self._decoded(waiting.popleft())
            waiting.append((row, self.pool.submit(self._fetch, row)))
            held += row["size"]
        while waiting:
            yield self._decoded(waiting.popleft())

    def _fetch(self, row: Row) -> bytes:
        if row["size"] > OBJECT_BYTES:
            raise StorageError(f"{row['size']} bytes are over the limit of {OBJECT_BYTES} for an image")
        return self.source.read(row["key"], etag=row["etag"], size=row["size"])

    def _decoded(self, fetched: tuple[Row, Future[bytes]]) -> Row:
        row, data = fetched
        return decode(row, data.result, self.config.max_pixels, large_pixels=LARGE_PIXELS)


@dataclass(frozen=True)
class CommitSettings:
    """Where masks go and how they look; hashable, so that a process makes one committer for many batches."""

    source: str
    target: str
    colours: tuple[tuple[int, ...], ...]
    confidence: bool
    model_version: str
    threads: int
    final: bool = False
    """Whether an image that a silent store kept back becomes a failed row; else it is left for another round."""
    generation: str | None = None
    """The output's, as it was claimed."""


def encode(row: Row, settings: CommitSettings) -> Row:
    """The row with its PNGs (`mask`, `confidence_png`) and its pixels per class."""
    if row["error"]:
        return row
    labels, confidence = row.pop("labels"), row.pop("confidence_map")
    flat, counts = labels.ravel(), np.zeros(len(settings.colours), np.int64)
    for start in range(0, flat.size, COUNTED_PIXELS):
        counts += np.bincount(flat[start : start + COUNTED_PIXELS], minlength=len(counts))
    return row | {
        "mask": encode_mask(labels, settings.colours),
        "confidence_png": None if confidence is None else encode_grey(confidence),
        "pixels": counts.tolist(),
    }


class CommitMasks:
    """Labelled images -> masks in the output, then their rows. Returns what the driver learns of them."""

    def __init__(self, settings: CommitSettings) -> None:
        self.settings = settings
        self.source, self.output = Folder(settings.source), Output(Folder(settings.target), settings.generation)
        self.pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="write")

    def __call__(self, labelled: Iterable[Row]) -> list[Row]:
        """Raises StorageError if the rows cannot be committed; a mask that cannot be written is a failed row.

        ReplacedError is one: then another job has the output.
        """
        labelled = list(labelled)
        left = [row for row in labelled if row.get("passing") and not self.settings.final]
        taken = [row for row in labelled if self.settings.final or not row.get("passing")]
        if taken:
            self.output.verify()
        rows = list(self.pool.map(self._written, taken))
        if rows:
            part = self.output.commit([result_row(row, self.source, self.settings.model_version) for row in rows])
            rows[0]["part"] = part
        return rows + left

    def _written(self, row: Row) -> Row:
        began = time.perf_counter()
        row = encode(row, self.settings)
        if not row["error"]:
            try:
                row["mask_uri"] = self._put(MASKS, row["key"], row.pop("mask"))
                if self.settings.confidence:
                    self._put(CONFIDENCE, row["key"], row.pop("confidence_png"))
            except StorageError as error:
                row |= {"stage": "write", "error": reason_of(error)}
        row["status"] = FAILED if row["error"] else OK
        return row | {"write_s": time.perf_counter() - began, "writer": worker_id()}

    def _put(self, prefix: str, key: str, data: bytes) -> str:
        folder = self.output.folder
        where = object_key(prefix, key, ".png", root=folder.path, local=folder.local)
        folder.write(where, data)
        counters.BYTES_WRITTEN.add(len(data))
        return folder.uri_of(where)


def result_row(row: Row, source: Folder, model_version: str, *, key: str | None = None) -> Row:
    """The row as users read it (commits.ROW_SCHEMA). `key` is that of the source object, where it is a shard."""
    ok = not row["error"]
    found = {name: row.get(name) for name in ("key", "etag", "size", "stage", "error", "height", "width")}
    labelled = {name: row[name] if ok else None for name in ("pixels", "confidence", "mask_uri")}
    spent = [row.get(step) or 0.0 for step in ("read_s", "segment_s", "write_s")]
    return (
        found
        | labelled
        | {
            "uri": source.uri_of(key or row["key"]),
            "status": OK if ok else FAILED,
            "seconds": sum(spent),
            "model_version": model_version,
            "finished_at": datetime.now(UTC),
        }
    )
