"""Shards of an object store on local disk: downloaded once, as large as asked for, right whatever happens to it."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import multiprocessing
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import PrepareConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import RepsepError, StorageError
from pipelines.prepare import prepare
from pipelines.shard_cache import SHARDS, ShardCache
from pipelines.storage import Folder
from pipelines.train_loader import TrainLoader
from repsep_model.transforms import Augmentation

SIZE = 1000
ROOM = SHARDS * SIZE
"""Bytes for as many shards of SIZE as a cache must have room for at least."""


class Counting(Folder):
    """A local folder that notes what is read of it in a file: of each process a line for each piece."""

    def __init__(self, uri: str) -> None:
        super().__init__(uri)
        self.log = Path(f"{self.uri}.log")
        whole = self.fs
        outer = self

        class Watched:
            def cat_file(self, path: str, **limits: Any) -> bytes:
                with outer.log.open("a") as log:
                    log.write(f"{Path(path).name}\n")
                return bytes(whole.cat_file(path, **limits))

            def __getattr__(self, name: str) -> Any:
                return getattr(whole, name)

        self.fs = Watched()

    @property
    def reads(self) -> list[str]:
        return self.log.read_text().split() if self.log.exists() else []


@pytest.fixture
def source(tmp_path: Path) -> Counting:
    """50 shards of SIZE bytes, each of one value."""
    (tmp_path / "store").mkdir()
    for number in range(50):
        (tmp_path / "store" / str(number)).write_bytes(bytes([number]) * SIZE)
    return Counting(str(tmp_path / "store"))


def digest(number: int) -> str:
    return hashlib.sha256(bytes([number]) * SIZE).hexdigest()


def read(cache: ShardCache, source: Folder, number: int) -> bytes | None:
    return cache.read(source, str(number), digest(number), 10, 20)


def held(folder: Path) -> set[int]:
    names = {digest(number): number for number in range(50)}
    return {names[path.name] for path in folder.iterdir() if path.name in names}


def test_a_shard_is_downloaded_once_and_read_in_pieces(source: Counting, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM)
    assert cache.read(source, "7", digest(7), 10, 20) == bytes([7]) * 10
    assert cache.read(source, "7", digest(7), -30, None) == bytes([7]) * 30
    assert cache.read(source, "7", digest(7), -5 * SIZE, None) == bytes([7]) * SIZE
    assert ShardCache(tmp_path / "cache", ROOM).read(source, "7", digest(7), 0, 5) == bytes([7]) * 5
    assert source.reads == ["7"]


def read_all(source: str, folder: Path, start: Any) -> None:
    start.wait(timeout=60)
    cache = ShardCache(folder, ROOM)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda number: read(cache, Counting(source), number % 12), range(36)))
    assert found == [bytes([number % 12]) * 10 for number in range(36)]


def test_processes_and_threads_that_ask_at_once_download_once(source: Counting, tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start = context.Barrier(3)
    processes = [context.Process(target=read_all, args=(source.uri, tmp_path / "cache", start)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert sorted(source.reads) == sorted(str(number) for number in range(12))


def test_what_was_used_least_recently_makes_room(source: Counting, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM)
    for number in range(SHARDS):
        read(cache, source, number)
    read(cache, source, 0)
    read(ShardCache(tmp_path / "cache", ROOM), source, 1)  # another process
    for number in range(SHARDS, SHARDS + 3):
        read(cache, source, number)
        size = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
        assert size <= ROOM
    assert held(tmp_path / "cache") == {0, 1, *range(5, SHARDS + 3)}


def test_a_shard_that_is_removed_while_it_is_read_is_read_whole(source: Counting, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM)
    read(cache, source, 0)
    shard = cache._held(digest(0))
    assert shard is not None
    for number in range(1, SHARDS + 5):
        read(cache, source, number)
    assert 0 not in held(tmp_path / "cache")
    with shard:
        assert shard.read() == bytes(SIZE)
    assert read(cache, source, 0) == bytes(10)


@pytest.mark.parametrize("damage", ["truncated", "changed", "empty"])
@pytest.mark.parametrize("noticed_by", ["this process", "another"])
def test_a_damaged_file_is_downloaded_again(
    source: Counting, tmp_path: Path, damage: str, noticed_by: str, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM)
    read(cache, source, 3)
    file = tmp_path / "cache" / digest(3)
    content = {"truncated": file.read_bytes()[:500], "changed": file.read_bytes()[:-1] + b"x", "empty": b""}[damage]
    file.write_bytes(content)
    os.utime(file, ns=(0, 0))
    reader = cache if noticed_by == "this process" else ShardCache(tmp_path / "cache", ROOM)
    assert read(reader, source, 3) == bytes([3]) * 10
    assert source.reads == ["3", "3"]
    assert file.read_bytes() == bytes([3]) * SIZE
    assert "damaged" in caplog.text


def test_what_a_killed_download_left_is_removed_and_one_under_way_is_not(source: Counting, tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    folder.mkdir()
    for name in ("part-dead", "part-alive"):
        (folder / name).write_bytes(bytes(SIZE))
    with (folder / "part-alive").open("rb") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        read(ShardCache(folder, ROOM), source, 0)
        assert {path.name for path in folder.glob("part-*")} == {"part-alive"}
        assert held(folder) == {0}


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_warned_of_once_and_leaves_nothing(
    source: Counting, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM)
    read(cache, source, 0)
    opened = Path.open

    def full(path: Path, mode: str = "r", *arguments: Any, **more: Any) -> Any:
        if mode == "xb":
            raise OSError(code, os.strerror(code), str(path))
        return opened(path, mode, *arguments, **more)

    monkeypatch.setattr(Path, "open", full)
    assert read(cache, source, 1) is None
    assert read(cache, source, 2) is None
    assert read(cache, source, 0) == bytes(10), "what is there is of use all the same"
    assert len(caplog.records) == 1
    assert os.strerror(code) in caplog.text
    assert not list((tmp_path / "cache").glob("part-*"))
    assert source.reads == ["0"]


def test_a_disk_that_fills_while_a_shard_is_written_leaves_no_part(
    source: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM)

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "replace", full)
    assert read(cache, source, 1) is None
    assert not list((tmp_path / "cache").glob("part-*"))
    assert len(caplog.records) == 1


def test_a_cache_for_fewer_shards_than_are_mixed_takes_none(
    source: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM - 1)
    assert [read(cache, source, number) for number in (0, 0, 1)] == [None] * 3
    assert source.reads == []
    assert len(caplog.records) == 1


def test_another_shard_than_was_prepared_is_refused_by_name(source: Counting, tmp_path: Path) -> None:
    cache = ShardCache(tmp_path / "cache", ROOM)
    with pytest.raises(RepsepError, match=r"/store/3 is not the shard that dataset\.json describes"):
        cache.read(source, "3", digest(4), 0, 10)
    assert source.reads == ["3", "3"], "once more, in case that it was the network"
    assert held(tmp_path / "cache") == set()


def test_a_store_that_fails_is_no_matter_of_the_cache(source: Counting, tmp_path: Path) -> None:
    def refuse(*_: Any, **__: Any) -> bytes:
        raise PermissionError("no")

    source.fs.cat_file = refuse
    cache = ShardCache(tmp_path / "cache", ROOM)
    with pytest.raises(StorageError, match="access was refused"):
        read(cache, source, 0)
    assert not cache._closed


def test_a_folder_of_somebody_else_is_not_used(
    source: Counting, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert read(ShardCache(tmp_path / "cache", ROOM), source, 0) is None
    assert "belongs to somebody else" in caplog.text


def test_nothing_is_held_by_a_cache_of_no_size() -> None:
    assert ShardCache.of(0) is None
    cache = ShardCache.of(0.5)
    assert cache is not None
    assert cache.capacity == 2**29


# ---------------------------------------------------------------- with a store


@pytest.fixture
def stored(scenes: Path, s3: str) -> Dataset:
    """24 training images in 3 shards of 5 row groups on S3."""
    config = PrepareConfig(source=str(scenes), shard_rows=8, row_group_rows=2)
    return open_dataset(prepare(f"s3://{s3}/work", config).results["dataset"])


def batches(dataset: Dataset, cache: ShardCache | None) -> list[torch.Tensor]:
    how = Augmentation(crop=32)
    split = dataset.split("train", cache)
    loader = TrainLoader(split, augmentation=how, fill=(1, 2, 3), seed=0, threads=2)
    found = loader.steps(0, 6, batch_size=4, micro_batch=None, rank=0, world_size=1)
    try:
        return [part for step in found for pair in step for part in pair]
    finally:
        loader.close()


@pytest.mark.filterwarnings("default::ResourceWarning")
def test_batches_are_the_same_from_the_store_a_cache_and_a_full_disk(
    stored: Dataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plain = batches(stored, None)
    (tmp_path / "no-folder").write_bytes(b"")
    for cache in (ShardCache(tmp_path / "cache", 2**30), ShardCache(tmp_path / "no-folder", 2**30)):
        assert all(map(torch.equal, batches(stored, cache), plain))
    shards = stored.manifest["splits"]["train"]["shards"]
    assert {p.name for p in (tmp_path / "cache").iterdir()} >= {s["sha256"] for s in shards}
    assert [record.levelname for record in caplog.records if record.name.startswith("pipelines")] == ["WARNING"]


def test_a_local_dataset_needs_no_cache(scenes: Path, tmp_path: Path) -> None:
    dataset = open_dataset(prepare(str(tmp_path / "work"), PrepareConfig(source=str(scenes))).results["dataset"])
    batches(dataset, ShardCache(tmp_path / "cache", 2**30))
    assert not (tmp_path / "cache").exists()
