"""Compaction: one attempt for each object, few files touched, and nothing lost whatever interrupts it."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk import attempts, compaction
from pipelines.bulk.attempts import OK_STATE
from pipelines.bulk.commits import COMMITS, RESULTS, Output
from pipelines.errors import StorageError
from pipelines.storage import Folder
from tests.pipelines.bulk.output_rows import AtStep, KilledError, Watched, claimed, die, row, shard_rows, state, uri_of


@pytest.fixture(autouse=True)
def no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is processes that die here, not machines."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return claimed(str(tmp_path / "out"))


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """10 rows in a part."""
    monkeypatch.setattr(compaction, "PART_ROWS", 10)
    monkeypatch.setattr(compaction, "GROUP_ROWS", 4)


def parts(output: Output) -> set[str]:
    return {entry.key for entry in output.folder.list(f"{RESULTS}/part-")}


def commits(output: Output) -> list[str]:
    return [entry.key for entry in output.folder.list(f"{COMMITS}/")]


def numbered(numbers: range, **more: Any) -> list[dict[str, Any]]:
    return [row(f"{i:03}", **more) for i in numbers]


# ---------------------------------------------------------------- what counts


def test_commits_become_one_row_for_each_image(output: Output) -> None:
    output.commit([row("d"), row("b", ok=False)])
    output.commit([row("a"), row("c/1"), row("C")])
    totals = output.compact()
    assert (totals.rows, totals.ok, totals.failed) == (5, 4, 1)
    expected = [("C", "ok"), ("a", "ok"), ("b", "failed"), ("c/1", "ok"), ("d", "ok")]
    assert [(key, status) for key, _, status in state(output)] == expected
    assert len(parts(output)) == 1
    assert not output.has_commits()


@pytest.mark.parametrize("results_first", [0, 1, 2])
@pytest.mark.parametrize(
    ("rows", "kept"),
    [
        ([row("a", ok=False, at=1), row("a", ok=True, at=2)], ("v1", "ok")),
        ([row("a", ok=True, at=1), row("a", ok=False, at=2)], ("v1", "ok")),
        ([row("a", etag="v1", at=1), row("a", etag="v2", at=2)], ("v2", "ok")),
        ([row("a", etag="v2", at=1), row("a", etag="v1", at=2)], ("v1", "ok")),
        ([row("a", etag="v1", ok=True, at=1), row("a", etag="v2", ok=False, at=2)], ("v2", "failed")),
        (
            [row("a", etag="v1", ok=True, at=1), row("a", etag="v2", ok=False, at=3), row("a", etag="v2", at=2)],
            ("v2", "ok"),
        ),
    ],
)
def test_the_newest_version_wins_and_of_one_version_ok_before_failed(
    tmp_path: Path, rows: list[dict[str, Any]], kept: tuple[str, str], results_first: int
) -> None:
    """Whatever the order of the commits, and whichever of them are in the results already."""
    for number, order in enumerate(itertools.permutations(rows)):
        output = claimed(str(tmp_path / str(number)))
        for position, each in enumerate(order):
            if position == results_first:
                output.compact()
            output.commit([each, row(f"other-{position}")])
        output.compact()
        assert state(output)[0] == ("a", *kept)
        assert len(state(output)) == 1 + len(rows)


def test_a_shard_is_replaced_as_a_whole(output: Output) -> None:
    output.commit(shard_rows("a.tar", "ofo", at=1) + shard_rows("b.tar", "oo", at=1))
    output.compact()
    output.commit(shard_rows("a.tar", "oo", at=2))
    output.commit(shard_rows("b.tar", "off", at=2))
    totals = output.compact()
    assert (totals.rows, totals.failed) == (5, 2)
    assert [key for key, _, _ in state(output)] == ["a.tar#0", "a.tar#1", "b.tar#0", "b.tar#1", "b.tar#2"]


def test_an_attempt_at_a_shard_that_put_no_masks_replaces_none_that_did(output: Output) -> None:
    output.commit(shard_rows("a.tar", "of", at=1))
    output.commit([row("a.tar", ok=False, at=2)])
    output.compact()
    output.commit(shard_rows("a.tar", "ff", at=3))
    assert output.compact().rows == 2
    assert state(output) == [("a.tar#0", "v1", "ok"), ("a.tar#1", "v1", "failed")]


def test_a_shard_that_could_not_be_read_at_all_gives_way_to_its_images(output: Output) -> None:
    output.commit([row("a.tar", ok=False)])
    output.compact()
    output.commit(shard_rows("a.tar", "oo", at=1))
    output.compact()
    assert [key for key, _, _ in state(output)] == ["a.tar#0", "a.tar#1"]


@pytest.mark.parametrize("portion", [2, 131_072])
def test_uris_whose_hashes_collide_keep_their_rows(
    output: Output, monkeypatch: pytest.MonkeyPatch, small_parts: None, portion: int
) -> None:
    monkeypatch.setattr(attempts, "hash", lambda text: len(text) % 2, raising=False)
    monkeypatch.setattr(compaction, "PORTION", portion)
    output.commit(numbered(range(15)))
    output.compact()
    output.commit(numbered(range(10, 30), at=1, etag="v2"))
    output.commit([row("x"), row("yy"), row("020", at=2, etag="v3")])
    assert output.compact().rows == 32
    expected = [(f"{i:03}", "v1" if i < 10 else "v2" if i != 20 else "v3", "ok") for i in range(30)]
    assert state(output) == [*expected, ("x", "v1", "ok"), ("yy", "v1", "ok")]


@pytest.mark.parametrize("seed", range(8))
def test_many_random_runs_end_as_one_compaction_of_all_their_rows_would(
    tmp_path: Path, small_parts: None, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(compaction, "PORTION", 8)
    rng = random.Random(seed)
    often, once = claimed(str(tmp_path / "often")), claimed(str(tmp_path / "once"))
    names: list[str] = []
    for at in range(60):
        # Versions only grow, as in a bucket whose images are replaced.
        keys = rng.sample(range(40), rng.randint(1, 9))
        rows = [row(f"{key:02}", etag=f"v{at // 20}", ok=rng.random() < 0.7, at=at) for key in keys]
        rows += shard_rows(f"{rng.randrange(4)}.tar", rng.choice(["ooo", "of", "o", "ff"]), etag=f"v{at // 20}", at=at)
        names.append(often.commit(rows))
        once.commit(rows)
        if rng.random() < 0.2:
            often.merge_commits(names)
            names.clear()
        if rng.random() < 0.15:
            often.compact()
    assert often.compact().rows == once.compact().rows
    assert often.results().equals(once.results())
    assert often.totals().pixels == once.totals().pixels
    assert often.totals().class_images == once.totals().class_images
    assert often.totals().ok == once.totals().ok
    assert often.results().num_rows == often.totals().rows


# ---------------------------------------------------------------- what it touches


def test_a_second_compaction_changes_nothing(output: Output) -> None:
    output.commit([row("a"), row("b", ok=False)])
    first = output.compact()
    before = list(output.folder.list())
    assert output.compact() == first
    assert list(output.folder.list()) == before


def test_only_parts_that_lost_a_row_or_are_small_are_written_again(output: Output, small_parts: None) -> None:
    for start in (0, 10, 20):
        output.commit(numbered(range(start, start + 10)))
    output.compact()
    full = parts(output)
    assert len(full) == 3

    output.commit(numbered(range(30, 33)))
    output.compact()
    assert full < parts(output)
    (small,) = parts(output) - full

    output.commit(numbered(range(33, 36)))
    output.compact()
    (filled,) = parts(output) - full
    assert filled != small

    output.commit([row("015", etag="v2", at=1)])
    output.compact()
    assert len(full & parts(output)) == 2
    assert [key for key, _, _ in state(output)] == [f"{i:03}" for i in range(36)]
    assert ("015", "v2", "ok") in state(output)


def test_a_commit_that_changes_nothing_leaves_full_parts_alone(output: Output, small_parts: None) -> None:
    output.commit(numbered(range(10), at=1))
    output.compact()
    before = parts(output)
    output.commit(numbered(range(10), at=0, ok=False))
    output.commit(numbered(range(10), at=1))  # a copy, as a merge beside a compaction may leave
    assert output.compact().failed == 0
    assert parts(output) == before
    assert not output.has_commits()


def test_no_part_is_larger_than_the_limit_unless_one_file_is(output: Output, small_parts: None) -> None:
    for start in range(0, 60, 3):
        output.commit(numbered(range(start, start + 3)))
    output.commit(shard_rows("large.tar", "o" * 24))
    output.compact()
    sizes = sorted(table.num_rows for table in output.tables())
    assert sizes[-1] == 24
    assert sizes[-2] <= 10
    assert sum(size < 5 for size in sizes) <= 2  # the last one, and the one before the large file
    assert sum(sizes) == 84


def test_parts_that_shrink_are_joined(output: Output, small_parts: None) -> None:
    for start in range(0, 40, 10):
        output.commit(numbered(range(start, start + 10)))
    output.compact()
    changed = [i for i in range(40) if i % 10 >= 2]
    output.commit(shard_rows("x.tar", "o" * 10))
    output.commit([row(f"{i:03}", etag="v2", at=1) for i in changed])
    output.compact()
    assert output.totals().rows == 50
    assert len(parts(output)) <= 7


# ---------------------------------------------------------------- interrupted and raced

Expected = list[tuple[str, str, str]]


def prepared(uri: str) -> tuple[Output, Expected]:
    """An output with results, commits that add to them and replace some, and the rows that must come out."""
    output = claimed(uri)
    output.commit([row(f"{i}", ok=i != 3) for i in range(6)])
    output.compact()
    output.commit([row("3", at=9), row("6")])
    output.commit([row("1", etag="v2", at=9)])
    output.commit([row("7", ok=False)])
    return output, [(f"{i}", "v2" if i == 1 else "v1", "failed" if i == 7 else "ok") for i in range(8)]


def assert_known(output: Output, expected: Expected) -> None:
    committed = output.committed()
    states = committed.states([uri_of(key) for key, _, _ in expected], [etag for _, etag, _ in expected])
    assert [s == OK_STATE for s in states] == [status == "ok" for _, _, status in expected]
    assert states.all()
    assert len(committed) == len(expected)


@pytest.mark.parametrize("part_rows", [4, 65_536])
def test_a_compaction_that_is_killed_anywhere_is_finished_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part_rows: int
) -> None:
    monkeypatch.setattr(compaction, "PART_ROWS", part_rows)
    for number in itertools.count():
        output, expected = prepared(str(tmp_path / str(number)))
        try:
            Output(Watched(output.folder.uri, AtStep(number, die))).compact()
        except KilledError:
            assert_known(output, expected)
            assert output.compact().rows == 8
        else:
            break
        assert state(output) == expected
        assert {part.key for part in compaction.newest_manifest(output.folder).parts} == parts(output)
        assert not output.has_commits()
    assert number > 12


def test_a_storage_that_refuses_anywhere_loses_nothing(tmp_path: Path) -> None:
    def refuse() -> None:
        raise StorageError("no")

    for number in itertools.count():
        output, expected = prepared(str(tmp_path / str(number)))
        try:
            Output(Watched(output.folder.uri, AtStep(number, refuse))).compact()
        except StorageError:
            assert_known(output, expected)
            output.compact()
            assert state(output) == expected
            assert len(parts(output)) == 1
        else:
            break
    assert number > 12


def test_a_manifest_that_was_written_though_the_store_said_no_keeps_its_parts(tmp_path: Path) -> None:
    output, expected = prepared(str(tmp_path / "out"))

    class Silent(Folder):
        def create(self, key: str, data: bytes) -> bool:
            super().create(key, data)
            raise StorageError("no answer")

    with pytest.raises(StorageError, match="no answer"):
        Output(Silent(output.folder.uri)).compact()
    assert_known(output, expected)
    output.compact()
    assert state(output) == expected


def in_the_middle(tmp_path: Path, do: Callable[[Output], None], check: Callable[[Output, Expected], None]) -> int:
    """Let another job do something before each step of a compaction; in how many places."""
    for number in itertools.count():
        output, expected = prepared(str(tmp_path / str(number)))
        interruption = AtStep(number, lambda output=output: do(output))  # type: ignore[misc]
        Output(Watched(output.folder.uri, interruption)).compact()
        if not interruption.is_done:
            return number
        output.compact()
        check(output, expected)
        assert {part.key for part in compaction.newest_manifest(output.folder).parts} == parts(output)
    raise AssertionError


@pytest.mark.parametrize("others", [1, 3])
def test_other_compactions_and_commits_in_the_middle_of_one_lose_nothing(tmp_path: Path, others: int) -> None:
    def meanwhile(output: Output) -> None:
        for i in range(others):
            output.commit([row(f"x{i}"), row("7", at=20 + i)])
            output.compact()
        output.commit([row("last")])

    def check(output: Output, expected: Expected) -> None:
        more = [(f"x{i}", "v1", "ok") for i in range(others)]
        assert state(output) == sorted([*expected[:7], ("7", "v1", "ok"), *more, ("last", "v1", "ok")])

    assert in_the_middle(tmp_path, meanwhile, check) > 12


def test_a_merge_in_the_middle_of_a_compaction_loses_nothing(tmp_path: Path) -> None:
    def meanwhile(output: Output) -> None:
        names = [key.removeprefix(f"{COMMITS}/").removesuffix(".parquet") for key in commits(output)]
        output.merge_commits([*names, output.commit([row("8", ok=False)]), output.commit([row("8", at=1)])])

    def check(output: Output, expected: Expected) -> None:
        assert state(output) == [*expected, ("8", "v1", "ok")]

    assert in_the_middle(tmp_path, meanwhile, check) > 12


def test_the_sums_are_those_of_what_is_there_whoever_compacted_it(tmp_path: Path) -> None:
    for number in itertools.count():
        output, _ = prepared(str(tmp_path / str(number)))
        interruption = AtStep(number, lambda output=output: output.compact())  # type: ignore[misc]
        assert Output(Watched(output.folder.uri, interruption)).compact() == output.totals()
        assert output.totals().rows == 8
        if not interruption.is_done:
            break


def test_an_ok_row_that_comes_during_the_compaction_of_a_failed_one_stays(tmp_path: Path) -> None:
    def meanwhile(output: Output) -> None:
        output.commit([row("7", ok=True, at=1)])

    def check(output: Output, expected: Expected) -> None:
        assert state(output) == [*expected[:7], ("7", "v1", "ok")]

    in_the_middle(tmp_path, meanwhile, check)


def test_a_slow_compaction_that_others_overtake_twice_loses_no_late_commit(tmp_path: Path) -> None:
    """The slow one reads the state, then twice another finishes, and a row arrives that only the slow one has seen."""
    output, expected = prepared(str(tmp_path / "out"))
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


def race(uri: str, rounds: int) -> None:
    output = claimed(uri)

    def committing(worker: int) -> None:
        names: list[str] = []
        for i in range(rounds):
            names.append(output.commit([row(f"{worker}-{i}"), row("shared", ok=worker == 1 and i == 3, at=i)]))
            if i % 4 == 3:
                output.merge_commits(names)
                names.clear()

    def compacting() -> None:
        mine = Output(Folder(uri))
        for _ in range(rounds):
            mine.compact()
            assert mine.results().num_rows >= 0
            assert len(mine.committed()) >= 0

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
    assert len(parts(output)) == 1


def test_compactions_that_race_with_commits_and_merges_lose_nothing(tmp_path: Path) -> None:
    for number in range(4):
        race(str(tmp_path / str(number)), rounds=12)


@pytest.mark.parametrize("store", ["s3", pytest.param("ceph_bucket", marks=pytest.mark.ceph)])
def test_the_same_holds_on_object_storage(store: str, request: pytest.FixtureRequest) -> None:
    bucket = request.getfixturevalue(store)
    output, expected = prepared(f"s3://{bucket}/out")
    assert_known(output, expected)
    assert output.compact().rows == 8
    assert state(output) == expected
    assert commits(output) == []
    assert len(parts(output)) == 1
    race(f"s3://{bucket}/raced", rounds=4)
