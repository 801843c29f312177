"""Batches of training: the same for any number of ranks and threads, from any step on; read once, ahead, in bounds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import PrepareConfig
from pipelines.dataset import Dataset, Split, open_dataset
from pipelines.errors import StorageError
from pipelines.prepare import prepare
from pipelines.sample_order import SHUFFLE_GROUPS, SampleOrder
from pipelines.train_loader import TrainLoader
from repsep_model.transforms import Augmentation, class_probabilities, sample_rng


@pytest.fixture(scope="module")
def dataset(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 training images in 3 shards of several row groups, 8 for validation."""
    config = PrepareConfig(source=str(scenes), shard_rows=10, row_group_rows=3)
    return open_dataset(prepare(str(tmp_path_factory.mktemp("work")), config).results["dataset"])


def loader(split: Split, threads: int = 2, rare: NDArray[np.float64] | None = None) -> TrainLoader:
    how = Augmentation(crop=32, scale=(0.5, 1.5))
    return TrainLoader(split, augmentation=how, fill=(120, 120, 120), seed=3, threads=threads, class_probabilities=rare)


def steps(
    split: Split,
    start: int,
    stop: int,
    batch_size: int,
    rank: int = 0,
    ranks: int = 1,
    micro: int | None = None,
    rare: NDArray[np.float64] | None = None,
) -> list[list[tuple[Tensor, Tensor]]]:
    source = loader(split, rare=rare)
    how = {"batch_size": batch_size, "micro_batch": micro, "rank": rank, "world_size": ranks}
    try:
        return list(source.steps(start, stop, **how))  # type: ignore[arg-type]
    finally:
        source.close()


def joined(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    images, labels = zip(*parts, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [3, 4, 7])
def test_the_batches_of_all_ranks_are_the_same_global_batches(dataset: Dataset, batch_size: int, ranks: int) -> None:
    split = dataset.split("train")
    source = loader(split)
    shares = [steps(split, 0, 4, batch_size, rank, ranks) for rank in range(ranks)]
    for step in range(4):
        images, labels = joined([part for share in shares for part in share[step]])
        positions = source.order.step_samples(step, batch_size).positions
        assert sorted(positions) == list(range(step * batch_size, (step + 1) * batch_size))
        expected = [source.sample(int(p)) for p in positions]
        assert torch.equal(images, torch.stack([image for image, _ in expected]))
        assert torch.equal(labels, torch.stack([label for _, label in expected]))
    source.close()


def test_a_batch_that_does_not_divide_is_split_as_evenly_as_it_can_be(dataset: Dataset) -> None:
    sizes = [len(joined(steps(dataset.split("train"), 0, 1, 7, rank, 3)[0])[0]) for rank in range(3)]
    assert sorted(sizes) == [2, 2, 3]


@pytest.mark.parametrize(("micro", "sizes"), [(None, [5]), (5, [5]), (2, [2, 2, 1]), (1, [1] * 5), (9, [5])])
def test_micro_batches_cut_a_step_without_changing_it(dataset: Dataset, micro: int | None, sizes: list[int]) -> None:
    split = dataset.split("train")
    (whole,) = steps(split, 1, 2, 5)
    (parts,) = steps(split, 1, 2, 5, micro=micro)
    assert [len(images) for images, _ in parts] == sizes
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(joined(parts), joined(whole), strict=True))


