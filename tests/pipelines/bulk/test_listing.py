"""Listings in pages: the same entries as `Folder.list`, several prefixes at a time, and no more held than wanted."""

from __future__ import annotations

import os
import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk import listing
from pipelines.bulk.listing import entry_of, pages
from pipelines.errors import StorageError
from pipelines.storage import TEMPORARY, Entry, Folder
from tests.pipelines.bulk.synthetic_store import SyntheticStore

STRANGE = [
    "a b+c",
    "%2F",
    "ünï/日本語",
    "a//b",
    "./c",
    "../d",
    "e/",
    "&<>",
    "'\"",
    "a/b",
    "a-b",
    "a.b",
    "a",
    "b/a/",
    "b/a/c",
]


def entries(folder: Folder, **options: Any) -> list[Entry]:
    return sorted((entry for page in pages(folder, **options) for entry in page), key=lambda entry: entry.key)


def listing_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("list-")]


@pytest.fixture
def store() -> Iterator[Callable[..., SyntheticStore]]:
    """A store in this process that answers listings of the keys it is given, and counts requests."""
    opened: list[SyntheticStore] = []

    def make(keys: list[str], **options: Any) -> SyntheticStore:
        opened.append(SyntheticStore(keys, **options))
        return opened[-1]

    yield make
    for each in opened:
        each.close()


# ---------------------------------------------------------------- S3

