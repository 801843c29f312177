"""What a bulk run has to do: the listing without what is committed, kept on a local disk in chunks.

On S3 and local disks nothing here grows with the listing but a file; what is committed takes 17 bytes for each object.
"""

from __future__ import annotations

import tempfile
import time
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.bulk.attempts import ABSENT_STATE, FAILED_STATE, OK_STATE, Committed
from pipelines.bulk.listing import entry_of, pages
from pipelines.config import SegmentConfig
from pipelines.errors import StorageError, UsageError
from pipelines.progress import say
from pipelines.storage import Entry, Folder, absolute_uri

Kind = Literal["images", "shards"]
LISTED_SCHEMA = pa.schema([("key", pa.string()), ("etag", pa.string()), ("size", pa.int64())])
CHUNK_ROWS = 8192
PROGRESS_S = 5.0


@dataclass
class Plan:
    """Objects that are to be taken, and how many were left out and why; all counts are those of this `--shard`."""

    kind: Kind
    folder: tempfile.TemporaryDirectory[str]
    listed: int = 0
    skipped: int = 0
    done: int = 0
    failed_before: int = 0
    """Failed in this version, and not taken again."""
    retried: int = 0
    """Failed in this version, and taken again."""
    todo: int = 0
    bytes: int = 0
    listing: str = ""

    def blocks(self, rows: int) -> Iterator[pa.Table]:
        """The objects to take, `rows` at a time, with the columns of LISTED_SCHEMA; as often as wanted."""
        waiting: list[pa.Table] = []
        count = 0
        for chunk in self._chunks():
            waiting.append(chunk)
            count += chunk.num_rows
            if count < rows:
                continue
            table = pa.concat_tables(waiting)
            whole = count - count % rows
            yield from (table.slice(start, rows) for start in range(0, whole, rows))
            waiting, count = [table.slice(whole)], count - whole
        if count:
            yield pa.concat_tables(waiting)

    def close(self) -> None:
        """Remove the chunks."""
        self.folder.cleanup()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _chunks(self) -> Iterator[pa.Table]:
        path = _chunk_file(self.folder)
        if path.exists():
            # Not by its name: the file would be mapped into memory.
            with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as reader:
                for batch in reader:
                    yield pa.Table.from_batches([batch])


def open_source(uri: str) -> tuple[Folder, str | None]:
    """The folder at a URI and None; where the URI is that of one object, its folder and its name.

    A prefix with objects below it is a folder, even if an object has the same name.
    """
    uri = absolute_uri(uri)
    folder = Folder(uri)
    above, _, name = folder.uri.rpartition("/")
    if uri.endswith("/") or not name or above.endswith(("/", ":")) or not above:
        return folder, None
    if not folder.local and next(folder.list(), None) is not None:
        return folder, None
    parent = Folder(above)
    return (parent, name) if entry_of(parent, name) is not None else (folder, None)


def make_plan(
    source: Folder, target: Folder, config: SegmentConfig, committed: Committed, *, only: str | None = None
) -> Plan:
    """List the source, or take `only` one object of it, and leave out what is committed in the version listed.

    Raises UsageError where there is nothing to segment, or both images and shards; StorageError as listings do.
    """
    chunks = tempfile.TemporaryDirectory(prefix="repsep-plan-")
    try:
        return _Planner(source, target, config, committed, chunks).plan(only)
    except BaseException:
        chunks.cleanup()
        raise


def check_source(source: Folder, target: Folder, config: SegmentConfig, *, only: str | None = None) -> None:
    """Raises as `make_plan` does where there is nothing to segment; lists as far as the first image or shard."""
    endings, inside, others = _endings(config), _output_inside(target, source), 0
    keys = (entry.key for page in pages(source) for entry in page) if only is None else iter((only,))
    for key in keys:
        if inside is not None and key.startswith(inside):
            continue
        if _kind(key, endings) is not None:
            return
        others += 1
    raise UsageError(_nothing(source, endings, others))