@pytest.mark.parametrize("start", [1, 5, 9])
def test_a_run_that_starts_in_the_middle_sees_what_one_from_the_start_sees(dataset: Dataset, start: int) -> None:
    split = dataset.split("train")  # 24 images: step 5 of 5 lies across the end of the first epoch
    full = steps(split, 0, 10, 5)
    late = steps(split, start, 10, 5)
    assert len(late) == 10 - start
    for ours, theirs in zip(late, full[start:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(joined(ours), joined(theirs), strict=True))


def test_the_number_of_threads_does_not_change_a_batch(dataset: Dataset) -> None:
    sources = [loader(dataset.split("train"), threads) for threads in (1, 4)]
    how = {"batch_size": 6, "micro_batch": None, "rank": 0, "world_size": 1}
    one, four = (list(source.steps(0, 3, **how)) for source in sources)  # type: ignore[arg-type]
    for source in sources:
        source.close()
    for ours, theirs in zip(one, four, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(joined(ours), joined(theirs), strict=True))


def test_a_second_epoch_shows_the_same_images_in_other_crops(dataset: Dataset) -> None:
    split = dataset.split("train")
    source = loader(split)
    by_row: dict[tuple[int, int], list[Tensor]] = {}
    for position in range(2 * len(split)):
        _, _, (group,), (row,) = source.order.samples(position, position + 1)
        by_row.setdefault((int(group), int(row)), []).append(source.sample(position)[0])
    source.close()
    assert all(len(crops) == 2 for crops in by_row.values())
    assert not any(torch.equal(*crops) for crops in by_row.values())


def test_every_sample_draws_from_random_numbers_of_its_own(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("pipelines.train_loader.sample_rng", lambda *key: drawn.append(key) or sample_rng(*key))
    source = loader(dataset.split("train"))
    for position in range(60):
        source.sample(position)
    source.close()
    assert drawn == [(3, position // 24, position % 24) for position in range(60)]


# ---------------------------------------------------------------- rare classes


@pytest.fixture(scope="module")
def rare(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Split, NDArray[np.float64]]:
    """24 training images in 24 row groups, and how often their classes are drawn."""
    config = PrepareConfig(source=str(scenes), row_group_rows=1)
    found = open_dataset(prepare(str(tmp_path_factory.mktemp("work")), config).results["dataset"])
    return found.split("train"), class_probabilities(found.manifest["pixels"], 0.05)


@pytest.mark.parametrize("start", [1, 4, 7])
def test_a_run_with_rare_classes_resumes_where_it_was(rare: tuple[Split, NDArray[np.float64]], start: int) -> None:
    full, late = steps(rare[0], 0, 8, 5, rare=rare[1]), steps(rare[0], start, 8, 5, rare=rare[1])
    for ours, theirs in zip(late, full[start:], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(joined(ours), joined(theirs), strict=True))
    plain = steps(rare[0], 0, 8, 5)
    assert not all(torch.equal(joined(ours)[0], joined(theirs)[0]) for ours, theirs in zip(full, plain, strict=True))


@pytest.mark.parametrize("ranks", [2, 3])
def test_workers_share_the_batches_with_rare_classes(rare: tuple[Split, NDArray[np.float64]], ranks: int) -> None:
    alone = steps(rare[0], 0, 8, 5, rare=rare[1])
    shares = [steps(rare[0], 0, 8, 5, rank, ranks, rare=rare[1]) for rank in range(ranks)]
    for step, batch in enumerate(alone):
        together = joined([part for share in shares for part in share[step]])
        assert all(torch.equal(a, b) for a, b in zip(together, joined(batch), strict=True))


# ---------------------------------------------------------------- reading


@pytest.fixture(scope="module")
def many(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """The images 8 times under other names: 192 in 12 shards of 16, 2 in a row group."""
    source = tmp_path_factory.mktemp("many")
    for kind in ("images", "masks"):
        for file in sorted((scenes / kind / "train").iterdir()):
            for copy in range(8):
                target = source / kind / "train" / f"{copy}-{file.name}"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(file.read_bytes())
        (source / kind / "val").mkdir()
        first = min((scenes / kind / "val").iterdir())
        (source / kind / "val" / first.name).write_bytes(first.read_bytes())
    (source / "classes.json").write_bytes((scenes / "classes.json").read_bytes())
    config = PrepareConfig(source=str(source), shard_rows=16, row_group_rows=2)
    return open_dataset(prepare(str(tmp_path_factory.mktemp("work")), config).results["dataset"])


class Reads:
    """Which pieces of shards a split reads."""

    def __init__(self, split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
        self.groups: list[int] = []
        self.bytes = 0
        read, get = split.read, split.reader._bytes

        def counted(group: int, *columns: Sequence[str]) -> pa.Table:
            self.groups.append(group)
            return read(group, *columns)

        def weighed(shard: int, start: int, end: int | None) -> bytes:
            data = get(shard, start, end)
            self.bytes += 0 if start < 0 else len(data)  # footers are left out
            return data

        monkeypatch.setattr(split, "read", counted)
        monkeypatch.setattr(split.reader, "_bytes", weighed)


def test_a_start_in_the_middle_reads_nothing_of_what_was_trained(
    many: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = {}
    for start in (0, 22):
        split = many.split("train")
        counted = Reads(split, monkeypatch)
        steps(split, start, 24, 8)  # an epoch
        reads[start] = counted
    assert len(reads[0].groups) == split.num_groups
    blocks_left = {int(g) for g in SampleOrder(split, 3).samples(22 * 8, 24 * 8).groups}
    assert set(reads[22].groups) == blocks_left
    assert 0.1 < reads[22].bytes / reads[0].bytes < 0.25, "a sixth of the row groups is left"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_row_group_is_read_once_in_an_epoch_by_however_many_threads(
    many: Dataset, ranks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = many.split("train")
    reads = Reads(split, monkeypatch)
    source = loader(split, threads=4)
    for _ in source.steps(0, 24, batch_size=8, micro_batch=None, rank=0, world_size=ranks):
        pass
    source.close()
    assert len(reads.groups) == len(set(reads.groups))
    if ranks == 1:
        assert sorted(reads.groups) == list(range(96))


def test_reading_is_ahead_by_a_block_and_no_further(many: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step never waits for the next block to be read: when a block begins, its row groups were asked for before."""
    split = many.split("train")
    reads = Reads(split, monkeypatch)
    source = loader(split)
    batches = source.steps(0, 24, batch_size=8, micro_batch=None, rank=0, world_size=1)
    for step in range(19):
        next(batches)
        wanted = {int(g) for g in source.order.samples(8 * step, 8 * step + 8 * 5).groups}
        deadline = time.monotonic() + 30
        while not wanted <= set(reads.groups):
            assert time.monotonic() < deadline, "the block after this one was not read"
            time.sleep(0.01)
        used = {int(g) for g in source.order.samples(0, 8 * step + 8).groups}
        assert len(set(reads.groups) - used) <= 2 * SHUFFLE_GROUPS
    batches.close()
    source.close()


def test_a_failing_read_reaches_the_step_that_needs_it(many: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    split = many.split("train")
    fine = {int(g) for g in SampleOrder(split, 3).samples(0, 40).groups}
    read = split.read

    def failing(group: int, *columns: Sequence[str]) -> pa.Table:
        if group not in fine:
            raise StorageError(f"no row group {group}")
        return read(group, *columns)

    monkeypatch.setattr(split, "read", failing)
    source = loader(split)
    batches = source.steps(0, 24, batch_size=8, micro_batch=None, rank=0, world_size=1)
    for _ in range(5):
        next(batches)
    with pytest.raises(StorageError, match="no row group"):
        list(batches)
    source.close()


def test_keys_are_those_of_the_images_of_a_step(many: Dataset, scenes: Path) -> None:
    split = many.split("train")
    source = loader(split)
    everything = [source.keys(step, 8) for step in range(24)]
    assert sorted(key for keys in everything for key in keys) == sorted(
        f"train/{copy}-{file.name}" for copy in range(8) for file in (scenes / "images/train").iterdir()
    )
    batch = source.order.step_samples(5, 8)
    expected = [split.read(int(g))["key"][int(r)].as_py() for g, r in zip(batch.groups, batch.rows, strict=True)]
    assert everything[5] == expected
    source.close()
