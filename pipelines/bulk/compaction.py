"""Folding commits into results: a log-structured merge that holds one part, and 16 bytes for each attempt committed.

    1  hash the URIs of all commits and look them up in the current parts: objects with one attempt need no decision
    2  spill the attempts at the others to a local disk, by hash, and settle them in portions, now by their real URIs
    3  write the commits' rows that count into new parts, with those of parts that lost rows or are small
    4  put the next manifest; whoever comes second with its number starts again; remove what is no longer current

Killed at any point, the next compaction finds either the old manifest and all commits, or the new one and commits
that no longer change anything.
"""

from __future__ import annotations

import hashlib
import io
import random
import secrets
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.bulk.attempts import COLUMNS, Attempts, UInt64, attempts_of, hashed, uri_hashes
from pipelines.bulk.result_parts import (
    COMMITS,
    READ_THREADS,
    RESULTS,
    ROW_SCHEMA,
    Manifest,
    Part,
    Totals,
    batches_in,
    commits_in,
    entries_in,
    newest_manifest,
    read_each,
    rows_in,
    totals_of,
)
from pipelines.bulk.rivals import Buckets, codes, losers_of, rivals_of, without
from pipelines.errors import StorageError
from pipelines.storage import Folder

PART_ROWS = 65_536
GROUP_ROWS = 16_384
PORTION = 131_072  # attempts that are settled together
DECODED_IN_FLIGHT = 4 * 1024 * 1024  # of files that are read with all their columns, which take several times as much
ATTEMPTS = 20
Files = list[tuple[str, int]]


class _FileGoneError(Exception):
    """Another job compacted what this one was reading."""


def _is_commit(key: str) -> bool:
    """One that is gone is left out: its rows are in a merged commit, or in a newer manifest, which stops this fold."""
    return key.startswith(f"{COMMITS}/")


def compact(folder: Folder, verify: Callable[[], None]) -> Totals:
    """Fold the commits into `results/`; the sums over all rows then. Raises StorageError, and what `verify` raises."""
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(random.uniform(0, min(0.05 * 2**attempt, 5)))  # two that began together part
        commits = commits_in(folder)
        manifest = newest_manifest(folder)  # after the commits: what is gone from them by now is in its parts
        if not commits:
            return manifest.totals
        try:
            compacted = _Compaction(folder, manifest, commits, verify).run()
        except _FileGoneError:
            continue
        if compacted is not None:
            return compacted.totals
    raise StorageError(f"{folder.uri}: other jobs kept changing the results while this one compacted; run it again")


def merge_commits(folder: Folder, names: Sequence[str], verify: Callable[[], None]) -> list[str]:
    """Write the rows of these commits into few larger ones and remove them; the names that hold the rows now.

    Of attempts at one version the one that counts is kept. A commit that is not there was folded by another job.
    """
    merged: list[str] = []
    tables: list[pa.Table] = []
    sources: list[str] = []

    def flush() -> None:
        if len(sources) > 1:
            verify()
            merged.append(_write_merged(folder, tables, sources))
        else:
            merged.extend(sources)
        tables.clear()
        sources.clear()

    names = list(dict.fromkeys(names))
    files = [(f"{COMMITS}/{name}.parquet", 0) for name in names]
    for (_, rows), name in zip(read_each(folder, files, rows_in), names, strict=True):
        if rows is None:
            continue
        if sum(t.num_rows for t in tables) + rows.num_rows > PART_ROWS:
            flush()
        tables.append(rows)
        sources.append(name)
    flush()
    return merged


