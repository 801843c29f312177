"""Which of several attempts at one object counts, and what is committed of a million objects, in a few bytes for each.

An *object* is an image or a shard, known by its URI; its *version* is its etag; an *attempt* is all rows of one version
in one file, one for an image and many for a shard. An attempt has failed if any of its rows has; it is empty if all
have: then it has put no masks.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

OK, FAILED = "ok", "failed"
ABSENT_STATE, FAILED_STATE, OK_STATE = 0, 1, 2
COLUMNS = ["uri", "etag", "status", "finished_at"]  # what decides
SLICE = 1 << 14

UInt64 = NDArray[np.uint64]
Int64 = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Attempts:
    """The attempts of one file, in order of their first rows; `of_row` gives each row's attempt."""

    uri: pa.Array
    etag: pa.Array
    empty: Flags
    finished_at: Int64
    of_row: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.empty)


def attempts_of(rows: pa.Table) -> Attempts:
    """The attempts in a file's rows, of which COLUMNS are looked at."""
    uri, etag = (pa.concat_arrays(rows[name].chunks or [pa.array([], pa.string())]) for name in ("uri", "etag"))
    versions = pc.binary_join_element_wise(uri, etag, "\0").dictionary_encode()
    of_row = versions.indices.to_numpy(zero_copy_only=False)
    count = len(versions.dictionary)
    empty = np.ones(count, np.bool_)
    empty[of_row[pc.equal(rows["status"], OK).to_numpy()]] = False
    finished_at = np.full(count, np.iinfo(np.int64).min)
    np.maximum.at(finished_at, of_row, rows["finished_at"].cast(pa.int64()).to_numpy())
    if count < len(of_row):
        first = pa.array(np.unique(of_row, return_index=True)[1])
        uri, etag = uri.take(first), etag.take(first)
    return Attempts(uri, etag, empty, finished_at, of_row)


def settle(objects: NDArray[Any], versions: NDArray[Any], empty: Flags, finished_at: Int64) -> Int64:
    """For each object the index of the attempt that counts; all arguments (N,), objects and versions as numbers.

    The newest attempt says which version it is. Of that version, only attempts since another version was there count:
    the mask of an earlier one has been overwritten. Of these the newest that is not empty counts, failures in it or
    not: the masks there are its own. Where all are empty, the newest; of attempts at the same moment, one that is not
    empty, then the last in the arrays.
    """
    if len(objects) == 0:
        return np.zeros(0, np.int64)
    order = np.lexsort((versions, ~empty, finished_at, objects))
    objects, versions, empty = objects[order], versions[order], empty[order]
    index = np.arange(len(order))
    starts = np.flatnonzero(np.concatenate([[True], objects[1:] != objects[:-1]]))
    last = np.append(starts[1:], len(order)) - 1
    group = np.repeat(np.arange(len(starts)), last - starts + 1)
    other = np.maximum.reduceat(np.where(versions != versions[last][group], index, -1), starts)
    full = np.maximum.reduceat(np.where((index > other[group]) & ~empty, index, -1), starts)
    return order[np.where(full >= 0, full, last)]


def hashes(texts: Sequence[str]) -> UInt64:
    """64-bit hashes that hold within this process."""
    return np.fromiter(map(hash, texts), np.int64, len(texts)).view(np.uint64)


def uri_hashes(attempts: Attempts) -> UInt64:
    """`hashes` of the attempts' URIs, one slice after the other: Python strings take several times what Arrow does."""
    slices = [attempts.uri[start : start + SLICE].to_pylist() for start in range(0, len(attempts), SLICE)]
    return _joined([hashes(uris) for uris in slices], np.uint64)


class Hashed(NamedTuple):
    """The attempts of one file without their texts: 26 bytes for each."""

    uri: UInt64
    version: UInt64
    failed: Flags
    empty: Flags
    finished_at: Int64


