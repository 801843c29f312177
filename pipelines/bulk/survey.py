"""What one pass over the rows of a bulk output tells: failures by reason, confidences, a sample of images.

The rows come part by part and are forgotten again: memory does not grow with the output.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.bulk.commits import OK, Output
from pipelines.errors import StorageError

Kind = Literal["images", "shards"]

COLUMNS = ["key", "uri", "status", "stage", "error", "height", "width", "confidence", "mask_uri"]
BINS = 20
SAMPLES, FAILURES_SHOWN, REASONS_SHOWN = 12, 20, 50
SAMPLE_PIXELS = 64 * 1024 * 1024
"""Larger images are no samples: a page is not worth gigabytes and minutes."""
SHARDS_SAMPLED = 12
OTHER_REASONS = "other reasons"
ATTEMPTS = 5


@dataclass
class Reason:
    """Failed rows whose reasons differ in names and numbers only; the text is that of the first key."""

    stage: str
    error: str
    key: str
    rows: int = 0


@dataclass
class Survey:
    """`least_confident` and `sample` hold rows (COLUMNS) of images that are done, `failures` the first others by key.

    The sample is in random order: SAMPLES images, or so many of each of SHARDS_SAMPLED shards.
    """

    rows: int = 0
    failed: int = 0
    failures: list[dict[str, Any]] = field(default_factory=list)
    reasons: list[Reason] = field(default_factory=list)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(BINS, np.int64))
    """Images by mean confidence, from 0 to 1 in bins of one width."""
    least_confident: list[dict[str, Any]] = field(default_factory=list)
    sample: list[dict[str, Any]] = field(default_factory=list)


def survey_of(output: Output, kind: Kind) -> Survey:
    """The survey of the output's current results. Raises StorageError."""
    for attempt in range(ATTEMPTS):
        try:
            return survey(output.tables(COLUMNS), kind)
        except StorageError:
            if attempt == ATTEMPTS - 1:  # not another job's compaction then
                raise
    raise AssertionError


def survey(tables: Iterable[pa.Table], kind: Kind) -> Survey:
    """Go through the rows once. The same rows give the same survey, however they are cut into tables and ordered.

    NOTE but for reasons over REASONS_SHOWN, where those that come first are shown.
    """
    found = Survey()
    reasons: dict[tuple[str, str], Reason] = {}
    least = _Best("confidence", SAMPLES)
    failures = _Best("key", FAILURES_SHOWN)
    sample = _ShardSample() if kind == "shards" else _Best("rank", SAMPLES)
    for table in tables:
        is_ok = pc.equal(table["status"], OK)
        done = table.filter(is_ok)
        failed = table.filter(pc.invert(is_ok))
        found.rows += table.num_rows
        found.failed += failed.num_rows
        for row in _rows(failed):
            _count_reason(reasons, row)
        failures.add(failed)
        sure = done.filter(pc.is_valid(done["confidence"]))
        found.histogram += np.histogram(sure["confidence"].to_numpy(), bins=BINS, range=(0, 1))[0]
        least.add(sure)
        pixels = pc.multiply(done["height"].cast(pa.int64()), done["width"])
        candidates = done.filter(pc.less_equal(pixels, SAMPLE_PIXELS))
        sample.add(candidates.append_column("rank", pa.array(_ranks(candidates["key"]))))
    found.reasons = sorted(reasons.values(), key=lambda r: (r.error == OTHER_REASONS, -r.rows, r.stage, r.error))
    found.failures = failures.rows()
    found.least_confident = least.rows()
    found.sample = sample.rows()
    return found


class _Best:
    """The rows with the smallest values of a column, by key where these are equal; the others are forgotten.

    By hashes ("rank") that is a random sample that does not depend on the order in which rows come: a reservoir would.
    """

    def __init__(self, column: str, count: int) -> None:
        self.column, self.count = column, count
        self.table: pa.Table | None = None

    def add(self, table: pa.Table) -> None:
        both = table if self.table is None else pa.concat_tables([self.table, table])
        order = [(name, "ascending") for name in dict.fromkeys([self.column, "key"])]
        self.table = both.take(pc.sort_indices(both, order)[: self.count])

    def rows(self) -> list[dict[str, Any]]:
        return [] if self.table is None else self.table.to_pylist()


class _ShardSample:
    """Samples of the images of few shards, as a shard has to be read from its beginning.

    The shards are those with the smallest hashes of all: one that is dropped for a smaller one never comes back, and
    one that stays was kept from its first row on.
    """

    def __init__(self) -> None:
        self.shards: dict[str, tuple[int, _Best]] = {}

    def add(self, table: pa.Table) -> None:
        uris = pc.unique(table["uri"])
        here = {(int(rank), uri) for rank, uri in zip(_ranks(uris), uris.to_pylist(), strict=True)}
        known = {(rank, uri) for uri, (rank, _) in self.shards.items()}
        chosen = sorted(here | known)[:SHARDS_SAMPLED]
        self.shards = {uri: self.shards.get(uri, (rank, _Best("rank", SAMPLES))) for rank, uri in chosen}
        for uri, (_, best) in self.shards.items():
            best.add(table.filter(pc.equal(table["uri"], uri)))

    def rows(self) -> list[dict[str, Any]]:
        return [row for _, best in self.shards.values() for row in best.rows()]


def _rows(table: pa.Table) -> Iterator[dict[str, Any]]:
    for batch in table.to_batches(max_chunksize=1024):
        yield from batch.to_pylist()


def _ranks(names: Any) -> NDArray[np.uint64]:
    """A 64-bit hash of each name, the same on every machine."""
    digests = b"".join(hashlib.blake2b(name.encode(), digest_size=8).digest() for name in names.to_pylist())
    return np.frombuffer(digests, "<u8")


def _count_reason(reasons: dict[tuple[str, str], Reason], row: dict[str, Any]) -> None:
    stage, error = row["stage"] or "", row["error"] or ""
    error = error.replace(row["uri"], "…")
    if row["key"] in error:  # as a word: a key may be a single letter
        error = re.sub(rf"(?<!\w){re.escape(row['key'])}(?!\w)", "…", error)
    kind = stage, _NUMBERS.sub("#", error)
    if kind not in reasons and len(reasons) >= REASONS_SHOWN:
        kind, error = (stage, OTHER_REASONS), OTHER_REASONS
    reason = reasons.setdefault(kind, Reason(stage, error, row["key"]))
    reason.rows += 1
    if row["key"] < reason.key:
        reason.key, reason.error = row["key"], error


# Numbers, and what looks like a digest or an address in memory.
_NUMBERS = re.compile(r"\b0x[0-9a-f]+\b|\b[0-9a-f]{8,}\b|\d+", re.IGNORECASE)
