"""Row groups of Parquet shards: one range read each, and a shard's footer is read and parsed once.

Local or over the network alike. pyarrow by itself reads the footer again for every row group, and a file object of
fsspec reads ahead what nobody asked for.
"""

from __future__ import annotations

import io
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.shard_cache import ShardCache
from pipelines.storage import Folder, storage_errors

FOOTERS = 1024
"""Shards whose parsed footers are kept, some 10 KB each."""

TAIL = 64 * 1024
"""Bytes from a shard's end in which its footer is expected; a longer one takes a second read."""


class ShardReader:
    """Reads row groups of a split's shards, through the cache if there is one. Safe to use from several threads."""

    def __init__(self, folder: Folder, shards: Sequence[dict[str, Any]], cache: ShardCache | None = None) -> None:
        self.folder, self.shards, self.cache = folder, shards, cache
        self._footers: OrderedDict[int, pq.FileMetaData] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, shard: int, row_group: int, columns: Sequence[str]) -> pa.Table:
        """These columns of a row group. They and what lies between them in the file are read at once."""
        footer = self._footer(shard)
        extents = []
        chunks = footer.row_group(row_group)
        for i in range(chunks.num_columns):
            chunk = chunks.column(i)
            if chunk.path_in_schema.partition(".")[0] in columns:
                start = min(o for o in (chunk.dictionary_page_offset, chunk.data_page_offset) if o is not None)
                extents.append((start, start + chunk.total_compressed_size))
        start, end = min(s for s, _ in extents), max(e for _, e in extents)
        window = _Window(self._bytes(shard, start, end), start)
        with pq.ParquetFile(window, metadata=footer) as file:
            return file.read_row_group(row_group, columns=list(columns), use_threads=False)

    def fetch(self, shard: int) -> None:
        """Bring a shard into the cache, if there is one."""
        if self.cache is not None:
            self.cache.fetch(self.folder, self.shards[shard]["file"], self.shards[shard]["sha256"])

    def _footer(self, shard: int) -> pq.FileMetaData:
        with self._lock:
            if shard in self._footers:
                self._footers.move_to_end(shard)
                return self._footers[shard]
        tail = self._bytes(shard, -TAIL, None)
        length = int.from_bytes(tail[-8:-4], "little") + 8
        if length > len(tail):
            tail = self._bytes(shard, -length, None)
        footer = pq.read_metadata(io.BytesIO(tail))
        with self._lock:
            self._footers[shard] = footer
            while len(self._footers) > FOOTERS:
                self._footers.popitem(last=False)
        return footer

    def _bytes(self, shard: int, start: int, end: int | None) -> bytes:
        """A piece of a shard; a negative start counts from its end."""
        file = self.shards[shard]["file"]
        if self.cache is not None:
            held = self.cache.read(self.folder, file, self.shards[shard]["sha256"], start, end)
            if held is not None:
                return held
        with storage_errors(self.folder.uri_of(file)):
            data: bytes = self.folder.fs.cat_file(self.folder.path_of(file), start=start, end=end)
            return data


class _Window(io.BytesIO):
    """A piece of a file at the place that it has there; nothing else of the file may be read."""

    def __init__(self, data: bytes, start: int) -> None:
        super().__init__(data)
        self.start = start

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return super().seek(offset - self.start if whence == io.SEEK_SET else offset, whence) + self.start

    def tell(self) -> int:
        return super().tell() + self.start