def hashed(batches: Iterable[pa.RecordBatch]) -> Hashed:
    """The attempts of one file from its rows in small batches, with COLUMNS; in no order."""
    columns: list[list[NDArray[Any]]] = [[], [], [], []]
    for batch in batches:
        uris = batch["uri"].to_pylist()
        columns[0].append(hashes(uris))
        columns[1].append(_version_hashes(uris, batch["etag"].to_pylist()))
        columns[2].append(pc.not_equal(batch["status"], OK).to_numpy(zero_copy_only=False))
        columns[3].append(batch["finished_at"].cast(pa.int64()).to_numpy())
    types = (np.uint64, np.uint64, np.bool_, np.int64)
    uri, version, failed, finished_at = (_joined(*both) for both in zip(columns, types, strict=True))
    _, first, of_row = np.unique(version, return_index=True, return_inverse=True)
    if len(first) == len(version):
        return Hashed(uri, version, failed, failed, finished_at)
    newest, any_failed, all_failed = finished_at[first], np.zeros(len(first), np.bool_), np.ones(len(first), np.bool_)
    np.maximum.at(newest, of_row, finished_at)
    any_failed[of_row[failed]] = True
    all_failed[of_row[~failed]] = False
    return Hashed(uri[first], version[first], any_failed, all_failed, newest)


class Committed:
    """The state of every object that has rows, in 17 bytes for each.

    URI and version are 64-bit hashes, and both must agree. Where two URIs share a hash, one of them may count as absent
    and is done again; nothing counts as done that is not.
    """

    def __init__(self, attempts: Iterable[Hashed] = ()) -> None:
        """Takes the attempts one file at a time."""
        columns: list[list[NDArray[Any]]] = [[], [], [], [], []]
        for found in attempts:
            for column, values in zip(columns, found, strict=True):
                column.append(values)
        types = (np.uint64, np.uint64, np.bool_, np.bool_, np.int64)
        uri, version, failed, empty, finished_at = (_joined(*both) for both in zip(columns, types, strict=True))
        order = np.argsort(uri)
        states: list[tuple[UInt64, UInt64, Flags]] = []
        start = 0
        while start < len(order):
            stop = min(start + SLICE, len(order))
            while stop < len(order) and uri[order[stop]] == uri[order[stop - 1]]:
                stop += 1  # an object's attempts stay together
            some = np.sort(order[start:stop])
            some = some[settle(uri[some], version[some], empty[some], finished_at[some])]
            states.append((version[some], uri[some], ~failed[some]))
            start = stop
        del uri, version, failed, empty, finished_at, order
        versions, uris, ok = ([s[i] for s in states] for i in range(3))
        del states
        self._version = _joined(versions, np.uint64)
        order = np.argsort(self._version)
        self._version = self._version[order]
        self._uri = _joined(uris, np.uint64)[order]
        self._ok = _joined(ok, np.bool_)[order]

    def __len__(self) -> int:
        return len(self._version)

    @property
    def nbytes(self) -> int:
        """Bytes that it holds."""
        return self._version.nbytes + self._uri.nbytes + self._ok.nbytes

    def states(self, uris: Sequence[str], etags: Sequence[str]) -> NDArray[np.uint8]:
        """(N,) of ABSENT_STATE, FAILED_STATE, OK_STATE: what is committed of each object in exactly this version."""
        if len(self) == 0:
            return np.zeros(len(uris), np.uint8)
        versions = _version_hashes(uris, etags)
        at = np.minimum(np.searchsorted(self._version, versions), len(self) - 1)
        present = (self._version[at] == versions) & (self._uri[at] == hashes(uris))
        return np.where(present, np.where(self._ok[at], OK_STATE, FAILED_STATE), ABSENT_STATE).astype(np.uint8)

    def __reduce__(self) -> Any:
        raise TypeError("Committed holds hashes of this process; read it anew with Output.committed() in another")


def _version_hashes(uris: Sequence[str], etags: Sequence[str]) -> UInt64:
    return hashes([f"{uri}\0{etag}" for uri, etag in zip(uris, etags, strict=True)])


def _joined(column: list[NDArray[Any]], kind: type[np.generic]) -> NDArray[Any]:
    """The arrays as one; the list is emptied, so that the column is not there twice for longer than needed."""
    joined = np.concatenate([np.zeros(0, kind), *column])
    column.clear()
    return joined
