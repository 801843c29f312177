"""A bulk output: names that never collide, rows that are never lost, one row for each image at the end."""

from __future__ import annotations

import io
import itertools
import json
import posixpath
import random
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.commits import (
    CLASSES,
    COMMITS,
    CONFIDENCE,
    KEY_BYTES,
    MASKS,
    REPORT,
    RESULTS,
    ROW_SCHEMA,
    RUN,
    Committed,
    Output,
    object_key,
)
from pipelines.errors import StorageError, UsageError
from pipelines.storage import Entry, Folder

START = datetime(2026, 11, 22, tzinfo=UTC)
SETTINGS = {"format": 1, "model": "m1", "bf16": True}
NAMES = {"name": "streets", "classes": [{"id": 0, "name": "sky", "color": [0, 0, 255]}]}


def row(key: str, *, etag: str = "v1", ok: bool = True, at: int = 0) -> dict[str, Any]:
    return {"key": key, "etag": etag, "status": "ok" if ok else "failed", "finished_at": START + timedelta(seconds=at)}


def state(output: Output) -> list[tuple[str, str, str]]:
    """(key, etag, status) of the results, in their order."""
    return [(r["key"], r["etag"], r["status"]) for r in output.results().to_pylist()]


def keys_in(folder: Folder, prefix: str) -> list[str]:
    return [entry.key for entry in folder.list(prefix)]


def parts(folder: Folder) -> list[str]:
    return keys_in(folder, f"{RESULTS}/part-")


