"""The files that hold rows: their schema, the manifest that says which are current, and how they are read.

Reading goes through `read_each`: several requests at a time, but only so many bytes under way.
"""

from __future__ import annotations

import json
import posixpath
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipelines.bulk.attempts import OK
from pipelines.bulk.listing import pages
from pipelines.errors import StorageError
from pipelines.storage import Entry, Folder

T = TypeVar("T")
RESULTS, COMMITS, MANIFESTS = "results", "_commits", "results/_manifests"
READ_THREADS = 16
IN_FLIGHT = 8 * 1024 * 1024
BATCH_ROWS = 8192

ROW_SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("size", pa.int64()),
        ("status", pa.string()),
        ("stage", pa.string()),
        ("error", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("pixels", pa.list_(pa.int64())),
        ("confidence", pa.float32()),
        ("seconds", pa.float32()),
        ("model_version", pa.string()),
        ("mask_uri", pa.string()),
        ("finished_at", pa.timestamp("us", tz="UTC")),
    ]
)


@dataclass(frozen=True)
class Totals:
    """Sums over rows; `pixels` and `class_images` have an entry for each class, megapixels are those of ok rows."""

    rows: int = 0
    ok: int = 0
    failed: int = 0
    megapixels: float = 0.0
    pixels: list[int] = field(default_factory=list)
    class_images: list[int] = field(default_factory=list)

    def __add__(self, other: Totals) -> Totals:
        return Totals(
            self.rows + other.rows,
            self.ok + other.ok,
            self.failed + other.failed,
            self.megapixels + other.megapixels,
            [a + b for a, b in zip_longest(self.pixels, other.pixels, fillvalue=0)],
            [a + b for a, b in zip_longest(self.class_images, other.class_images, fillvalue=0)],
        )


def totals_of(rows: pa.Table) -> Totals:
    """The sums over a table with the columns of ROW_SCHEMA."""
    ok = rows.filter(pc.equal(rows["status"], OK))
    areas = pc.multiply(ok["height"].cast(pa.int64()), ok["width"].cast(pa.int64()))
    lists = pa.concat_arrays(ok["pixels"].chunks or [pa.array([], ROW_SCHEMA.field("pixels").type)])
    lengths = pc.list_value_length(lists).fill_null(0).to_numpy()
    values = lists.flatten().to_numpy()
    classes = np.arange(len(values)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    pixels = np.zeros(lengths.max(initial=0), np.int64)
    np.add.at(pixels, classes, values)
    images = np.bincount(classes[values > 0], minlength=len(pixels))
    megapixels = (pc.sum(areas).as_py() or 0) / 1e6
    failed = rows.num_rows - ok.num_rows
    return Totals(rows.num_rows, ok.num_rows, failed, megapixels, pixels.tolist(), images.tolist())


@dataclass(frozen=True)
class Part:
    """A file of the current results: its key in the output, its size and its sums."""

    key: str
    bytes: int
    totals: Totals


@dataclass(frozen=True)
class Manifest:
    """Which parts are current. Number 0 is that of an output without results."""

    number: int = 0
    parts: tuple[Part, ...] = ()

    @property
    def totals(self) -> Totals:
        return sum((part.totals for part in self.parts), Totals())

    @property
    def files(self) -> list[tuple[str, int]]:
        """(key, size) of each part, as `read_each` takes them."""
        return [(part.key, part.bytes) for part in self.parts]

    def create(self, folder: Folder) -> bool:
        """Make this the current manifest; False if another has its number."""
        content = {"parts": [asdict(part) for part in self.parts], "written_at": time.time()}
        return folder.create(f"{MANIFESTS}/{self.number:08d}.json", json.dumps(content).encode())


def newest_manifest(folder: Folder) -> Manifest:
    newest = max((entry.key for entry in entries_in(folder, MANIFESTS)), default=None)
    if newest is None:
        return Manifest()
    parts = json.loads(folder.read(newest))["parts"]
    number = int(posixpath.basename(newest).partition(".")[0])
    return Manifest(number, tuple(Part(p["key"], p["bytes"], Totals(**p["totals"])) for p in parts))


def entries_in(folder: Folder, name: str) -> Iterator[Entry]:
    """What lies in a folder of the output, keys relative to the output; nothing where the output is not there."""
    for page in pages_in(folder, name):
        yield from page


def pages_in(folder: Folder, name: str) -> Iterator[list[Entry]]:
    """The same in pages."""
    try:
        for page in pages(folder / name, threads=1):
            yield [Entry(f"{name}/{entry.key}", entry.size, entry.etag) for entry in page]
    except StorageError as error:
        if not (folder.local and is_missing(error)):
            raise


def commits_in(folder: Folder) -> list[tuple[str, int]]:
    """(key, size) of each commit, as `read_each` takes them."""
    return [(entry.key, entry.size) for entry in entries_in(folder, COMMITS)]


def read_each(
    folder: Folder, files: Iterable[tuple[str, int]], read: Callable[[bytes], T], *, in_flight: int = IN_FLIGHT
) -> Iterator[tuple[str, T | None]]:
    """(key, what `read` makes of the file) in order; None for a file that is not there.

    Requests go side by side while their files' sizes are under `in_flight` bytes together. `read` is called in the
    caller's thread: Arrow keeps memory back for every thread that it has worked in.
    """

    def get(key: str) -> bytes | None:
        try:
            return folder.read(key)
        except StorageError as error:
            if is_missing(error):
                return None
            raise

    waiting: deque[tuple[str, int, Future[bytes | None]]] = deque()
    under_way = 0

    def first() -> tuple[str, T | None]:
        nonlocal under_way
        key, size, future = waiting.popleft()
        under_way -= size
        data = future.result()
        return key, None if data is None else read(data)

    with ThreadPoolExecutor(READ_THREADS) as pool:
        try:
            for key, size in files:
                while waiting and (under_way + size > in_flight or len(waiting) >= 2 * READ_THREADS):
                    yield first()
                waiting.append((key, size, pool.submit(get, key)))
                under_way += size
            while waiting:
                yield first()
        finally:
            for _, _, future in waiting:
                future.cancel()


def rows_in(data: bytes, columns: list[str] | None = None) -> pa.Table:
    """A file's rows. In this thread alone: the files are small and read side by side."""
    # Not pq.read_table, which loads the data-set library: 40 MB.
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        return file.read(columns=columns, use_threads=False)


def batches_in(data: bytes, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """A file's rows, some thousand at a time."""
    with pq.ParquetFile(pa.BufferReader(data)) as file:
        yield from file.iter_batches(BATCH_ROWS, columns=columns, use_threads=False)


def is_missing(error: StorageError) -> bool:
    """Whether it says that an object is not there."""
    return isinstance(error.__cause__, FileNotFoundError)