def _write_merged(folder: Folder, tables: list[pa.Table], names: list[str]) -> str:
    found = [attempts_of(table) for table in tables]
    rivals = pa.concat_tables([rivals_of(a, number, np.arange(len(a))) for number, a in enumerate(found)])
    # Versions stay apart: which of them counts is for the compaction to say, which knows all attempts.
    versions = codes(pc.binary_join_element_wise(rivals["uri"], rivals["etag"], "\0"))
    lost = losers_of(rivals, versions, np.zeros_like(versions))
    kept = [without(table, a, lost.get(number)) for number, (table, a) in enumerate(zip(tables, found, strict=True))]
    merged = hashlib.sha256("\n".join(sorted(names)).encode()).hexdigest()
    out = io.BytesIO()
    pq.write_table(pa.concat_tables(kept), out, compression="zstd", row_group_size=GROUP_ROWS)
    folder.write(f"{COMMITS}/{merged}.parquet", out.getvalue())
    delete_all(folder, (f"{COMMITS}/{name}.parquet" for name in names if name != merged))
    return merged


def delete_all(folder: Folder, keys: Iterable[str]) -> None:
    """Delete them, several at a time."""
    with ThreadPoolExecutor(READ_THREADS) as pool:
        for _ in pool.map(folder.delete, keys):
            pass