class Watched(Folder):
    """A folder that tells, before it does anything, what it is going to do."""

    def __init__(self, uri: str, before: Callable[[str, str], None]) -> None:
        super().__init__(uri)
        self.before = before

    def read(self, key: str) -> bytes:
        self.before("read", key)
        return super().read(key)

    def write(self, key: str, data: bytes) -> None:
        self.before("write", key)
        super().write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self.before("create", key)
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self.before("delete", key)
        super().delete(key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self.before("list", prefix)
        return super().list(prefix)


class Killed(BaseException):
    """As a signal: nothing of the pipeline catches it."""


class AtStep:
    """Does something before the storage operation of this number, once."""

    def __init__(self, number: int, do: Callable[[], None]) -> None:
        self.number, self.do, self.steps = number, do, 0

    def __call__(self, operation: str, key: str) -> None:
        self.steps += 1
        if self.steps == self.number + 1:
            self.do()

    @property
    def is_done(self) -> bool:
        return self.steps > self.number


def die() -> None:
    raise Killed


@pytest.fixture
def output(tmp_path: Path) -> Output:
    found = Output(Folder(str(tmp_path / "out")))
    found.claim(SETTINGS, NAMES, overwrite=False)
    return found


# ---------------------------------------------------------------- names

NASTY = [
    "a.jpg",
    "a.png",
    "a.jpg.png",
    "A.jpg",
    "a/b.jpg",
    "a//b.jpg",
    "a/./b.jpg",
    "a/../b.jpg",
    "/a/b.jpg",
    "//a/b.jpg",
    "../b.jpg",
    "../../../b.jpg",
    "..",
    ".",
    "",
    "/",
    "a/",
    "a/..",
    "%2E%2E/b.jpg",
    "%2e%2e/b.jpg",
    "%252E%2E/b.jpg",
    "%2E/b.jpg",
    "%252E/b.jpg",
    "%00/b.jpg",
    "%2500/b.jpg",
    "a/%00",
    "_long/b.jpg",
    "a/_long/b.jpg",
    "%5Flong/b.jpg",
    "%255Flong/b.jpg",
    "_long",
    "_longer/b.jpg",
    "..a/b.jpg",
    "...",
    "a b+c%20d?e=f&g#h.jpg",
    "ünïcode/日本語/🙂.jpg",
    "u\u0308nicode.jpg",
    "ünicode.jpg",
    "a\\b.jpg",
    "a\nb.jpg",
    "x" * 2000,
    "x" * 1999 + "y",
    "d/" * 1000 + "x.jpg",
    "d/" * 999 + "d//x.jpg",
    "ü" * 130 + ".jpg",
    "ü" * 120 + ".jpg",
    "n" * 251,
    "n" * 252,
    "n" * 255,
]


def names_of(keys: list[str], *, local: bool, root: str = "bucket/prefix", prefix: str = MASKS) -> dict[str, str]:
    return {key: object_key(prefix, key, ".png", root=root, local=local) for key in keys}


@pytest.mark.parametrize("local", [False, True], ids=["store", "disk"])
def test_different_keys_never_share_a_name_nor_leave_the_prefix(local: bool) -> None:
    names = names_of(NASTY, local=local)
    assert len(set(names.values())) == len(set(NASTY)) == len(NASTY)
    for name in names.values():
        assert posixpath.normpath(f"/bucket/prefix/{name}") == f"/bucket/prefix/{name}"
        assert name.startswith("masks/")
        assert name.endswith(".png")
        assert len(f"bucket/prefix/{name}".encode()) <= KEY_BYTES
        assert not local or max(len(part.encode()) for part in name.split("/")) <= 255


def test_an_ordinary_key_keeps_its_path_and_its_extension() -> None:
    for key in ("a.jpg", "a/b/c d.jpeg", "ünïcode/日本語.webp", "100%/x.png", "a%20b.jpg"):
        assert object_key(MASKS, key, ".png", root="bucket", local=False) == f"masks/{key}.png"


def test_no_combination_of_reserved_and_escaped_components_collides() -> None:
    components = ["", ".", "..", "_long", "%00", "%2E", "%2E%2E", "%5Flong", "a", "a.png", "%", "%25"]
    components += [part.replace("%", "%25", 1) for part in ("%00", "%2E", "%2E%2E", "%5Flong")]
    components += ["%252500", "%25%2E", "%2E.", ".%2E", "%2e%2e"]
    keys = ["/".join(parts) for n in (1, 2, 3) for parts in itertools.product(components, repeat=n)]
    names = names_of(keys, local=True)
    assert len(set(names.values())) == len(set(keys)) > 5000
    assert not [n for n in names.values() if {"", ".", ".."} & set(n.split("/"))]


def test_a_random_search_finds_no_collision() -> None:
    rng = random.Random(0)
    pieces = ["%", "25", "2E", "00", "5F", ".", "..", "/", "//", "_long", "long", "a", ".png", "_"]
    keys = sorted({"".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(20000)})
    for local in (False, True):
        names = names_of(keys, local=local)
        assert len(set(names.values())) == len(keys)
        assert all(posixpath.normpath(f"/{name}") == f"/{name}" for name in names.values())


def test_a_key_cannot_pose_as_the_name_of_a_long_one() -> None:
    long = "x" * 2000
    name = object_key(MASKS, long, ".png", root="bucket", local=False)
    assert name.startswith("masks/_long/")
    posing = name.removeprefix("masks/").removesuffix(".png")
    assert object_key(MASKS, posing, ".png", root="bucket", local=False) != name


def test_masks_and_confidence_of_one_image_have_names_of_their_own() -> None:
    assert not set(names_of(NASTY, local=True).values()) & set(names_of(NASTY, local=True, prefix=CONFIDENCE).values())


def test_a_disk_takes_every_name(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out"))
    names = names_of(NASTY, local=True, root=folder.path)
    for key, name in names.items():
        folder.write(name, key.encode())
    assert {key: folder.read(name).decode() for key, name in names.items()} == {key: key for key in NASTY}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["masks"]


# ---------------------------------------------------------------- whose output it is


def test_the_same_model_with_the_same_settings_comes_back(output: Output) -> None:
    output.commit([row("a")])
    output.claim(dict(reversed(SETTINGS.items())), NAMES, overwrite=False)
    assert json.loads(output.folder.read(RUN)) == SETTINGS
    assert json.loads(output.folder.read(CLASSES)) == NAMES
    assert output.committed() == {"a": Committed("v1", ok=True)}


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        (SETTINGS | {"model": "m2"}, "model 'm1' instead of 'm2'"),
        (SETTINGS | {"bf16": False, "model": "m2"}, "bf16 True instead of False, model 'm1' instead of 'm2'"),
        (SETTINGS | {"window": 512}, "window None instead of 512"),
        ({"format": 1, "model": "m1"}, "bf16 True instead of None"),
    ],
)
def test_another_model_is_refused_with_what_differs(output: Output, settings: dict[str, Any], difference: str) -> None:
    output.commit([row("a")])
    with pytest.raises(UsageError) as caught:
        output.claim(settings, {"classes": []}, overwrite=False)
    said = str(caught.value)
    assert f"{output.folder.uri} was written with {difference}; use a new prefix, or --overwrite" in said
    assert json.loads(output.folder.read(RUN)) == SETTINGS
    assert json.loads(output.folder.read(CLASSES)) == NAMES


def test_of_two_models_that_claim_at_once_one_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "out")

    def quicker() -> None:
        Output(Folder(uri)).claim(SETTINGS, NAMES, overwrite=False)

    with pytest.raises(UsageError, match="model 'm1' instead of 'm2'"):
        Output(Watched(uri, AtStep(0, quicker))).claim(SETTINGS | {"model": "m2"}, NAMES, overwrite=False)
    assert json.loads(Folder(uri).read(RUN)) == SETTINGS


