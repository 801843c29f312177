"""Which row is at which global position of training: a function of the seed and the epoch.

    epoch    the shards, permuted
    window   16 shards that follow each other: their row groups, permuted
    block    16 row groups that follow each other: their rows, permuted

A position is a *global sample count*: it does not depend on the number of workers, so a run can resume, or change its
size, without seeing an image twice. What is held in memory of an epoch is one number for each shard.

Who reads what: the samples of a step are dealt out in the order in which they lie in the shards (`step_samples`), so
that a rank's share of a step comes from few row groups. Row groups are the least that can be read; in an epoch of row
groups of 16 images a rank reads this many images for each that it uses (as they come, undealt, in brackets):

    ranks x images of each in a step     1 x 8  1.0 (1.0)      8 x 8  2.0 (7.2)      64 x 8  2.0 (12.9)
                                    1000 x 16  1.7 (10.5)   1000 x 8  2.8 (13.2)   1000 x 1  15.8 (16)

So `prepare.row_group_rows` should not be much over the images that a worker takes in a step. Shards that a machine
keeps whole (`shard_cache.py`) are downloaded by every machine that needs a part of them: with hundreds of machines and
a dataset over the cache's size read row groups over the network instead (`cache_gib: 0`).
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from pipelines.dataset import Indices, Split

SHUFFLE_SHARDS = 16
"""Shards in a window: a local cache must hold two windows for every shard to be downloaded once in an epoch."""

SHUFFLE_GROUPS = 16
"""Row groups in a block: what is read ahead, and held, is a few times as many."""

BLOCKS = 64
"""Blocks whose rows are remembered, 4 KB each for row groups of 16."""

Key = TypeVar("Key")
Kept = TypeVar("Kept")


class Samples(NamedTuple):
    """Where samples are, an array (n,) each: position in all, epoch, row group, row in it."""

    positions: Indices
    epochs: Indices
    groups: Indices
    rows: Indices


class _Window(NamedTuple):
    """Row groups in their order, and where each ends, counted from the start of the window."""

    number: int
    start: int
    groups: Indices
    ends: Indices


class SampleOrder:
    """Epochs follow each other without a gap; any position is found without walking there.

    With `class_probabilities` (K,) each place of a block is drawn instead: a class among those in the block, then one
    of the block's rows that hold it (rare-class sampling after DAFormer, Hoyer et al. 2022). An epoch stays as long;
    rows may come several times in it or not at all, and those without any label only in a block that has no class. A
    class is drawn in the blocks that hold it, so one that few hold comes less often than its probability says: the
    price of reading neighbouring rows.
    """

    def __init__(self, split: Split, seed: int, class_probabilities: NDArray[np.float64] | None = None) -> None:
        self.split, self.seed, self.length = split, seed, len(split)
        self.class_probabilities = class_probabilities
        self._epochs: OrderedDict[int, tuple[Indices, Indices]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], _Window] = OrderedDict()
        self._blocks: OrderedDict[tuple[int, int, int], Indices] = OrderedDict()
        self._lock = threading.Lock()

    def samples(self, start: int, stop: int) -> Samples:
        """The samples at the global positions start..stop-1."""
        parts, position = [np.empty((0, 3), np.int64)], start
        with self._lock:
            while position < stop:
                epoch, first, rows = self._block_at(position)
                part = rows[position - first : stop - first]
                parts.append(np.column_stack([np.full(len(part), epoch), part]))
                position += len(part)
        found = np.concatenate(parts)
        return Samples(np.arange(start, stop), *found.T)

    def step_samples(self, step: int, batch_size: int, rank: int = 0, world_size: int = 1) -> Samples:
        """A rank's share of a step's global batch. All shares, in order of rank, are the same for any number of ranks.

        A batch that does not divide is split unevenly.
        """
        batch = self.samples(step * batch_size, (step + 1) * batch_size)
        by_place = np.lexsort((batch.positions, batch.groups, batch.epochs))
        share = np.array_split(by_place, world_size)[rank]
        return Samples(*(column[share] for column in batch))

    def _block_at(self, position: int) -> tuple[int, int, Indices]:
        """Epoch, first position and rows (n, 2) of the block in which a position lies."""
        epoch, offset = divmod(position, self.length)
        window = self._window_at(epoch, offset)
        place = int(np.searchsorted(window.ends, offset - window.start, side="right"))
        number = place // SHUFFLE_GROUPS
        first = number * SHUFFLE_GROUPS
        start = epoch * self.length + window.start + (int(window.ends[first - 1]) if first else 0)
        groups = window.groups[first : first + SHUFFLE_GROUPS]
        key = (epoch, window.number, number)
        return epoch, start, _kept(self._blocks, key, BLOCKS, lambda: self._block_rows(key, groups))

    def _window_at(self, epoch: int, offset: int) -> _Window:
        shards, ends = _kept(self._epochs, epoch, 2, lambda: self._epoch_shards(epoch))
        number = int(np.searchsorted(ends, offset, side="right")) // SHUFFLE_SHARDS
        first = number * SHUFFLE_SHARDS
        start = int(ends[first - 1]) if first else 0
        members = shards[first : first + SHUFFLE_SHARDS]
        return _kept(self._windows, (epoch, number), 4, lambda: self._window(epoch, number, start, members))

    def _epoch_shards(self, epoch: int) -> tuple[Indices, Indices]:
        """The shards in their order, and where the rows of each end."""
        rows = np.diff(self.split.starts[self.split.first_groups])
        shards = self._rng(epoch).permutation(len(rows))
        return shards, np.cumsum(rows[shards])

    def _window(self, epoch: int, number: int, start: int, shards: Indices) -> _Window:
        first = self.split.first_groups
        groups = np.concatenate([np.arange(first[s], first[s + 1]) for s in np.sort(shards)])
        groups = self._rng(epoch, number + 1).permutation(groups)
        starts = self.split.starts
        return _Window(number, start, groups, np.cumsum(starts[groups + 1] - starts[groups]))

    def _block_rows(self, key: tuple[int, int, int], groups: Indices) -> Indices:
        epoch, window, number = key
        found = [(group, self.split.rows(int(group))) for group in groups]
        rows = np.concatenate([np.column_stack([np.full(len(r), group), r]) for group, r in found])
        return rows[self._chosen(rows, self._rng(epoch, window + 1, number + 1))]

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
        found = {g: self.split.read(int(g), ["classes"])["classes"].to_pylist() for g in np.unique(rows[:, 0])}
        holds_RK = np.zeros((len(rows), len(self.class_probabilities)), bool)
        for holds_K, (group, row) in zip(holds_RK, rows, strict=True):
            holds_K[found[group][row]] = True
        return holds_RK

    def _rng(self, epoch: int, window: int = 0, block: int = 0) -> np.random.Generator:
        # A list would pass through float64, where large seeds are alike.
        key = np.array([self.seed & (2**64 - 1), epoch], np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=np.array([0, 1, window, block], np.uint64)))


def _kept(kept: OrderedDict[Key, Kept], key: Key, most: int, find: Callable[[], Kept]) -> Kept:
    """What is kept under the key, else found and kept; what was used least recently goes."""
    if key not in kept:
        kept[key] = find()
        while len(kept) > most:
            kept.popitem(last=False)
    kept.move_to_end(key)
    return kept[key]