TREES: dict[str, list[str]] = {
    "empty": [],
    "flat": [f"{i:05}.jpg" for i in range(3500)],
    "by date": [
        f"{y}/{m:02}/{d:02}/{i}.jpg" for y in (2024, 2025) for m in range(1, 13) for d in (1, 15) for i in range(60)
    ],
    "many small folders": [f"{i:05}/{j}.jpg" for i in range(2500) for j in "ab"],
    "one folder holds nearly all": [f"{i:03}/x.jpg" for i in range(50)] + [f"027/all/{i:05}.jpg" for i in range(3000)],
    "files between folders": [f"{i:04}{end}" for i in range(1500) for end in ("/a.jpg", ".jpg", "-b/c.jpg", "0")],
    "deep": ["/".join("abcdefghij"[:n]) + f"/{i}" for n in range(1, 11) for i in range(120)],
    "strange": STRANGE,
}


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("tree", TREES)
def test_every_object_is_listed_once(
    tree: str, threads: int, store: Callable[..., SyntheticStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = TREES[tree]
    with store([f"in/{key}" for key in keys] + ["in-2/x", "in", "im/y"]) as here:
        here.use(monkeypatch)
        found = entries(Folder("s3://synthetic/in"), threads=threads)
        requests = here.requests
    assert Counter(e.key for e in found) == Counter(key for key in keys if key and not key.endswith("/"))
    assert requests <= 3 * (len(keys) // 1000) + 8 * threads + 40, "far more requests than pages"


@pytest.mark.parametrize("seed", range(6))
def test_random_trees_are_listed_as_folder_list_does(
    seed: int, store: Callable[..., SyntheticStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(seed)
    keys = sorted({"/".join(rng.choices("abcd-.é", k=rng.randint(1, 6))) for _ in range(1500)})
    with store([f"in/{key}" for key in keys], page=rng.choice([7, 100])) as here:
        here.use(monkeypatch)
        folder = Folder("s3://synthetic/in")
        assert entries(folder, threads=rng.choice([1, 2, 5])) == list(folder.list())


def test_sub_folders_are_listed_side_by_side(
    store: Callable[..., SyntheticStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store answers a sub-folder only when four requests wait."""
    with store([f"in/{i}/{j:04}.jpg" for i in range(4) for j in range(900)]) as here:
        here.use(monkeypatch)
        here.hold_back(4, lambda query: query["prefix"] != "in/")
        assert len(entries(Folder("s3://synthetic/in"))) == 3600


def test_no_more_is_fetched_than_the_queue_holds(
    store: Callable[..., SyntheticStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"in/{i:03}/{j:03}.jpg" for i in range(200) for j in range(200)]
    with store(keys, page=100) as here:
        here.use(monkeypatch)
        found = pages(Folder("s3://synthetic/in"), threads=2)
        count = len(next(found))
        here.wait_until_idle()
        assert here.requests <= 12, "the pages pile up while nobody takes them"
        count += sum(map(len, found))
        assert count == len(keys)


def test_whoever_stops_early_leaves_no_thread_behind(
    store: Callable[..., SyntheticStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    with store([f"in/{i % 50}/{i:05}.jpg" for i in range(20_000)]) as here:
        here.use(monkeypatch)
        found = pages(Folder("s3://synthetic/in"))
        next(found)
        assert listing_threads()
        found.close()  # type: ignore[attr-defined]
        assert not listing_threads()


def test_an_error_of_a_listing_thread_reaches_the_consumer(
    store: Callable[..., SyntheticStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    with store([f"in/{i:02}/{j:03}.jpg" for i in range(40) for j in range(300)]) as here:
        here.use(monkeypatch)
        here.refuse(lambda query: query.get("start-after", query["prefix"]) > "in/20")
        with pytest.raises(StorageError, match=r"s3://synthetic/in: access was refused"):
            entries(Folder("s3://synthetic/in"))
    assert not listing_threads()


@pytest.mark.parametrize("bucket", ["s3", pytest.param("ceph_bucket", marks=pytest.mark.ceph)])
def test_a_real_store_gives_the_same_as_folder_list(bucket: str, request: pytest.FixtureRequest) -> None:
    folder = Folder(f"s3://{request.getfixturevalue(bucket)}/in")
    names = [name for name in STRANGE if not name.endswith("/")]
    names += [f"{i:02}/{j:02}.jpg" for i in range(40) for j in range(30)]
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda name: folder.write(name, name.encode()), names))
    found = entries(folder)
    assert found == sorted(folder.list(), key=lambda entry: entry.key)
    assert len(found) == len(names)
    assert entries(folder, threads=2) == found
    assert entry_of(folder, "a") == next(e for e in found if e.key == "a")
    assert entry_of(folder, "0") is None  # 00/00.jpg begins with it
    with pytest.raises(StorageError, match="there is no bucket 'no-such-bucket'"):
        entries(Folder("s3://no-such-bucket/in"))


# ---------------------------------------------------------------- a local disk


def test_a_local_listing_is_that_of_folder_list(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))
    for name in ("b/x", "a", "c/d/e f", "c/d/g", ".hidden", ".folder/x"):
        folder.write(name, name.encode())
    (tmp_path / "empty").mkdir()
    (tmp_path / f"{TEMPORARY}-1").write_bytes(b"half")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(tmp_path / "c")
    (tmp_path / "file").symlink_to(tmp_path / "a")
    assert entries(folder) == list(folder.list())
    assert [entry.key for entry in entries(folder)].count("link/d/g") == 1
    assert entry_of(folder, "b/x") in entries(folder)
    assert entry_of(folder, "b") is None


def test_a_link_that_leads_nowhere_is_named(tmp_path: Path) -> None:
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    with pytest.raises(StorageError, match="dangling: this link leads nowhere; mend it or remove it"):
        entries(Folder(str(tmp_path)))


def test_a_missing_folder_is_an_error_and_a_vanished_file_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(StorageError, match="missing: there is nothing there"):
        entries(Folder(str(tmp_path / "missing")))
    folder = Folder(str(tmp_path))
    for name in ("a", "b/c", "d"):
        folder.write(name, b"")
    scandir = os.scandir

    def removing(path: str) -> Any:
        found = scandir(path)
        (tmp_path / "b/c").unlink(missing_ok=True)
        return found

    monkeypatch.setattr(os, "scandir", removing)
    assert [entry.key for entry in entries(folder)] == ["a", "d"]


def test_a_folder_that_may_not_be_read_is_not_taken_for_an_empty_one(partly_closed: Path) -> None:
    with pytest.raises(StorageError, match="check the permissions"):
        entries(Folder(str(partly_closed)))


def test_a_local_page_comes_before_the_next_is_looked_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "PAGE", 10)
    folder = Folder(str(tmp_path))
    for i in range(35):
        (tmp_path / f"{i}").write_bytes(b"")
    found = pages(folder)
    assert len(next(found)) == 10
    for path in tmp_path.iterdir():
        path.unlink()
    assert sum(map(len, found)) == 0


def test_other_filesystems_are_listed_in_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "PAGE", 4)
    folder = Folder("memory://listing")
    for i in range(10):
        folder.write(f"{i}/x", b"")
    try:
        assert [len(page) for page in pages(folder)] == [4, 4, 2]
        assert entries(folder) == list(folder.list())
    finally:
        folder.fs.rm(folder.path, recursive=True)