@pytest.mark.parametrize("name", ["masks/a.png", "results/part.parquet", CLASSES])
def test_a_prefix_that_holds_something_else_is_refused_and_left_alone(tmp_path: Path, name: str) -> None:
    folder = Folder(str(tmp_path / "out"))
    folder.write(name, b"somebody's")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match=r"holds \w+(\.json)? but no run\.json: .* use an empty prefix"):
            Output(folder).claim(SETTINGS, NAMES, overwrite=overwrite)
    assert {entry.key: folder.read(entry.key) for entry in folder.list()} == {name: b"somebody's"}


def test_other_files_beside_the_output_do_not_matter(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path / "out"))
    folder.write("masks-of-last-year/a.png", b"somebody's")
    folder.write("notes.txt", b"somebody's")
    Output(folder).claim(SETTINGS, NAMES, overwrite=False)
    assert json.loads(folder.read(RUN)) == SETTINGS


def test_looking_whose_output_it_is_writes_nothing(tmp_path: Path, output: Output) -> None:
    new = Output(Folder(str(tmp_path / "new")))
    assert new.check(SETTINGS, overwrite=False) == "free"
    assert not (tmp_path / "new").exists()
    before = list(output.folder.list())
    assert output.check(SETTINGS, overwrite=False) == "ours"
    assert output.check(SETTINGS | {"model": "m2"}, overwrite=True) == "replace"
    assert list(output.folder.list()) == before


def fill(output: Output) -> None:
    for key in ("masks/a.png", "confidence/a.png", REPORT, "notes.txt"):
        output.folder.write(key, b"old")
    output.commit([row("a")])
    output.compact()
    output.commit([row("b")])


def test_overwrite_replaces_the_output_of_another_model_and_nothing_else(output: Output) -> None:
    fill(output)
    output.claim(SETTINGS | {"model": "m2"}, {"classes": []}, overwrite=True)
    assert keys_in(output.folder, "") == [CLASSES, "notes.txt", RUN]
    assert json.loads(output.folder.read(RUN))["model"] == "m2"
    assert output.committed() == {}
    output.commit([row("a", etag="v2")])
    assert output.compact() == (1, 0)


def test_overwrite_keeps_the_output_of_the_same_model(output: Output) -> None:
    fill(output)
    before = keys_in(output.folder, "")
    output.claim(SETTINGS, NAMES, overwrite=True)
    assert keys_in(output.folder, "") == before


def test_an_overwrite_that_is_killed_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    other = SETTINGS | {"model": "m2"}
    for number in itertools.count():
        output = Output(Folder(str(tmp_path / str(number))))
        output.claim(SETTINGS, NAMES, overwrite=False)
        fill(output)
        try:
            Output(Watched(output.folder.uri, AtStep(number, die))).claim(other, NAMES, overwrite=True)
        except Killed:
            output.claim(other, NAMES, overwrite=True)
        else:
            break
        assert keys_in(output.folder, "") == [CLASSES, "notes.txt", RUN]
        assert json.loads(output.folder.read(RUN)) == other
    assert number > 10


# ---------------------------------------------------------------- rows


def test_commits_become_one_row_for_each_key_in_order_of_key(output: Output) -> None:
    output.commit([row("d"), row("b", ok=False)])
    output.commit([row("a"), row("c/1"), row("C")])
    assert output.has_commits()
    assert output.compact() == (5, 1)
    assert state(output) == [
        ("C", "v1", "ok"),
        ("a", "v1", "ok"),
        ("b", "v1", "failed"),
        ("c/1", "v1", "ok"),
        ("d", "v1", "ok"),
    ]
    assert not output.has_commits()
    assert output.results().schema.equals(ROW_SCHEMA)


def test_what_users_read_is_the_results(output: Output) -> None:
    for number in range(3):
        output.commit([row(f"{number}", at=number), row("again", etag=f"v{number}", at=number)])
        output.compact()
    (part,) = parts(output.folder)
    table = pq.read_table(io.BytesIO(output.folder.read(part)))
    assert table["key"].to_pylist() == ["0", "1", "2", "again"]
    assert table.equals(output.results())