@dataclass
class _Compaction:
    """One attempt at folding these commits into the parts of this manifest."""

    folder: Folder
    manifest: Manifest
    commits: Files
    verify: Callable[[], None]

    def run(self) -> Manifest | None:
        """The manifest that it wrote; None if another compaction was first. Raises _FileGoneError."""
        with tempfile.TemporaryDirectory(prefix="repsep-compact-") as scratch:
            lost = self._lost(Path(scratch))
        number = self.manifest.number + 1
        writer = _PartWriter(self.folder, number)
        try:
            current = Manifest(number, (*self._write(writer, lost), *writer.finish()))
            self.verify()
        except (StorageError, _FileGoneError):
            delete_all(self.folder, writer.keys)
            raise
        # NOTE where this raises, the manifest may be there all the same: its parts stay.
        if not current.create(self.folder):
            delete_all(self.folder, writer.keys)
            return None
        self._remove_older(current)
        return current

    def _lost(self, scratch: Path) -> dict[str, NDArray[np.int32]]:
        """For each file the numbers of its attempts that do not count."""
        commits = dict(self._each(self.commits, _uri_hashes))
        if not commits:
            return {}
        every = np.sort(np.concatenate(list(commits.values())))
        twice = [every[1:][every[1:] == every[:-1]]]
        files: Files = []
        for (key, size), (_, found) in zip(
            self.manifest.files, self._each(self.manifest.files, _uri_hashes), strict=True
        ):
            met = found[_is_in(found, every)]
            if len(met):
                twice.append(met)
                files.append((key, size))
        rivals = np.unique(np.concatenate(twice))
        if not len(rivals):
            return {}
        # The parts come last: of two copies of one attempt the one that is there already stays.
        files = [
            (key, size) for key, size in self.commits if key in commits and _is_in(commits[key], rivals).any()
        ] + files
        del commits, every
        return self._settled(files, rivals, Buckets(scratch, -(-2 * len(rivals) // PORTION)))

    def _settled(self, files: Files, rivals: UInt64, buckets: Buckets) -> dict[str, NDArray[np.int32]]:
        def read(data: bytes) -> tuple[Attempts, UInt64]:
            attempts = attempts_of(rows_in(data, COLUMNS))
            return attempts, uri_hashes(attempts)

        numbers = {key: number for number, (key, _) in enumerate(files)}
        for key, (attempts, found) in self._each(files, read):
            chosen = np.flatnonzero(_is_in(found, rivals))
            buckets.add(rivals_of(attempts, numbers[key], chosen), found[chosen])
        lost: dict[str, list[NDArray[np.int32]]] = defaultdict(list)
        for table in buckets.tables():
            for number, attempts in losers_of(table, codes(table["uri"]), codes(table["etag"])).items():
                lost[files[number][0]].append(attempts)
        return {key: np.concatenate(found) for key, found in lost.items()}

    def _write(self, writer: _PartWriter, lost: dict[str, NDArray[np.int32]]) -> list[Part]:
        """Write the new rows with those of parts that cannot stay as they are; the parts that can."""
        changed = [part for part in self.manifest.parts if part.key in lost]
        small = [part for part in self.manifest.parts if part.key not in lost and 2 * part.totals.rows < PART_ROWS]
        rewritten = {part.key for part in (*changed, *small)}
        files = [f for f in self.manifest.files if f[0] in rewritten] + self.commits

        def read(data: bytes) -> tuple[pa.Table, Attempts]:
            rows = rows_in(data)
            return rows, attempts_of(rows)

        for key, found in read_each(self.folder, files, read, in_flight=DECODED_IN_FLIGHT):
            if found is None:
                if _is_commit(key):
                    continue
                raise _FileGoneError(key)
            writer.add(without(*found, lost.get(key)))
        return [part for part in self.manifest.parts if part.key not in rewritten]

    def _each(self, files: Files, read: Any) -> Iterator[tuple[str, Any]]:
        for key, found in read_each(self.folder, files, read):
            if found is None:
                if _is_commit(key):
                    continue
                raise _FileGoneError(key)
            yield key, found

    def _remove_older(self, current: Manifest) -> None:
        """Commits last: while there are any, the next compaction cleans up what an interruption left.

        NOTE manifests stay: with a number free again, a slow compaction could take it and remove what it never folded.
        """
        kept = {part.key for part in current.parts}
        prefix = f"{RESULTS}/part-"
        older = [
            entry.key
            for entry in entries_in(self.folder, RESULTS)
            if entry.key.startswith(prefix)
            and entry.key not in kept
            and int(entry.key.removeprefix(prefix)[:8]) <= current.number
        ]
        delete_all(self.folder, older)
        delete_all(self.folder, (key for key, _ in self.commits))


class _PartWriter:
    """Rows into parts of at most PART_ROWS; what one file holds stays in one part, and so do an object's rows."""

    def __init__(self, folder: Folder, number: int) -> None:
        self.folder, self.number = folder, number
        self.keys: list[str] = []
        self.parts: list[Part] = []
        self._begin()

    def add(self, rows: pa.Table) -> None:
        if self.totals.rows + self.waiting_rows + rows.num_rows > PART_ROWS:
            self._close()
        self.waiting.append(rows)
        self.waiting_rows += rows.num_rows
        if self.waiting_rows >= GROUP_ROWS:
            self._flush()

    def finish(self) -> list[Part]:
        self._close()
        return self.parts

    def _begin(self) -> None:
        self.out = io.BytesIO()
        self.writer = pq.ParquetWriter(self.out, ROW_SCHEMA, compression="zstd")
        self.totals = Totals()
        self.waiting: list[pa.Table] = []
        self.waiting_rows = 0

    def _flush(self) -> None:
        rows = pa.concat_tables(self.waiting)
        self.waiting, self.waiting_rows = [], 0
        self.writer.write_table(rows, row_group_size=GROUP_ROWS)
        self.totals += totals_of(rows)

    def _close(self) -> None:
        if self.waiting_rows:
            self._flush()
        if not self.totals.rows:
            return
        self.writer.close()
        key = f"{RESULTS}/part-{self.number:08d}-{secrets.token_hex(4)}.parquet"
        self.keys.append(key)
        self.folder.write(key, self.out.getvalue())
        self.parts.append(Part(key, self.out.tell(), self.totals))
        self._begin()


def _uri_hashes(data: bytes) -> UInt64:
    """One for each attempt."""
    return hashed(batches_in(data, COLUMNS)).uri


def _is_in(values: UInt64, ordered: UInt64) -> NDArray[np.bool_]:
    """Which values are in a sorted array."""
    if not len(ordered):
        return np.zeros(len(values), np.bool_)
    return ordered[np.minimum(np.searchsorted(ordered, values), len(ordered) - 1)] == values
