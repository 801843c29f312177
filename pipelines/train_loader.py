"""Augmented micro-batches of one rank, in order, each stage ahead of the one that needs it.

    plans         which samples a step has, a window ahead if shards go into a local cache, else two blocks
    shards        brought into the cache in the order in which plans name them
    row groups    read a block ahead, so that the first step of a block finds its row groups in memory; each once
    samples       decoded and augmented some steps ahead by threads (Pillow and numpy release the interpreter lock)

Held in memory are the row groups of the steps between the one that is trained and the one that is read for: about two
blocks while a global batch is smaller than a block, else those of this rank's samples in four steps.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.dataset import Split
from pipelines.sample_order import SHUFFLE_GROUPS, SHUFFLE_SHARDS, SampleOrder, Samples
from repsep_model.images import decode_image, decode_mask
from repsep_model.transforms import Augmentation, augment, sample_rng

READERS = 4
"""Row groups that are read at once; a read over the network mostly waits."""

Sample = tuple[Tensor, Tensor]
Wanted = tuple[int, int, Future[pa.Table], int]
"""Position, epoch, the row group's rows, and which of them."""


class TrainLoader:
    """Reads from wherever a run is: nothing that was trained before `start` is read."""

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
        self.threads, self.ahead = threads, ahead
        self._decoders = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self._readers = ThreadPoolExecutor(READERS, thread_name_prefix="read")
        self._stockers = ThreadPoolExecutor(2, thread_name_prefix="stock")
        self._planner = ThreadPoolExecutor(1, thread_name_prefix="plan")

    def steps(
        self, start: int, stop: int, *, batch_size: int, micro_batch: int | None, rank: int, world_size: int
    ) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """Yields this rank's micro-batches of the steps start..stop-1: images (b, 3, S, S), labels (b, S, S), uint8.

        A global batch that does not divide is split unevenly; the losses are exact all the same.
        """
        read_ahead = max(self.ahead, -(-self._block_rows() // batch_size))
        plan_ahead = max(2 * read_ahead, -(-self._window_rows() // batch_size) if self.split.reader.cache else 0)
        plans: dict[int, Future[Samples]] = {}
        tables: dict[int, Future[pa.Table]] = {}
        users: Counter[int] = Counter()
        decoding: dict[int, list[Future[list[Sample]]]] = {}
        stocked: deque[int] = deque(maxlen=4 * SHUFFLE_SHARDS)
        planned, reading = start, start
        for step in range(start, stop):
            while planned < min(stop, step + 1 + plan_ahead):
                plans[planned] = self._planner.submit(self._plan, planned, batch_size, rank, world_size, stocked)
                planned += 1
            while reading < min(stop, step + 1 + read_ahead):
                for group in np.unique(plans[reading].result().groups).tolist():
                    users[group] += 1
                    if group not in tables:
                        tables[group] = self._readers.submit(self.split.read, group)
                reading += 1
            for near in range(step, min(stop, step + 1 + self.ahead)):
                if near not in decoding:
                    decoding[near] = self._decode(plans[near].result(), tables)
            samples = [sample for part in decoding.pop(step) for sample in part.result()]
            for group in np.unique(plans.pop(step).result().groups).tolist():
                users[group] -= 1
                if not users[group]:
                    del users[group], tables[group]
            size = micro_batch or max(1, len(samples))
            parts = [samples[i : i + size] for i in range(0, len(samples), size)]
            yield [(torch.stack([s[0] for s in part]), torch.stack([s[1] for s in part])) for part in parts]

    def _decode(self, plan: Samples, tables: dict[int, Future[pa.Table]]) -> list[Future[list[Sample]]]:
        """A part of the samples for each thread: to hand them over one by one takes as long as some of the work."""
        samples = [
            (position, epoch, tables[group], row)
            for position, epoch, group, row in zip(*(column.tolist() for column in plan), strict=True)
        ]
        size = max(1, -(-len(samples) // self.threads))
        parts = [samples[i : i + size] for i in range(0, len(samples), size)]
        return [self._decoders.submit(self._samples, part) for part in parts]

    def _samples(self, wanted: list[Wanted]) -> list[Sample]:
        return [self._augmented(*where) for where in wanted]

    def keys(self, step: int, batch_size: int) -> list[str]:
        """The source keys of a step's global batch, in order."""
        batch = self.order.step_samples(step, batch_size)
        found = {g: self.split.read(g, ["key"])["key"] for g in np.unique(batch.groups).tolist()}
        return [found[g][row].as_py() for g, row in zip(batch.groups.tolist(), batch.rows.tolist(), strict=True)]

    def sample(self, position: int) -> Sample:
        """The augmented sample at a global position; the same whoever asks."""
        (position,), (epoch,), (group,), (row,) = (c.tolist() for c in self.order.samples(position, position + 1))
        table: Future[pa.Table] = Future()
        table.set_result(self.split.read(group))
        return self._augmented(position, epoch, table, row)

    def close(self) -> None:
        for pool in (self._planner, self._stockers, self._decoders, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)

    def _plan(self, step: int, batch_size: int, rank: int, world_size: int, stocked: deque[int]) -> Samples:
        """Where a step's samples are; shards that did not come lately go into the cache. In one thread only."""
        plan = self.order.step_samples(step, batch_size, rank, world_size)
        if self.split.reader.cache is not None:
            for shard in sorted({self.split.shard_of(group) for group in np.unique(plan.groups)}.difference(stocked)):
                stocked.append(shard)
                self._stockers.submit(self.split.reader.fetch, shard)
        return plan

    def _augmented(self, position: int, epoch: int, table: Future[pa.Table], row: int) -> Sample:
        found = table.result()
        rng = sample_rng(self.seed, epoch, position % self.order.length)
        image, mask = (found[name][row].as_py() for name in ("image", "mask"))
        return augment(decode_image(image), decode_mask(mask), rng, self.how, self.fill)

    def _block_rows(self) -> int:
        return -(-SHUFFLE_GROUPS * len(self.split) // self.split.num_groups)

    def _window_rows(self) -> int:
        return -(-SHUFFLE_SHARDS * len(self.split) // len(self.split.shards))