@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([row("a", ok=False, at=1), row("a", ok=True, at=2)], ("v1", "ok")),
        ([row("a", ok=True, at=1), row("a", ok=False, at=2)], ("v1", "ok")),
        ([row("a", etag="v1", at=1), row("a", etag="v2", at=2)], ("v2", "ok")),
        ([row("a", etag="v2", at=1), row("a", etag="v1", at=2)], ("v1", "ok")),
        ([row("a", etag="v1", ok=True, at=1), row("a", etag="v2", ok=False, at=2)], ("v2", "failed")),
        (
            [
                row("a", etag="v1", ok=True, at=1),
                row("a", etag="v2", ok=False, at=3),
                row("a", etag="v2", ok=True, at=2),
                row("a", etag="v1", ok=False, at=0),
            ],
            ("v2", "ok"),
        ),
        # The image was changed and changed back: what was found for the first version is right again.
        (
            [
                row("a", etag="v1", ok=True, at=1),
                row("a", etag="v2", ok=True, at=2),
                row("a", etag="v1", ok=False, at=3),
            ],
            ("v1", "ok"),
        ),
    ],
)
def test_the_newest_version_wins_and_of_one_version_ok_before_failed(
    tmp_path: Path, rows: list[dict[str, Any]], kept: tuple[str, str]
) -> None:
    for number, order in enumerate(itertools.permutations(rows)):
        output = Output(Folder(str(tmp_path / str(number))))
        output.claim(SETTINGS, NAMES, overwrite=False)
        for each in order:
            output.folder.write(f"{COMMITS}/{order.index(each)}.parquet", as_parquet([each]))
        assert output.committed() == {"a": Committed(kept[0], ok=kept[1] == "ok")}
        output.compact()
        assert state(output) == [("a", *kept)]


def as_parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), out)
    return out.getvalue()


def test_a_failed_image_that_succeeds_later_counts_as_done(output: Output) -> None:
    output.commit([row("a", ok=False, at=1), row("b", at=1)])
    assert output.compact() == (2, 1)
    output.commit([row("a", ok=True, at=2)])
    assert output.committed() == {"a": Committed("v1", ok=True), "b": Committed("v1", ok=True)}
    assert output.compact() == (2, 0)


def test_a_batch_that_is_committed_twice_is_one_object(output: Output) -> None:
    output.commit([row("a", at=1), row("b", at=1)])
    output.commit([row("b", at=2), row("a", at=2)])
    assert len(keys_in(output.folder, COMMITS)) == 1


def test_a_second_attempt_with_another_outcome_does_not_replace_the_first(output: Output) -> None:
    output.commit([row("a", ok=False, at=1)])
    output.commit([row("a", ok=True, at=2)])
    assert len(keys_in(output.folder, COMMITS)) == 2


def test_a_second_compaction_changes_nothing(output: Output) -> None:
    output.commit([row("a"), row("b", ok=False)])
    assert output.compact() == (2, 1)
    before = list(output.folder.list())
    assert output.compact() == (2, 1)
    assert list(output.folder.list()) == before


def test_an_output_without_rows_is_empty(output: Output) -> None:
    assert output.compact() == (0, 0)
    assert output.committed() == {}
    assert output.results().num_rows == 0
    assert not output.has_commits()


def test_an_output_that_does_not_exist_yet_has_nothing_committed(tmp_path: Path) -> None:
    output = Output(Folder(str(tmp_path / "new")))
    assert output.committed() == {}
    assert not output.has_commits()
    assert not (tmp_path / "new").exists()


# ---------------------------------------------------------------- interrupted and raced


def prepared_for_compaction(uri: str) -> tuple[Output, list[tuple[str, str, str]]]:
    """An output with results, commits that add to them and replace some, and the rows that must come out."""
    output = Output(Folder(uri))
    output.claim(SETTINGS, NAMES, overwrite=False)
    output.commit([row(f"{i}", ok=i != 3) for i in range(6)])
    output.compact()
    output.commit([row("3", at=9), row("6")])
    output.commit([row("1", etag="v2", at=9)])
    output.commit([row("7", ok=False)])
    expected = [(f"{i}", "v2" if i == 1 else "v1", "failed" if i == 7 else "ok") for i in range(8)]
    return output, expected


def test_a_compaction_that_is_killed_anywhere_is_finished_by_the_next(tmp_path: Path) -> None:
    for number in itertools.count():
        output, expected = prepared_for_compaction(str(tmp_path / str(number)))
        try:
            Output(Watched(output.folder.uri, AtStep(number, die))).compact()
        except Killed:
            known = output.committed()
            assert sorted((k, c.etag, "ok" if c.ok else "failed") for k, c in known.items()) == expected
            assert output.compact() == (8, 1)
        else:
            break
        assert state(output) == expected
        assert len(parts(output.folder)) == 1, "users would read rows twice"
        assert not output.has_commits()
    assert number > 10


