"""What is to do: the listing sorted into images, shards and others, without what is committed, on a local disk."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk import plan as plan_module
from pipelines.bulk.attempts import Committed
from pipelines.bulk.commits import Output
from pipelines.bulk.listing import pages
from pipelines.bulk.plan import LISTED_SCHEMA, Plan, make_plan, open_source
from pipelines.config import SegmentConfig
from pipelines.errors import StorageError, UsageError
from pipelines.storage import Entry, Folder
from tests.pipelines.bulk.output_rows import claimed, row, shard_rows

KEYS = ["a.jpg", "b/c.PNG", "b/d.Jpeg", "e.tif"]
OTHERS = ["readme.txt", "b/x.json", "jpg", "a.jpg.md5"]


@pytest.fixture
def source(tmp_path: Path) -> Folder:
    folder = Folder(str(tmp_path / "in"))
    for key in (*KEYS, *OTHERS):
        folder.write(key, key.encode())
    return folder


@pytest.fixture
def target(tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "out"))


Planned = Callable[..., Plan]


@pytest.fixture
def planned(source: Folder, target: Folder, request: pytest.FixtureRequest) -> Planned:
    """make_plan with settings; closed at the end of the test."""

    def make(committed: Committed | None = None, *, only: str | None = None, **settings: Any) -> Plan:
        config = SegmentConfig.model_validate(settings)
        made = make_plan(source, target, config, committed or Committed(), only=only)
        request.addfinalizer(made.close)
        return made

    return make


def keys(plan: Plan, rows: int = 3) -> list[str]:
    return sorted(key for block in plan.blocks(rows) for key in block["key"].to_pylist())


def counts(plan: Plan) -> tuple[int, int, int, int, int]:
    return plan.listed, plan.skipped, plan.done, plan.failed_before, plan.todo


def entry(folder: Folder, key: str) -> Entry:
    return next(e for page in pages(folder) for e in page if e.key == key)


def committed(source: Folder, target: Folder, **states: str) -> Committed:
    """Rows for these keys (dots as __) in the version that is there; ok, failed, or old for another version."""
    output = claimed(target.uri)
    for name, state in states.items():
        key = name.replace("__", ".")
        etag = "older" if state == "old" else entry(source, key).etag
        output.commit([row(key, ok=state != "failed", etag=etag) | {"uri": source.uri_of(key)}])
    return output.committed()


# ---------------------------------------------------------------- what is there


def test_images_are_found_by_their_ending_and_the_rest_is_skipped(planned: Planned) -> None:
    made = planned()
    assert made.kind == "images"
    assert counts(made) == (4, 4, 0, 0, 4)
    assert keys(made) == KEYS
    assert made.bytes == sum(map(len, KEYS))


def test_blocks_have_what_the_listing_says(planned: Planned, source: Folder) -> None:
    (block,) = planned().blocks(100)
    assert block.schema.equals(LISTED_SCHEMA)
    expected = {e.key: e for page in pages(source) for e in page}
    for found in block.to_pylist():
        assert Entry(**found) == expected[found["key"]]


def test_shards_are_taken_where_there_are_no_images(planned: Planned, source: Folder) -> None:
    for key in KEYS:
        source.delete(key)
    for key in ("x.parquet", "y.TAR.GZ", "z.tgz", "b/w.tar"):
        source.write(key, b"")
    made = planned()
    assert made.kind == "shards"
    assert keys(made) == ["b/w.tar", "x.parquet", "y.TAR.GZ", "z.tgz"]
    assert made.skipped == len(OTHERS)


def test_both_kinds_need_a_word(planned: Planned, source: Folder) -> None:
    source.write("x.parquet", b"")
    with pytest.raises(UsageError, match=r"both images and shards; set segment\.input=images or segment\.input=shards"):
        planned()
    images, shards = planned(input="images"), planned(input="shards")
    assert (images.kind, counts(images)) == ("images", (4, 5, 0, 0, 4))
    assert (shards.kind, counts(shards)) == ("shards", (1, 8, 0, 0, 1))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({}, r"holds no image and no shard \(4 other objects there; images end in \.jpg.*; shards end in \.parquet"),
        ({"input": "shards"}, r"holds no shard \(4 other objects there; shards end in"),
        ({"input": "images", "include": [".heic"]}, r"holds no image \(4 other objects there; images end in \.heic\)"),
    ],
)
def test_a_source_without_any_is_an_error(
    planned: Planned, source: Folder, settings: dict[str, Any], said: str
) -> None:
    for key in KEYS:
        source.delete(key)
    with pytest.raises(UsageError, match=said):
        planned(**settings)


def test_an_output_inside_the_input_is_left_out(source: Folder) -> None:
    for key in ("out/masks/a.jpg.png", "out/x", "output/y.png"):
        source.write(key, b"")
    with make_plan(source, source / "out", SegmentConfig(), Committed()) as made:
        assert keys(made) == sorted([*KEYS, "output/y.png"])
        assert made.skipped == len(OTHERS)


def test_a_file_whose_name_is_not_utf8_is_named(planned: Planned, source: Folder) -> None:
    Path(os.fsdecode(os.fsencode(source.path) + b"/caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(UsageError, match=r"caf\\udce9\.jpg.* is not UTF-8; rename the file"):
        planned()


# ---------------------------------------------------------------- what is done


def test_what_is_committed_in_this_version_is_left_out(planned: Planned, source: Folder, target: Folder) -> None:
    found = committed(source, target, a__jpg="ok", e__tif="failed")
    made = planned(found)
    assert counts(made) == (4, 4, 1, 1, 2)
    assert keys(made) == ["b/c.PNG", "b/d.Jpeg"]
    again = planned(found, retry_failed=True)
    assert counts(again) == (4, 4, 1, 0, 3)
    assert keys(again) == ["b/c.PNG", "b/d.Jpeg", "e.tif"]


def test_a_changed_image_is_taken_again(planned: Planned, source: Folder, target: Folder) -> None:
    assert keys(planned(committed(source, target, a__jpg="old"))) == KEYS


def test_a_shard_with_failed_images_is_retried_as_a_whole(tmp_path: Path) -> None:
    source, target = Folder(str(tmp_path / "s")), Folder(str(tmp_path / "t"))
    output = claimed(target.uri)
    for key, states in (("good.tar", "oo"), ("bad.tar", "of")):
        source.write(key, b"")
        uri = source.uri_of(key)
        output.commit([r | {"uri": uri} for r in shard_rows(key, states, etag=entry(source, key).etag)])
    for retry, todo in ((False, []), (True, ["bad.tar"])):
        with make_plan(source, target, SegmentConfig(retry_failed=retry), output.committed()) as made:
            assert keys(made) == todo
            assert made.done == 1


def test_a_finished_source_leaves_nothing_to_do(planned: Planned, source: Folder, target: Folder) -> None:
    output = claimed(target.uri)
    for page in pages(source):
        output.commit([row(e.key, etag=e.etag) | {"uri": source.uri_of(e.key)} for e in page])
    output.compact()
    made = planned(output.committed())
    assert counts(made) == (4, 4, 4, 0, 0)
    assert list(made.blocks(10)) == []
    assert made.bytes == 0


# ---------------------------------------------------------------- parts and limits


def test_a_limit_takes_so_many(planned: Planned) -> None:
    made = planned(limit=2)
    assert counts(made) == (4, 4, 0, 0, 2)
    assert len(keys(made)) == 2
    assert planned(limit=100).todo == 4


def test_the_parts_of_a_source_are_disjoint_and_whole(planned: Planned, source: Folder) -> None:
    for i in range(60):
        source.write(f"more/{i}.jpg", b"")
    parts = [planned(shard=f"{i}/3") for i in (1, 2, 3)]
    found = [keys(part) for part in parts]
    assert sorted(key for part in found for key in part) == keys(planned())
    assert all(len(part) > 8 for part in found)
    assert sum(part.listed for part in parts) == 64
    assert sum(part.skipped for part in parts) == len(OTHERS)
    assert len({part.listing for part in parts}) == 3
    assert found[0] == keys(planned(shard="1/3"))


def test_a_part_is_the_same_on_every_machine(source: Folder, target: Folder) -> None:
    script = (
        "import sys; from pipelines.bulk.plan import make_plan; from pipelines.config import SegmentConfig\n"
        "from pipelines.bulk.attempts import Committed; from pipelines.storage import Folder\n"
        "with make_plan(Folder(sys.argv[1]), Folder(sys.argv[2]), SegmentConfig(shard='1/2'), Committed()) as plan:\n"
        "    print(plan.listing, sorted(k for b in plan.blocks(9) for k in b['key'].to_pylist()))\n"
        "heavy = {'ray', 'torch', 'mlflow'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", script, source.uri, target.uri],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    }
    assert len(found) == 1


def test_a_part_without_images_of_a_source_that_has_some_is_no_error(planned: Planned) -> None:
    assert sum(planned(shard=f"{i}/50").listed for i in range(1, 51)) == 4


def test_a_part_beyond_the_last_is_refused(planned: Planned) -> None:
    with pytest.raises(UsageError, match=r"segment\.shard=4/3: there are 3 parts, 1/3 to 3/3"):
        planned(shard="4/3")


# ---------------------------------------------------------------- the digest and the chunks


def test_the_digest_is_that_of_what_is_listed_whatever_the_order(
    planned: Planned, source: Folder, target: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = planned().listing
    listed = [e for page in pages(source) for e in page]

    def shuffled(_: Folder) -> Any:
        random.Random(0).shuffle(listed)
        return iter([listed[:3], listed[3:]])

    with monkeypatch.context() as patch:
        patch.setattr(plan_module, "pages", shuffled)
        assert planned().listing == first
    assert planned(committed(source, target, a__jpg="ok"), limit=1).listing == first
    source.write("readme.txt", b"not an image")
    assert planned().listing == first
    source.write("a.jpg", b"changed")
    changed = planned().listing
    source.write("z.jpg", b"new")
    assert len({first, changed, planned().listing}) == 3


@pytest.mark.parametrize("rows", [1, 7, 100, 5000])
def test_blocks_have_the_rows_asked_for_and_come_again(
    source: Folder, target: Folder, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    listed = [Entry(f"{i:04}.jpg", i, f"e{i}") for i in range(2345)]
    monkeypatch.setattr(plan_module, "CHUNK_ROWS", 64)
    monkeypatch.setattr(plan_module, "pages", lambda _: (listed[i : i + 50] for i in range(0, 2345, 50)))
    with make_plan(source, target, SegmentConfig(), Committed()) as made:
        for _ in range(2):
            sizes = [block.num_rows for block in made.blocks(rows)]
            assert sizes[:-1] == [rows] * (2345 // rows) if 2345 % rows else sizes == [rows] * (2345 // rows)
            assert [k for block in made.blocks(rows) for k in block["key"].to_pylist()] == [e.key for e in listed]
        assert made.bytes == sum(range(2345))


def test_the_chunks_are_removed(planned: Planned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    made = planned()
    assert list(scratch.iterdir())
    made.close()
    assert not list(scratch.iterdir())
    with pytest.raises(UsageError):
        planned(shard="2/1")
    with pytest.raises(UsageError):
        planned(input="shards")
    assert not list(scratch.iterdir())


# ---------------------------------------------------------------- one object


@pytest.mark.parametrize("store", ["local", "s3"])
def test_a_source_may_be_one_object(store: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    base = str(tmp_path / "one") if store == "local" else f"s3://{request.getfixturevalue('s3')}/one"
    folder = Folder(base)
    for key in ("sub/a b.jpg", "sub/a b.jpg.txt", "sub/c.jpg/d.jpg"):
        folder.write(key, b"123")
    where, name = open_source(f"{base}/sub/a b.jpg")
    assert (where.uri, name) == (f"{base}/sub", "a b.jpg")
    with make_plan(where, Folder(f"{base}/out"), SegmentConfig(), Committed(), only=name) as made:
        ((found,),) = (block.to_pylist() for block in made.blocks(10))
        assert Entry(**found) == entry(where, "a b.jpg")
        assert counts(made) == (1, 0, 0, 0, 1)
    for uri in (base, f"{base}/sub", f"{base}/sub/", f"{base}/sub/c.jpg"):
        where, name = open_source(uri)
        assert (where.uri, name) == (uri.rstrip("/"), None)


def test_an_object_that_is_gone_says_so(planned: Planned) -> None:
    with pytest.raises(StorageError, match=r"in/gone\.jpg: there is nothing there"):
        planned(only="gone.jpg")


def test_where_nothing_is_the_listing_says_so(tmp_path: Path) -> None:
    where, name = open_source(str(tmp_path / "nothing"))
    assert name is None
    with pytest.raises(StorageError, match="nothing: there is nothing there"):
        make_plan(where, Folder(str(tmp_path / "out")), SegmentConfig(), Output(where).committed())
