"""The sharded dataset: Parquet shards of encoded images and masks, and a reader that can start anywhere.

    dataset.json                classes, splits with shards and digests, pixel counts
    <split>/part-00000.parquet  key, image, mask, height, width, classes

The order of training samples is a function of (seed, epoch) and a position is a *global sample count*: neither
depends on the number of workers, so a run can resume, or change its size, without seeing an image twice.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.errors import RepsepError, UsageError
from pipelines.storage import Folder
from repsep_model.images import UInt8, decode_image, decode_mask
from repsep_model.transforms import Augmentation, augment, sample_rng

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
SHUFFLE_GROUPS = 16
"""Row groups whose rows are mixed with each other: the reader's memory is bounded by twice as many."""

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

    def split(self, name: str) -> Split:
        if name not in self.manifest["splits"]:
            raise UsageError(f"{self.folder.uri} has no split {name!r}; it has {', '.join(self.manifest['splits'])}")
        return Split(self.folder, self.manifest["splits"][name]["shards"], self.manifest.get("group_pattern"))


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
    """Rows of one split, by row group. `keep` may leave rows out."""

    def __init__(self, folder: Folder, shards: Sequence[dict[str, Any]], group_pattern: str | None) -> None:
        self.folder, self.shards, self.group_pattern = folder, list(shards), group_pattern
        self.groups = [(s["file"], i) for s in shards for i in range(len(s["row_groups"]))]
        self.rows: list[Indices] = [np.arange(n) for s in shards for n in s["row_groups"]]
        self._cache: OrderedDict[int, pa.Table] = OrderedDict()
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(len(rows) for rows in self.rows)

    def held_out(self, share: float, seed: int, *, inside: bool) -> Split:
        """The part of this split that is (or is not) in a held-out share of its groups."""
        part = Split(self.folder, self.shards, self.group_pattern)
        for number in range(len(self.groups)):
            keys = self._read_group(number, ["key"])["key"].to_pylist()
            below = [
                k.removeprefix(f"{self.groups[number][0].partition('/')[0]}/") for k in keys
            ]  # the split's own folder
            chosen = [in_share(group_of(k, self.group_pattern), share, seed) == inside for k in below]
            part.rows[number] = np.flatnonzero(chosen)
        if len(part) == 0:
            raise UsageError(
                f"a holdout of {share} leaves no image on one side: the images form too few groups "
                "(a group is a folder, or what prepare.group_pattern finds in the key); give another share or pattern"
            )
        return part

    def at(self, group: int, row: int) -> dict[str, Any]:
        """One row's columns as Python values."""
        table = self._group(group)
        return {name: table[name][row].as_py() for name in ("key", "image", "mask")}

    def share(self, rank: int, world_size: int, limit: int | None = None) -> Iterator[tuple[str, UInt8, UInt8]]:
        """(key, image, mask) of every world_size-th row: each row is in exactly one share, none is repeated."""
        number = 0
        for group, rows in enumerate(self.rows):
            for row in rows:
                if limit is not None and number >= limit:
                    return
                if number % world_size == rank:
                    found = self.at(group, int(row))
                    yield found["key"], decode_image(found["image"]), decode_mask(found["mask"])
                number += 1

    def masks(self, limit: int) -> Iterator[UInt8]:
        """At most `limit` masks, taken evenly; no image is read."""
        every = max(1, -(-len(self) // limit))
        number = 0
        for group, rows in enumerate(self.rows):
            wanted = [int(row) for i, row in enumerate(rows) if (number + i) % every == 0]
            number += len(rows)
            if wanted:
                column = self._read_group(group, ["mask"])["mask"]
                yield from (decode_mask(column[row].as_py()) for row in wanted)

    def _group(self, number: int) -> pa.Table:
        with self._lock:
            if number in self._cache:
                self._cache.move_to_end(number)
                return self._cache[number]
        table = self._read_group(number, ["key", "image", "mask"])
        with self._lock:
            self._cache[number] = table
            while len(self._cache) > 2 * SHUFFLE_GROUPS:
                self._cache.popitem(last=False)
        return table

    def _read_group(self, number: int, columns: list[str]) -> pa.Table:
        file, row_group = self.groups[number]
        with self.folder.open(file) as handle:
            return pq.ParquetFile(handle).read_row_group(row_group, columns=columns)


class SampleOrder:
    """Which row is at which global position: epochs follow each other without a gap.

    Row groups are permuted, then the rows of 16 neighbouring groups, a block, are mixed. Any position is found without
    walking there.

    With `class_probabilities` (K,) each place of a block is drawn instead: a class among those in the block, then one
    of the block's rows that hold it (rare-class sampling after DAFormer, Hoyer et al. 2022). An epoch stays as long;
    rows may come several times in it or not at all, and those without any label only in a block that has no class. A
    class is drawn in the blocks that hold it, so one that few hold comes less often than its probability says: the
    price of reading neighbouring rows.
    """

    def __init__(self, split: Split, seed: int, class_probabilities: NDArray[np.float64] | None = None) -> None:
        self.split, self.seed, self.length = split, seed, len(split)
        self.class_probabilities = class_probabilities
        self._epoch: tuple[int, NDArray[np.int64], Indices] | None = None
        self._blocks: OrderedDict[tuple[int, int], Indices] = OrderedDict()
        self._lock = threading.Lock()

    def locate(self, position: int) -> tuple[int, int, int]:
        """(epoch, row group, row in it) of a global position."""
        epoch, offset = divmod(position, self.length)
        with self._lock:
            groups, ends = self._epoch_groups(epoch)
            place = int(np.searchsorted(ends, offset, side="right"))
            block = place // SHUFFLE_GROUPS
            rows = self._block_rows(epoch, block, groups)
            first = block * SHUFFLE_GROUPS
            start = int(ends[first - 1]) if first else 0
            group, row = rows[offset - start]
        return epoch, int(group), int(row)

    def _epoch_groups(self, epoch: int) -> tuple[NDArray[np.int64], Indices]:
        if self._epoch is None or self._epoch[0] != epoch:
            groups = self._rng(epoch, 0).permutation(len(self.split.rows))
            ends = np.cumsum([len(self.split.rows[g]) for g in groups])
            self._epoch = (epoch, groups, ends)
        return self._epoch[1], self._epoch[2]

    def _block_rows(self, epoch: int, block: int, groups: NDArray[np.int64]) -> Indices:
        if (epoch, block) not in self._blocks:
            members = groups[block * SHUFFLE_GROUPS : (block + 1) * SHUFFLE_GROUPS]
            rows = np.asarray([(g, r) for g in members for r in self.split.rows[g]], np.int64).reshape(-1, 2)
            rng = self._rng(epoch, block + 1)
            self._blocks[epoch, block] = rows[self._chosen(rows, rng)]
            while len(self._blocks) > 2:  # loader threads cross the border between two blocks in any order
                self._blocks.popitem(last=False)
        return self._blocks[epoch, block]

    def _chosen(self, rows: Indices, rng: np.random.Generator) -> Indices:
        """Which of a block's rows is at each of its places."""
        if self.class_probabilities is not None:
            holds_RK = self._classes(rows)
            weights = self.class_probabilities * holds_RK.any(axis=0)
            if weights.any():
                classes = rng.choice(len(weights), size=len(rows), p=weights / weights.sum())
                places = rng.integers(holds_RK.sum(axis=0)[classes])
                holders = [np.flatnonzero(holds) for holds in holds_RK.T]
                return np.array([holders[k][i] for k, i in zip(classes, places, strict=True)])
        return rng.permutation(len(rows))

    def _classes(self, rows: Indices) -> NDArray[np.bool_]:
        """(rows, K): which classes each row holds, from the shards' column; neither image nor mask is read."""
        assert self.class_probabilities is not None
        found = {g: self.split._read_group(g, ["classes"])["classes"].to_pylist() for g in np.unique(rows[:, 0])}
        holds_RK = np.zeros((len(rows), len(self.class_probabilities)), bool)
        for holds_K, (group, row) in zip(holds_RK, rows, strict=True):
            holds_K[found[group][row]] = True
        return holds_RK

    def _rng(self, epoch: int, stream: int) -> np.random.Generator:
        # A list would pass through float64, where large seeds are alike.
        key = np.array([self.seed & (2**64 - 1), (epoch << 32) + stream], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))


class TrainLoader:
    """Augmented micro-batches of one rank, decoded ahead by threads (Pillow and torch release the interpreter lock)."""

    def __init__(
        self,
        split: Split,
        *,
        augmentation: Augmentation,
        fill: Sequence[int],
        seed: int,
        threads: int,
        class_probabilities: NDArray[np.float64] | None = None,
        ahead: int = 2,
    ) -> None:
        self.split, self.how, self.fill, self.seed = split, augmentation, tuple(fill), seed
        self.order = SampleOrder(split, seed, class_probabilities)
        self.ahead = ahead
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="loader")

    def steps(
        self, start: int, stop: int, *, batch_size: int, micro_batch: int | None, rank: int, world_size: int
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yields this rank's micro-batches of the steps start..stop-1: images (b, 3, S, S), labels (b, S, S), uint8.

        A global batch that does not divide is split unevenly; the losses are exact all the same.
        """
        waiting: OrderedDict[int, list[Future[tuple[Tensor, Tensor]]]] = OrderedDict()
        for step in range(start, stop):
            for near in range(step, min(stop, step + 1 + self.ahead)):
                if near not in waiting:
                    mine = np.array_split(np.arange(near * batch_size, (near + 1) * batch_size), world_size)[rank]
                    waiting[near] = [self.pool.submit(self.sample, int(p)) for p in mine]
            samples = [future.result() for future in waiting.pop(step)]
            size = micro_batch or len(samples)
            parts = [samples[i : i + size] for i in range(0, len(samples), size)]
            yield [(torch.stack([s[0] for s in part]), torch.stack([s[1] for s in part])) for part in parts]

    def sample(self, position: int) -> tuple[Tensor, Tensor]:
        """The augmented sample at a global position; the same whoever asks."""
        epoch, group, row = self.order.locate(position)
        found = self.split.at(group, row)
        rng = sample_rng(self.seed, epoch, position % self.order.length)
        return augment(decode_image(found["image"]), decode_mask(found["mask"]), rng, self.how, self.fill)

    def close(self) -> None:
        self.pool.shutdown(wait=False, cancel_futures=True)