def test_a_storage_that_refuses_anywhere_loses_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise StorageError("no")

    for number in itertools.count():
        output, expected = prepared_for_compaction(str(tmp_path / str(number)))
        try:
            Output(Watched(output.folder.uri, AtStep(number, refuse))).compact()
        except StorageError:
            output.compact()
            assert state(output) == expected
            assert len(parts(output.folder)) == 1
        else:
            break
    assert number > 10


@pytest.mark.parametrize("others", [1, 2, 3])
def test_other_compactions_and_commits_in_the_middle_of_one_lose_nothing(tmp_path: Path, others: int) -> None:
    def meanwhile() -> None:
        for i in range(others):
            output.commit([row(f"x{i}"), row("7", at=20 + i)])
            output.compact()
        output.commit([row("last")])

    for number in itertools.count():
        output, expected = prepared_for_compaction(str(tmp_path / str(number)))
        interruption = AtStep(number, meanwhile)
        Output(Watched(output.folder.uri, interruption)).compact()
        if not interruption.is_done:
            break
        output.compact()
        more = [(f"x{i}", "v1", "ok") for i in range(others)]
        assert state(output) == sorted([*expected[:7], ("7", "v1", "ok"), *more, ("last", "v1", "ok")])
        assert len(parts(output.folder)) == 1
    assert number > 10


def test_a_slow_compaction_that_others_overtake_twice_loses_no_late_commit(tmp_path: Path) -> None:
    """The slow one reads the state, then twice another finishes, and a row arrives that only the slow one has seen."""
    output, expected = prepared_for_compaction(str(tmp_path / "out"))
    uri = output.folder.uri

    def after_its_manifest(operation: str, key: str) -> None:
        # The second of the others has listed the commits when the late row arrives and the slow one begins.
        if operation == "read" and "_manifests" in key and not done:
            done.append(key)
            output.commit([row("late")])
            Output(Watched(uri, before_it_creates)).compact()

    def before_it_creates(operation: str, key: str) -> None:
        if operation == "create" and len(done) == 1:
            done.append(key)
            for i in range(2):
                output.commit([row(f"x{i}")])
                output.compact()

    done: list[str] = []
    Output(Watched(uri, after_its_manifest)).compact()
    output.compact()
    assert len(done) == 2
    keys = [key for key, _, _ in state(output)]
    assert keys == sorted([*(key for key, _, _ in expected), "late", "x0", "x1"])


def test_an_ok_row_that_comes_during_the_compaction_of_a_failed_one_stays(tmp_path: Path) -> None:
    def meanwhile() -> None:
        output.commit([row("a", ok=True, at=2)])

    for number in itertools.count():
        output = Output(Folder(str(tmp_path / str(number))))
        output.claim(SETTINGS, NAMES, overwrite=False)
        output.commit([row("a", ok=False, at=1)])
        interruption = AtStep(number, meanwhile)
        Output(Watched(output.folder.uri, interruption)).compact()
        if not interruption.is_done:
            break
        output.compact()
        assert state(output) == [("a", "v1", "ok")]
    assert number > 5


def race(uri: str, rounds: int) -> None:
    output = Output(Folder(uri))
    output.claim(SETTINGS, NAMES, overwrite=False)

    def committing(worker: int) -> None:
        for i in range(rounds):
            output.commit([row(f"{worker}-{i}"), row("shared", ok=worker == 1 and i == 3, at=i)])

    def compacting() -> None:
        mine = Output(Folder(uri))
        for _ in range(rounds):
            mine.compact()
            assert mine.results().num_rows >= 0

    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(committing, 0), pool.submit(committing, 1), pool.submit(compacting)]
        waiting.append(pool.submit(compacting))
        for future in waiting:
            future.result()
    output.compact()
    expected = {f"{worker}-{i}" for worker in (0, 1) for i in range(rounds)} | {"shared"}
    found = state(output)
    assert sorted(key for key, _, _ in found) == sorted(expected)
    assert ("shared", "v1", "ok") in found
    assert len(parts(output.folder)) == 1


def test_compactions_that_race_with_commits_lose_nothing(tmp_path: Path) -> None:
    for number in range(5):
        race(str(tmp_path / str(number)), rounds=12)


def test_the_same_holds_on_object_storage(s3: str) -> None:
    output, expected = prepared_for_compaction(f"s3://{s3}/out")
    assert output.compact() == (8, 1)
    assert state(output) == expected
    assert keys_in(output.folder, COMMITS) == []
    assert len(parts(output.folder)) == 1
    with pytest.raises(UsageError, match="model 'm1' instead of 'm2'"):
        output.claim(SETTINGS | {"model": "m2"}, NAMES, overwrite=False)
    race(f"s3://{s3}/raced", rounds=5)
