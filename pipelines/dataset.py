"""The sharded dataset: Parquet shards of encoded images and masks.

dataset.json                classes, splits with shards and digests, pixel counts
<split>/part-00000.parquet  key, image, mask, height, width, classes
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from pipelines.errors import RepsepError, UsageError
from pipelines.shard_cache import ShardCache
from pipelines.shard_reader import ShardReader
from pipelines.storage import Folder
from repsep_model.images import UInt8, decode_image, decode_mask

MANIFEST = "dataset.json"
SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("image", pa.binary()),
        ("mask", pa.binary()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("classes", pa.list_(pa.uint8())),
    ]
)
SAMPLE = ("key", "image", "mask")
"""The columns that make a sample."""

Indices = NDArray[np.int64]


@dataclass(frozen=True)
class Dataset:
    """A prepared dataset. `classes_file` is the content of classes.json as it is saved beside models."""

    folder: Folder
    manifest: dict[str, Any]

    @property
    def num_classes(self) -> int:
        return len(self.manifest["classes"])

    @property
    def class_names(self) -> list[str]:
        return [c["name"] for c in self.manifest["classes"]]

    @property
    def colours(self) -> list[list[int]]:
        return [c["color"] for c in self.manifest["classes"]]

    @property
    def digest(self) -> str:
        """SHA-256 of the classes and of every shard."""
        content = {"classes": self.manifest["classes"], "splits": self.manifest["splits"]}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def split_digest(self, name: str) -> str:
        """SHA-256 of one split's shards."""
        self.split(name)
        digest: str = self.manifest["splits"][name]["digest"]
        return digest

    @property
    def classes_file(self) -> dict[str, Any]:
        return {key: self.manifest[key] for key in ("name", "ignore_index", "classes")}

    def split(self, name: str, cache: ShardCache | None = None) -> Split:
        """Shards that are not on a local disk are read through `cache`, if there is one."""
        if name not in self.manifest["splits"]:
            raise UsageError(f"{self.folder.uri} has no split {name!r}; it has {', '.join(self.manifest['splits'])}")
        shards, pattern = self.manifest["splits"][name]["shards"], self.manifest.get("group_pattern")
        return Split(self.folder, shards, pattern, None if self.folder.local else cache)


def open_dataset(uri: str) -> Dataset:
    """Raises RepsepError where there is no dataset."""
    folder = Folder(uri)
    data = folder.read_if_present(MANIFEST)
    if data is None:
        raise RepsepError(f"{uri} holds no prepared dataset ({MANIFEST} is missing); run `repsep prepare` first")
    return Dataset(folder, json.loads(data))


def group_of(key: str, pattern: str | None) -> str:
    """What must not be split: the first group of the pattern, else the key's folder, else the key itself."""
    if pattern is not None and (found := re.search(pattern, key)):
        return found.group(1) if found.groups() else found.group(0)
    return key.rpartition("/")[0] or key


def in_share(group: str, share: float, seed: int) -> bool:
    """Whether a group belongs to a share of all groups; a function of its name, so no list is needed."""
    digest = hashlib.sha256(f"{seed}:{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class Split:
    """Rows of one split, numbered by row group and row in it. A held-out part keeps the numbers and has fewer rows.

    `starts` (G + 1,) is how many of its rows come before each row group; that, and for a held-out part the row numbers,
    is all that is kept of them: 8 bytes a row group.
    """

    def __init__(
        self,
        folder: Folder,
        shards: Sequence[dict[str, Any]],
        group_pattern: str | None,
        cache: ShardCache | None = None,
    ) -> None:
        self.folder, self.shards, self.group_pattern = folder, list(shards), group_pattern
        self.reader = ShardReader(folder, self.shards, cache)
        self.first_groups = np.cumsum([0, *(len(s["row_groups"]) for s in shards)])
        """(shards + 1,): the number of each shard's first row group."""
        self.starts: Indices = np.cumsum([0, *(n for s in shards for n in s["row_groups"])], dtype=np.int64)
        self._kept: Indices | None = None

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def num_groups(self) -> int:
        return len(self.starts) - 1

    def rows(self, group: int) -> Indices:
        """The numbers of this split's rows within a row group."""
        start, end = self.starts[group : group + 2]
        return np.arange(end - start) if self._kept is None else self._kept[start:end]

    def keep(self, rows: Sequence[Indices]) -> None:
        """Leave out all other rows; `rows` has an entry for each row group."""
        self.starts = np.cumsum([0, *map(len, rows)], dtype=np.int64)
        self._kept = np.concatenate(rows).astype(np.int64)

    def held_out(self, share: float, seed: int, *, inside: bool) -> Split:
        """The part of this split that is (or is not) in a held-out share of its groups."""
        part = Split(self.folder, self.shards, self.group_pattern, self.reader.cache)
        reader = ShardReader(self.folder, self.shards)  # keys are a small part: no shard comes into a cache for them
        kept = []
        for number in range(self.num_groups):
            shard = self.shard_of(number)
            own_folder = self.shards[shard]["file"].partition("/")[0]  # the split's
            keys = reader.read(shard, number - int(self.first_groups[shard]), ["key"])["key"].to_pylist()
            below = [k.removeprefix(f"{own_folder}/") for k in keys]
            chosen = [in_share(group_of(k, self.group_pattern), share, seed) == inside for k in below]
            kept.append(np.flatnonzero(chosen))
        part.keep(kept)
        if len(part) == 0:
            raise UsageError(
                f"a holdout of {share} leaves no image on one side: the images form too few groups "
                "(a group is a folder, or what prepare.group_pattern finds in the key); give another share or pattern"
            )
        return part

    def shard_of(self, group: int) -> int:
        """The number of the shard that holds a row group."""
        return int(np.searchsorted(self.first_groups, group, side="right")) - 1

    def read(self, group: int, columns: Sequence[str] = SAMPLE) -> pa.Table:
        """One row group; nothing is kept of it."""
        shard = self.shard_of(group)
        return self.reader.read(shard, group - int(self.first_groups[shard]), columns)

    def share(self, rank: int, world_size: int, limit: int | None = None) -> Iterator[tuple[str, UInt8, UInt8]]:
        """(key, image, mask) of the rank's run of neighbouring rows: each row is in exactly one share."""
        total = len(self) if limit is None else min(limit, len(self))
        first, stop = self.share_of(total, rank, world_size)
        for group in range(self.num_groups):
            start = int(self.starts[group])
            rows = self.rows(group)[max(first - start, 0) : max(stop - start, 0)]
            if len(rows):
                table = self.read(group)
                for row in rows.tolist():
                    key, image, mask = (table[name][row].as_py() for name in SAMPLE)
                    yield key, decode_image(image), decode_mask(mask)

    @staticmethod
    def share_of(total: int, rank: int, world_size: int) -> tuple[int, int]:
        """The first of the rank's rows among `total`, and the first of the next rank's."""
        return total * rank // world_size, total * (rank + 1) // world_size

    def masks(self, limit: int) -> Iterator[UInt8]:
        """At most `limit` masks, taken evenly; no image is read."""
        every = max(1, -(-len(self) // limit))
        number = 0
        for group in range(self.num_groups):
            wanted = [int(row) for i, row in enumerate(self.rows(group), number) if i % every == 0]
            number += len(self.rows(group))
            if wanted:
                column = self.read(group, ["mask"])["mask"]
                yield from (decode_mask(column[row].as_py()) for row in wanted)
