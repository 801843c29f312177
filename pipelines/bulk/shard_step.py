"""Bulk segmentation of shards: one is read whole in one place and committed by one PUT of all its masks.

Reading, decoding and encoding run in threads beside the model: with a request for a shard instead of two for each
image, threads suffice. A shard that cannot be read at all is one failed row under the shard's own key.
"""

from __future__ import annotations

import functools
import multiprocessing
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool

from pipelines import counters
from pipelines.bulk.commits import FAILED, MASKS, OK, Output, object_key
from pipelines.bulk.model_step import SegmentImages
from pipelines.bulk.shards import Member, ShardError, mask_table, read_shard
from pipelines.bulk.steps import CommitSettings, PassingError, Row, decode, encode, result_row, worker_id
from pipelines.bulk.threaded import drive
from pipelines.config import SegmentConfig
from pipelines.errors import StorageError
from pipelines.retries import GaveUpError
from pipelines.storage import Folder
from repsep_model.images import ImageError, header_pixels

MODEL_IMAGES = 16  # times model_batch: so many are sorted by shape together
DECODED_BYTES = 1024 * 1024 * 1024
"""Decoded pixels that are held at most, but for a single larger image."""


class SegmentShards:
    """A listed shard -> masks/<shard>.parquet and the rows of its images.

    In the final attempt images are decoded in a process of their own: the one that kills it becomes a row (stage
    `worker`).
    """

    def __init__(
        self,
        files: Mapping[str, bytes],
        config: SegmentConfig,
        settings: CommitSettings,
        *,
        gpu: bool = False,
        threads: int = 1,
    ) -> None:
        self.config, self.settings = config, settings
        self.source, self.output = Folder(settings.source), Output(Folder(settings.target), settings.generation)
        self.segment = SegmentImages(files, config, gpu=gpu, threads=threads)
        self.decode = _Isolated() if settings.final else decode

    def __call__(self, shard: Row) -> list[Row]:
        """What the driver learns of the shard's images.

        Raises StorageError if they cannot be committed, PassingError if the store is silent and this attempt not final.
        """
        try:
            rows = list(self._segmented(shard))
        except ShardError as error:
            rows = [self._whole(shard, "decode", str(error))]
        except StorageError as error:
            if isinstance(error.__cause__, GaveUpError) and not self.settings.final:
                raise PassingError(str(error)) from error
            rows = [self._whole(shard, "read", str(error))]
        if any(not row["error"] for row in rows):
            self.output.verify()
            uri = self._put(shard, rows)
            for row in rows:
                row["mask_uri"] = uri
        model, key = self.settings.model_version, shard["key"]
        part = self.output.commit([result_row(row, self.source, model, key=key) for row in rows])
        rows[0]["part"] = part
        return [row | {"status": FAILED if row["error"] else OK, "writer": worker_id()} for row in rows]

    def _segmented(self, shard: Row) -> Iterator[Row]:
        members = read_shard(
            self.source,
            shard["key"],
            image_column=self.config.image_column,
            key_column=self.config.key_column,
            include=self.config.include,
        )
        return drive(
            members,
            decode=functools.partial(self._decoded, shard),
            segment=self.segment,
            encode=functools.partial(encode, settings=self.settings),
            threads=self.config.runtime.threads,
            batch=MODEL_IMAGES * self.config.model_batch,
            weigh=_decoded_bytes,
            capacity=DECODED_BYTES,
        )

    def _decoded(self, shard: Row, member: Member) -> Row:
        row = {name: shard[name] for name in ("n", "etag")}
        row |= {"key": f"{shard['key']}#{member.name}", "name": member.name, "size": len(member.data or b"")}
        data = member.data
        if data is None:
            missing = {"pixels": None, "height": None, "width": None, "stage": "read", "error": member.error}
            return row | missing
        return self.decode(row, lambda: data, self.config.max_pixels)

    def _put(self, shard: Row, rows: list[Row]) -> str:
        folder = self.output.folder
        where = object_key(MASKS, shard["key"], ".parquet", root=folder.path, local=folder.local)
        table = mask_table(
            (
                {
                    "key": row["name"],
                    "mask": row.get("mask"),
                    "confidence": row.get("confidence_png"),
                    "height": row["height"],
                    "width": row["width"],
                    "status": FAILED if row["error"] else OK,
                    "error": row["error"],
                }
                for row in rows
            ),
            confidence=self.settings.confidence,
        )
        folder.write(where, table)
        counters.BYTES_WRITTEN.add(len(table))
        return folder.uri_of(where)

    def _whole(self, shard: Row, stage: str, error: str) -> Row:
        return shard | {"height": None, "width": None, "stage": stage, "error": error}


def _decoded_bytes(member: Member) -> int:
    """What the image takes when decoded, from its header."""
    try:
        return 3 * header_pixels(member.data or b"")
    except ImageError:
        return 0


class _Isolated:
    """`decode` in a process that may die of an image."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.pool = self._start()

    def __call__(self, row: Row, fetch: Callable[[], bytes], max_pixels: int) -> Row:
        with self.lock:
            try:
                return self.pool.submit(_decode, row, fetch(), max_pixels).result()
            except BrokenProcessPool:
                self.pool = self._start()
        reason = "the process that decoded it died (a decoder's crash, or memory)"
        return row | {"pixels": None, "height": None, "width": None, "stage": "worker", "error": reason}

    def _start(self) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))


def _decode(row: Row, data: bytes, max_pixels: int) -> Row:
    return decode(row, lambda: data, max_pixels)
