"""What a bulk output holds and how it is committed: masks first, then rows, then a compacted table.

    run.json                    whose output this is; written first, by conditional PUT
    classes.json                the palette and the names
    masks/<key>.png             one for each image, written before its row
    _commits/<hash>.parquet     rows of a batch, at least once; named by the hash of its keys, etags and states
    results/part-*.parquet      one row per key; what users read
    results/_manifests/<n>.json which part is current; each a conditional PUT and kept, so of two compactions one wins

There is no lock. A row may be committed twice, by a retry or by two jobs on one output; compaction keeps the newest
version of an image, and of one version an `ok` before a `failed`.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.errors import StorageError, UsageError
from pipelines.storage import Folder

RUN, CLASSES, REPORT = "run.json", "classes.json", "report.json"
MASKS, CONFIDENCE, RESULTS, COMMITS, MANIFESTS = "masks", "confidence", "results", "_commits", "results/_manifests"
OK, FAILED = "ok", "failed"
KEY_BYTES, COMPONENT_BYTES = 1024, 255
ATTEMPTS = 20
READ_THREADS = 16

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


@dataclass(frozen=True)
class Committed:
    """What a row says of an image that was taken before."""

    etag: str
    ok: bool


class Output:
    """A bulk output. Workers `commit`; the driver claims, resumes and compacts."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder

    def check(self, settings: Mapping[str, Any], *, overwrite: bool) -> Literal["free", "ours", "replace"]:
        """Whether nobody has this output, it is ours, or `overwrite` has to clear it first. Writes nothing.

        Raises UsageError if it is another model's, or holds what no run of ours wrote.
        """
        data = self.folder.read_if_present(RUN)
        if data is None:
            foreign = [name for name in (MASKS, RESULTS) if any(True for _ in self._listed(f"{name}/"))]
            if foreign or self.folder.size_of(CLASSES) is not None:
                if self.folder.read_if_present(RUN) is not None:  # another job has just claimed it
                    return self.check(settings, overwrite=overwrite)
                what = foreign[0] if foreign else CLASSES
                raise UsageError(
                    f"{self.folder.uri} holds {what} but no {RUN}: it is not an output of repsep; use an empty prefix"
                )
            return "free"
        found = json.loads(data)
        different = sorted(k for k in settings.keys() | found.keys() if settings.get(k) != found.get(k))
        if different and not overwrite:
            said = ", ".join(f"{k} {found.get(k)!r} instead of {settings.get(k)!r}" for k in different)
            raise UsageError(
                f"{self.folder.uri} was written with {said}; use a new prefix, or --overwrite to replace it"
            )
        return "replace" if different else "ours"

    def claim(self, settings: Mapping[str, Any], classes: Mapping[str, Any], *, overwrite: bool) -> None:
        """Make this output that of one model, its settings and one source; raises as `check` does."""
        if self.check(settings, overwrite=overwrite) == "replace":
            self._clear()
        if not self.folder.create(RUN, json.dumps(settings, indent=1, sort_keys=True).encode()):
            self.check(settings, overwrite=False)
        self.folder.write(CLASSES, json.dumps(classes, indent=1, ensure_ascii=False).encode())

    def committed(self) -> dict[str, Committed]:
        """The state of every image that has a row."""
        rows = self._all_rows(["key", "etag", "status", "finished_at"])
        return {r["key"]: Committed(r["etag"], r["status"] == OK) for r in _newest(rows).to_pylist()}

    def commit(self, rows: list[dict[str, Any]]) -> None:
        """Write a batch's rows; their masks are there already."""
        # A second attempt with another outcome is another object: a compaction may be about to remove the first.
        what = sorted([r["key"], r["etag"], r["status"]] for r in rows)
        name = hashlib.sha256(json.dumps(what).encode()).hexdigest()
        self.folder.write(f"{COMMITS}/{name}.parquet", _parquet(pa.Table.from_pylist(rows, schema=ROW_SCHEMA)))

    def compact(self) -> tuple[int, int]:
        """Fold the commits into `results/`: one row per key, in order of key. Returns how many, and how many failed."""
        for _ in range(ATTEMPTS):
            commits = self._keys(f"{COMMITS}/")
            version, found = self._manifest()  # after the commits: what is gone from them by now is in its part
            if not commits:
                return found["rows"], found["failed"]
            try:
                table = _newest(self._read([*found["parts"], *commits], None)).sort_by("key")
            except StorageError as error:
                if isinstance(error.__cause__, FileNotFoundError):
                    continue  # another job compacted in between
                raise
            part = f"{RESULTS}/part-{version + 1:08d}-{secrets.token_hex(4)}.parquet"
            self.folder.write(part, _parquet(table))
            failed = table.num_rows - table["status"].to_pylist().count(OK)
            manifest = {"parts": [part], "rows": table.num_rows, "failed": failed, "written_at": time.time()}
            if self.folder.create(f"{MANIFESTS}/{version + 1:08d}.json", json.dumps(manifest).encode()):
                self._remove_older(version + 1, part, commits)
                return table.num_rows, failed
            self.folder.delete(part)
        raise StorageError(
            f"{self.folder.uri}: other jobs kept changing the results while this one compacted; run it again"
        )

    def results(self) -> pa.Table:
        """All rows of the current results."""
        return self._read(self._manifest()[1]["parts"], None)

    def has_commits(self) -> bool:
        """Whether there are rows that are not in `results/` yet."""
        return bool(self._keys(f"{COMMITS}/"))

    def _manifest(self) -> tuple[int, dict[str, Any]]:
        """The newest manifest with its number; an empty one with number 0 where there is none."""
        newest = max(self._keys(f"{MANIFESTS}/"), default=None)
        if newest is None:
            return 0, {"parts": [], "rows": 0, "failed": 0}
        found: dict[str, Any] = json.loads(self.folder.read(newest))
        return int(posixpath.basename(newest).partition(".")[0]), found

    def _all_rows(self, columns: list[str]) -> pa.Table:
        for _ in range(ATTEMPTS):
            commits = self._keys(f"{COMMITS}/")
            try:
                return self._read([*self._manifest()[1]["parts"], *commits], columns)
            except StorageError as error:
                if not isinstance(error.__cause__, FileNotFoundError):
                    raise
        raise StorageError(
            f"{self.folder.uri}: other jobs kept changing the results while they were read; run it again"
        )

    def _read(self, keys: Iterable[str], columns: list[str] | None) -> pa.Table:
        def read(key: str) -> pa.Table:
            return pq.read_table(io.BytesIO(self.folder.read(key)), columns=columns)

        with ThreadPoolExecutor(READ_THREADS) as pool:
            tables = list(pool.map(read, keys))
        fields = ROW_SCHEMA if columns is None else pa.schema([ROW_SCHEMA.field(c) for c in columns])
        return pa.concat_tables(tables) if tables else fields.empty_table()

    def _remove_older(self, version: int, part: str, commits: list[str]) -> None:
        """Commits last: while there are any, the next compaction cleans up what an interruption left.

        NOTE manifests stay: with a number free again, a slow compaction could take it and remove what it never folded.
        """
        for key in self._keys(f"{RESULTS}/part-"):
            if key != part and int(key.removeprefix(f"{RESULTS}/part-")[:8]) <= version:
                self.folder.delete(key)
        for key in commits:
            self.folder.delete(key)

    def _keys(self, prefix: str) -> list[str]:
        return list(self._listed(prefix))

    def _listed(self, prefix: str) -> Iterator[str]:
        try:
            yield from (entry.key for entry in self.folder.list(prefix))
        except StorageError as error:
            if not (self.folder.local and isinstance(error.__cause__, FileNotFoundError)):
                raise  # else a dry run before the first run

    def _clear(self) -> None:
        for prefix in (MASKS, CONFIDENCE, RESULTS, COMMITS):
            for key in self._keys(f"{prefix}/"):
                self.folder.delete(key)
        for key in (CLASSES, REPORT, RUN):  # an interrupted clearing is still the other model's output
            self.folder.delete(key)


def _newest(rows: pa.Table) -> pa.Table:
    """One row per key: the newest version of the image, and of one version an ok row before a failed one."""
    keys, etags = rows["key"].to_pylist(), rows["etag"].to_pylist()
    oks = [status == OK for status in rows["status"].to_pylist()]
    times = rows["finished_at"].cast(pa.int64()).to_pylist()
    seen: dict[tuple[str, str], int] = {}  # when a version was met last
    for version, finished_at in zip(zip(keys, etags, strict=True), times, strict=True):
        seen[version] = max(finished_at, seen.get(version, finished_at))
    best: dict[str, tuple[tuple[int, str, bool, int], int]] = {}
    for i, key in enumerate(keys):
        rank = seen[key, etags[i]], etags[i], oks[i], times[i]
        if key not in best or rank > best[key][0]:
            best[key] = rank, i
    return rows.take(pa.array(sorted(i for _, i in best.values()), pa.int64()))


def _parquet(table: pa.Table) -> bytes:
    out = io.BytesIO()
    pq.write_table(table, out, compression="zstd")
    return out.getvalue()
