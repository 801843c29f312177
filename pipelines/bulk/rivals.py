"""Attempts at one object that lie in several files: which of them lose, decided by their real URIs and etags."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines.bulk.attempts import Attempts, UInt64, settle

RIVAL_SCHEMA = pa.schema(
    [
        ("uri", pa.string()),
        ("etag", pa.string()),
        ("empty", pa.bool_()),
        ("finished_at", pa.int64()),
        ("file", pa.int32()),
        ("number", pa.int32()),  # of the attempt in its file
    ]
)


class Buckets:
    """Rivals on a local disk, apart by the hash of their URI, so that those of one object come back together."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        self.writers = [pa.ipc.new_stream(str(folder / f"{i}.arrow"), RIVAL_SCHEMA) for i in range(count)]

    def add(self, rivals: pa.Table, found: UInt64) -> None:
        bucket = found % np.uint64(self.count)
        for number in np.unique(bucket):
            self.writers[number].write_table(rivals.take(pa.array(np.flatnonzero(bucket == number))))

    def tables(self) -> Iterator[pa.Table]:
        for number, writer in enumerate(self.writers):
            writer.close()
            with pa.OSFile(str(self.folder / f"{number}.arrow")) as file, pa.ipc.open_stream(file) as reader:
                yield reader.read_all()


def rivals_of(attempts: Attempts, file: int, chosen: NDArray[Any]) -> pa.Table:
    """The chosen attempts of a file, with the columns of RIVAL_SCHEMA."""
    columns = [attempts.uri.take(pa.array(chosen)), attempts.etag.take(pa.array(chosen)), attempts.empty[chosen]]
    columns += [attempts.finished_at[chosen], np.full(len(chosen), file, np.int32), chosen.astype(np.int32)]
    return pa.table(columns, schema=RIVAL_SCHEMA)


def losers_of(rivals: pa.Table, objects: NDArray[Any], versions: NDArray[Any]) -> dict[int, NDArray[np.int32]]:
    """The numbers of the attempts that do not count, by file."""
    empty, finished_at = rivals["empty"].to_numpy(), rivals["finished_at"].to_numpy()
    loses = np.ones(len(objects), np.bool_)
    loses[settle(objects, versions, empty, finished_at)] = False
    files, numbers = rivals["file"].to_numpy()[loses], rivals["number"].to_numpy()[loses]
    return {int(file): numbers[files == file] for file in np.unique(files)}


def codes(texts: pa.ChunkedArray) -> NDArray[Any]:
    """A number for each different text, in the order of the texts."""
    encoded = pa.concat_arrays(texts.chunks or [pa.array([], pa.string())]).dictionary_encode()
    rank = np.empty(len(encoded.dictionary), np.int64)
    rank[pc.sort_indices(encoded.dictionary).to_numpy()] = np.arange(len(rank))
    return rank[encoded.indices.to_numpy()]


def without(rows: pa.Table, attempts: Attempts, lost: NDArray[np.int32] | None) -> pa.Table:
    """The rows of a file that do not belong to one of these attempts."""
    if lost is None:
        return rows
    kept = np.ones(len(attempts), np.bool_)
    kept[lost] = False
    return rows.filter(pa.array(kept[attempts.of_row]))
