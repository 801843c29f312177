"""What a bulk output holds and how it is committed: masks first, then rows, then compacted tables.

    run.json                    whose output this is; written first, by conditional PUT, with a random `generation`
    classes.json                the palette and the names
    masks/<key>.png             one for each image, written before its row; masks/<shard>.parquet for a shard's images
    _commits/<hash>.parquet     rows of a batch, at least once; named by the hash of generation, keys, etags and
                                states, or, where several were merged into one, by the hash of their names
    results/part-*.parquet      what users read: one row for each image, some 65,536 in a part
    results/_manifests/<n>.json which parts are current, with their sums; each a conditional PUT and kept, so of two
                                compactions one wins

Whoever replaces an output writes another generation into run.json before it clears anything. A job that runs compares
it with its own before it puts masks, rows or a manifest, and ends where it differs. NOTE a store has no transactions:
what each process had under way at that moment, at most the masks of a batch, may still arrive.

There is no lock. A row may be committed twice, by a retry or by two jobs on one output. Compaction keeps one attempt at
each object (an image or a shard): of its newest version the newest that has put masks, so that all rows of a shard
are of the attempt whose masks are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bulk import compaction
from pipelines.bulk.attempts import COLUMNS, FAILED, OK, Committed, Hashed, hashed
from pipelines.bulk.result_parts import (
    COMMITS,
    MANIFESTS,
    RESULTS,
    ROW_SCHEMA,
    Totals,
    batches_in,
    commits_in,
    entries_in,
    newest_manifest,
    pages_in,
    read_each,
    rows_in,
)
from pipelines.errors import StorageError, UsageError
from pipelines.storage import Folder

__all__ = [
    "COMMITS",
    "FAILED",
    "MANIFESTS",
    "OK",
    "RESULTS",
    "ROW_SCHEMA",
    "Committed",
    "Output",
    "Totals",
    "object_key",
]

RUN, CLASSES, REPORT, PAGE = "run.json", "classes.json", "report.json", "report.html"
MASKS, CONFIDENCE, PARTS = "masks", "confidence", "_shards"
KEY_BYTES, COMPONENT_BYTES = 1024, 255
ATTEMPTS = 20

GENERATION, CLEARING = "generation", "clearing"  # in run.json, beside the settings

RESERVED = {"": "%00", ".": "%2E", "..": "%2E%2E", "_long": "%5Flong"}
_ESCAPED = re.compile(r"^%(25)*(00|2E|2E%2E|5Flong)$")


def object_key(prefix: str, key: str, suffix: str, *, root: str, local: bool) -> str:
    """Where the output of `key` goes below the output's folder: `<prefix>/<key><suffix>`, or `_long/<sha256>` of it.

    Different keys never share a name: components that a store or a disk would misread are percent-encoded, and what
    looks encoded already gets another percent sign.
    """
    parts = [RESERVED.get(p, p.replace("%", "%25", 1) if _ESCAPED.match(p) else p) for p in key.split("/")]
    name = f"{prefix}/{'/'.join(parts)}{suffix}"
    longest = max(len(p.encode()) for p in name.split("/"))
    if len(f"{root}/{name}".encode()) > KEY_BYTES or (local and longest > COMPONENT_BYTES):
        return f"{prefix}/_long/{hashlib.sha256(key.encode()).hexdigest()}{suffix}"
    return name


class ReplacedError(StorageError):
    """Another job has replaced the output since this one claimed it."""


class Output:
    """A bulk output. Workers `commit`; the driver claims, resumes, merges and compacts."""

    def __init__(self, folder: Folder, generation: str | None = None) -> None:
        """`generation`: what `claim` found or made; without it nothing is compared."""
        self.folder, self.generation = folder, generation

    def check(self, settings: Mapping[str, Any], *, overwrite: bool) -> Literal["free", "ours", "replace"]:
        """Whether nobody has this output, it is ours, or `overwrite` has to clear it first. Writes nothing.

        Raises UsageError if it is another model's, or holds what no run of ours wrote.
        """
        data = self.folder.read_if_present(RUN)
        if data is None:
            foreign = [name for name in (MASKS, RESULTS) if next(entries_in(self.folder, name), None) is not None]
            if foreign or self.folder.size_of(CLASSES) is not None:
                if self.folder.read_if_present(RUN) is not None:  # another job has just claimed it
                    return self.check(settings, overwrite=overwrite)
                what = foreign[0] if foreign else CLASSES
                raise UsageError(
                    f"{self.folder.uri} holds {what} but no {RUN}: it is not an output of repsep; use an empty prefix"
                )
            return "free"
        found = json.loads(data)
        found.pop(GENERATION, None)
        if found.get(CLEARING) and not overwrite:
            raise UsageError(
                f"{self.folder.uri} is being cleared by a job with --overwrite, or was until such a job was stopped; "
                "use a new prefix, or --overwrite to replace it"
            )
        different = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
        if different and not overwrite:
            said = ", ".join(f"{k} {found.get(k)!r} instead of {settings.get(k)!r}" for k in different)
            raise UsageError(
                f"{self.folder.uri} was written with {said}; use a new prefix, or --overwrite to replace it"
            )
        return "replace" if different else "ours"

    def claim(self, settings: Mapping[str, Any], classes: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make this output that of one model, its settings and one source, and keep its generation.

        Raises as `check` does, and ReplacedError if another job replaces the output at the same time.
        """
        ours = {**settings, GENERATION: secrets.token_hex(8)}
        if self.check(settings, overwrite=overwrite) == "replace":
            self.folder.write(RUN, _run_json({**ours, CLEARING: True}))
            self.generation = ours[GENERATION]
            self._clear()
            self.verify()
            self.folder.write(RUN, _run_json(ours))
        elif self.folder.create(RUN, _run_json(ours)):
            self.generation = ours[GENERATION]
        else:
            self.generation = self._current()  # before it is checked: a later one is noticed by `verify`
            self.check(settings, overwrite=False)
        self.verify()
        self.folder.write(CLASSES, json.dumps(classes, indent=1, ensure_ascii=False).encode())

    def verify(self) -> None:
        """Raises ReplacedError if the output is no longer the one that was claimed."""
        if self.generation is not None and self._current() != self.generation:
            raise ReplacedError(
                f"{self.folder.uri}: another job has replaced this output with --overwrite since this one began; "
                "give each of them a prefix of its own"
            )

    def committed(self) -> Committed:
        """The state of every object that has rows, in `results/` or not yet. Raises StorageError."""
        read: dict[str, Hashed] = {}
        for _ in range(ATTEMPTS):
            commits = commits_in(self.folder)
            files = [*newest_manifest(self.folder).files, *commits]
            new = [(key, size) for key, size in files if key not in read]
            # What was read before another job merged or compacted it still holds: rows are only ever superseded.
            found = dict(read_each(self.folder, new, _hashed))
            read |= {key: attempts for key, attempts in found.items() if attempts is not None}
            if None not in found.values():
                del found
                return Committed(read.pop(key) for key in list(read))
        raise StorageError(
            f"{self.folder.uri}: other jobs kept changing the results while they were read; run it again"
        )

    def commit(self, rows: list[dict[str, Any]]) -> str:
        """Write a batch's rows, whose masks are there already, all of an object together. Returns the part's name.

        Raises StorageError, of which ReplacedError is one.
        """
        # A second attempt with another outcome is another object: a compaction may be about to remove the first. So is
        # that of another generation: a late compaction of the former one removes its own commits alone.
        what = sorted([r["uri"], r["key"], r["etag"], r["status"]] for r in rows)
        name = hashlib.sha256(json.dumps([self.generation, what]).encode()).hexdigest()
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), out, compression="zstd")
        self.verify()
        self.folder.write(f"{COMMITS}/{name}.parquet", out.getvalue())
        return name

    def merge_commits(self, names: Sequence[str]) -> list[str]:
        """Make few parts of many that `commit` returned, while the job runs; the names of what holds the rows now.

        Safe beside a compaction, another job's too.
        """
        return compaction.merge_commits(self.folder, names, self.verify)

    def compact(self) -> Totals:
        """Fold the commits into `results/`: one attempt for each object. Returns the sums over all rows.

        Holds one part and some bytes for each commit, not what is there already. Raises StorageError.
        """
        self.verify()
        return compaction.compact(self.folder, self.verify)

    def totals(self) -> Totals:
        """The sums over the current results, without reading them."""
        return newest_manifest(self.folder).totals

    def tables(self, columns: list[str] | None = None) -> Iterator[pa.Table]:
        """The rows of the current results, a part at a time, in no order.

        Raises StorageError when another job compacts meanwhile.
        """
        for key, rows in read_each(
            self.folder, newest_manifest(self.folder).files, lambda data: rows_in(data, columns), in_flight=1
        ):
            if rows is None:
                raise StorageError(
                    f"{self.folder.uri_of(key)}: another job has just changed the results; read them again"
                )
            yield rows

    def results(self) -> pa.Table:
        """All rows of the current results in order of key; for small outputs."""
        for attempt in range(ATTEMPTS):
            try:
                return pa.concat_tables([ROW_SCHEMA.empty_table(), *self.tables()]).sort_by("key")
            except StorageError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError

    def has_commits(self) -> bool:
        """Whether there are rows that are not in `results/` yet."""
        return next(entries_in(self.folder, COMMITS), None) is not None

    def _current(self) -> str | None:
        """The generation that is there now; None where there is no output."""
        data = self.folder.read_if_present(RUN)
        return None if data is None else json.loads(data).get(GENERATION, "")

    def _clear(self) -> None:
        for name in (MASKS, CONFIDENCE, RESULTS, COMMITS, PARTS):
            for page in pages_in(self.folder, name):
                self.verify()  # of two that clear, the later one's output may be under way
                compaction.delete_all(self.folder, (entry.key for entry in page))
        for key in (REPORT, PAGE):
            self.folder.delete(key)


def _run_json(content: Mapping[str, Any]) -> bytes:
    return json.dumps(content, indent=1, sort_keys=True).encode()


def _hashed(data: bytes) -> Hashed:
    return hashed(batches_in(data, COLUMNS))