class _Planner:
    """Sorts the listing page by page; holds counts and one chunk."""

    def __init__(
        self,
        source: Folder,
        target: Folder,
        config: SegmentConfig,
        committed: Committed,
        chunks: tempfile.TemporaryDirectory[str],
    ) -> None:
        self.source, self.config, self.committed = source, config, committed
        self.output_inside = _output_inside(target, source)
        self.endings = _endings(config)
        self.found: dict[Kind, int] = dict.fromkeys(self.endings, 0)
        self.others = 0
        self.part, self.parts = _shard_of(config)
        self.digest = np.zeros(2, np.uint64)
        self.made = Plan(config.input or "images", chunks)
        self.writer = _ChunkWriter(chunks)

    def plan(self, only: str | None) -> Plan:
        said = time.monotonic()
        for page in pages(self.source) if only is None else _single(self.source, only):
            self._add(page)
            if time.monotonic() - said > PROGRESS_S:
                said = time.monotonic()
                say(f"segment: {sum(self.found.values()) + self.others} objects listed")
        self.writer.close()
        if not any(self.found.values()):
            raise UsageError(_nothing(self.source, self.endings, self.others))
        self.made.kind = next(kind for kind, count in self.found.items() if count)
        self.made.listing = self.digest.tobytes().hex()
        return self.made

    def _add(self, page: list[Entry]) -> None:
        listed = []
        for entry in page:
            if self.output_inside is not None and entry.key.startswith(self.output_inside):
                continue
            kind = _kind(entry.key, self.endings)
            if kind is None:
                self.others += 1
            else:
                self.found[kind] += 1
            if self.parts > 1 and _stable_hash(entry.key) % self.parts != self.part - 1:
                continue
            if kind is None:
                self.made.skipped += 1
            else:
                listed.append(entry)
        if len(self.found) > 1 and all(self.found.values()):
            raise UsageError(
                f"{self.source.uri} holds both images and shards; set segment.input=images or segment.input=shards "
                "to say which to take"
            )
        if listed:
            self._compare(listed)

    def _compare(self, listed: list[Entry]) -> None:
        """Count a page's objects by what is committed of them, and keep those that are to do."""
        try:
            self.digest += _digest(listed)
        except UnicodeEncodeError as error:  # only a disk has such names
            raise UsageError(f"{self.source.uri}: the name {error.object!r} is not UTF-8; rename the file") from None
        uris = [self.source.uri_of(entry.key) for entry in listed]
        states = self.committed.states(uris, [entry.etag for entry in listed])
        wanted = states == ABSENT_STATE
        if self.config.retry_failed:
            wanted |= states == FAILED_STATE
        self.made.listed += len(listed)
        self.made.done += int((states == OK_STATE).sum())
        chosen = np.flatnonzero(wanted)
        if self.config.limit is not None:
            chosen = chosen[: self.config.limit - self.made.todo]
        retried = int((states[chosen] == FAILED_STATE).sum())
        self.made.retried += retried
        self.made.failed_before += int((states == FAILED_STATE).sum()) - retried
        todo = [listed[i] for i in chosen]
        self.made.todo += len(todo)
        self.made.bytes += sum(entry.size for entry in todo)
        self.writer.add(todo)


class _ChunkWriter:
    """Entries as Arrow record batches in one file."""

    def __init__(self, folder: tempfile.TemporaryDirectory[str]) -> None:
        options = pa.ipc.IpcWriteOptions(compression="lz4")
        self.stream = pa.ipc.new_stream(str(_chunk_file(folder)), LISTED_SCHEMA, options=options)
        self.waiting: list[Entry] = []

    def add(self, entries: Sequence[Entry]) -> None:
        self.waiting += entries
        if len(self.waiting) >= CHUNK_ROWS:
            self._flush()

    def close(self) -> None:
        self._flush()
        self.stream.close()

    def _flush(self) -> None:
        if self.waiting:
            columns = [[getattr(entry, name) for entry in self.waiting] for name in LISTED_SCHEMA.names]
            self.stream.write_batch(pa.record_batch(columns, schema=LISTED_SCHEMA))
            self.waiting = []


def _single(folder: Folder, key: str) -> Iterator[list[Entry]]:
    entry = entry_of(folder, key)
    if entry is None:
        raise StorageError(f"{folder.uri_of(key)}: there is nothing there; correct the path")
    yield [entry]


def _endings(config: SegmentConfig) -> dict[Kind, tuple[str, ...]]:
    endings: dict[Kind, tuple[str, ...]] = {"images": config.include, "shards": config.shards}
    return {
        kind: tuple(ending.lower() for ending in those)
        for kind, those in endings.items()
        if config.input in (None, kind)
    }


def _kind(key: str, endings: Mapping[Kind, tuple[str, ...]]) -> Kind | None:
    key = key.lower()
    return next((kind for kind, those in endings.items() if key.endswith(those)), None)


def _nothing(source: Folder, endings: Mapping[Kind, tuple[str, ...]], others: int) -> str:
    there = f"{others} other objects" if others else "nothing"
    what = " and no ".join(kind.removesuffix("s") for kind in endings)
    told = "; ".join(f"{kind} end in {', '.join(those)}" for kind, those in endings.items())
    return f"{source.uri} holds no {what} ({there} there; {told}); correct the prefix"


def _output_inside(target: Folder, source: Folder) -> str | None:
    """What the keys of the output begin with where it lies below the source."""
    return f"{target.uri.removeprefix(source.uri + '/')}/" if target.uri.startswith(f"{source.uri}/") else None


def _shard_of(config: SegmentConfig) -> tuple[int, int]:
    """(i, n) of `--shard i/n`."""
    if config.shard is None:
        return 1, 1
    part, parts = map(int, config.shard.split("/"))
    if part > parts:
        raise UsageError(f"segment.shard={config.shard}: there are {parts} parts, 1/{parts} to {parts}/{parts}")
    return part, parts


def _stable_hash(key: str) -> int:
    """The same on every machine, unlike `hash`."""
    return zlib.crc32(key.encode(errors="surrogateescape"))


def _digest(entries: Sequence[Entry]) -> NDArray[np.uint64]:
    """(2,): sums of 128-bit hashes, the same in whatever order and pages the entries come."""
    texts = (f"{entry.key}\0{entry.etag}".encode() for entry in entries)
    data = b"".join(blake2b(text, digest_size=16).digest() for text in texts)
    return np.frombuffer(data, "<u8").reshape(-1, 2).sum(axis=0, dtype=np.uint64)


def _chunk_file(folder: tempfile.TemporaryDirectory[str]) -> Path:
    return Path(folder.name, "todo.arrow")
