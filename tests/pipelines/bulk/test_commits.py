"""A bulk output: names that never collide, an owner, and rows that are committed, merged and found again."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import pickle
import posixpath
import random
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipelines.bulk.attempts import ABSENT_STATE, FAILED_STATE, OK_STATE
from pipelines.bulk.commits import (
    CLASSES,
    COMMITS,
    CONFIDENCE,
    KEY_BYTES,
    MASKS,
    PAGE,
    REPORT,
    RESULTS,
    ROW_SCHEMA,
    RUN,
    Committed,
    Output,
    ReplacedError,
    object_key,
)
from pipelines.bulk.result_parts import Totals
from pipelines.errors import StorageError, UsageError
from pipelines.storage import Folder
from tests.pipelines.bulk.output_rows import (
    NAMES,
    SETTINGS,
    AtStep,
    KilledError,
    Watched,
    claimed,
    die,
    row,
    shard_rows,
    state,
    uri_of,
)


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return claimed(str(tmp_path / "out"))


def known(output: Output, key: str, etag: str = "v1") -> int:
    """What is committed of an image in this version."""
    return int(output.committed().states([uri_of(key)], [etag])[0])


def settings_of(folder: Folder) -> dict[str, Any]:
    """What run.json says, without the generation, which is random."""
    found: dict[str, Any] = json.loads(folder.read(RUN))
    assert len(found.pop("generation")) == 16
    return found


def keys_in(folder: Folder, prefix: str) -> list[str]:
    return [entry.key for entry in folder.list(prefix)]


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
    assert settings_of(output.folder) == SETTINGS
    assert json.loads(output.folder.read(CLASSES)) == NAMES
    assert known(output, "a") == OK_STATE


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
    assert settings_of(output.folder) == SETTINGS
    assert json.loads(output.folder.read(CLASSES)) == NAMES


def test_of_two_models_that_claim_at_once_one_is_refused(tmp_path: Path) -> None:
    uri = str(tmp_path / "out")

    def quicker() -> None:
        Output(Folder(uri)).claim(SETTINGS, NAMES, overwrite=False)

    with pytest.raises(UsageError, match="model 'm1' instead of 'm2'"):
        Output(Watched(uri, AtStep(0, quicker))).claim(SETTINGS | {"model": "m2"}, NAMES, overwrite=False)
    assert settings_of(Folder(uri)) == SETTINGS


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
    assert settings_of(folder) == SETTINGS


def test_looking_whose_output_it_is_writes_nothing(tmp_path: Path, output: Output) -> None:
    new = Output(Folder(str(tmp_path / "new")))
    assert new.check(SETTINGS, overwrite=False) == "free"
    assert not (tmp_path / "new").exists()
    before = list(output.folder.list())
    assert output.check(SETTINGS, overwrite=False) == "ours"
    assert output.check(SETTINGS | {"model": "m2"}, overwrite=True) == "replace"
    assert list(output.folder.list()) == before


def fill(output: Output) -> None:
    for key in ("masks/a.png", "masks/deep/b/c.png", "confidence/a.png", REPORT, PAGE, "notes.txt"):
        output.folder.write(key, b"old")
    output.commit([row("a")])
    output.compact()
    output.commit([row("b")])


def test_overwrite_replaces_the_output_of_another_model_and_nothing_else(output: Output) -> None:
    fill(output)
    output.claim(SETTINGS | {"model": "m2"}, {"classes": []}, overwrite=True)
    assert keys_in(output.folder, "") == [CLASSES, "notes.txt", RUN]
    assert json.loads(output.folder.read(RUN))["model"] == "m2"
    assert len(output.committed()) == 0
    output.commit([row("a", etag="v2")])
    assert output.compact().rows == 1


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
        except KilledError:
            output.claim(other, NAMES, overwrite=True)
        else:
            break
        assert keys_in(output.folder, "") == [CLASSES, "notes.txt", RUN]
        assert settings_of(output.folder) == other
    assert number > 10


def test_an_output_whose_clearing_was_interrupted_is_nobodys(output: Output) -> None:
    fill(output)
    with pytest.raises(KilledError):
        Output(Watched(output.folder.uri, AtStep(5, die))).claim(SETTINGS | {"model": "m2"}, NAMES, overwrite=True)
    for settings in (SETTINGS, SETTINGS | {"model": "m2"}):
        with pytest.raises(UsageError, match="is being cleared by a job with --overwrite, or was until"):
            output.claim(settings, NAMES, overwrite=False)


# ---------------------------------------------------------------- replaced while a job runs


def written(output: Output) -> None:
    """What a worker does."""
    output.verify()
    output.folder.write("masks/a.png", b"old")
    output.commit([row("a")])


def write_if_ours(output: Output) -> None:
    with contextlib.suppress(ReplacedError):
        written(output)


def test_a_job_whose_output_was_replaced_writes_no_more_rows_or_results(output: Output) -> None:
    names = [output.commit([row("a")]), output.commit([row("b")])]
    worker = Output(output.folder, output.generation)
    new = Output(output.folder)
    new.claim(SETTINGS | {"model": "m2"}, NAMES, overwrite=True)
    new.commit([row("c")])
    before = list(output.folder.list())
    for late in (lambda: written(worker), lambda: worker.commit([row("a")]), output.compact):
        with pytest.raises(ReplacedError, match=f"{output.folder.uri}: another job has replaced this output"):
            late()
    assert output.merge_commits(names) == []
    assert list(output.folder.list()) == before
    assert new.compact().rows == 1


def test_a_job_of_the_same_model_joins_and_replaces_nothing(output: Output) -> None:
    other = claimed(output.folder.uri)
    assert other.generation == output.generation
    written(output)
    written(other)
    assert output.compact().rows == 1


def test_nothing_of_a_job_is_left_wherever_another_replaces_its_output(tmp_path: Path) -> None:
    for number in itertools.count():
        old = claimed(str(tmp_path / str(number)))
        fill(old)
        worker = AtStep(number, functools.partial(write_if_ours, old))
        Output(Watched(old.folder.uri, worker)).claim(SETTINGS | {"model": "m2"}, NAMES, overwrite=True)
        assert keys_in(old.folder, "") == [CLASSES, "notes.txt", RUN]
        if not worker.is_done:
            break
    assert number > 10


def test_a_compaction_in_whose_middle_the_output_is_replaced_leaves_nothing(tmp_path: Path) -> None:
    """But in one moment, between its last look and its manifest."""
    left = 0
    for number in itertools.count():
        old = claimed(str(tmp_path / str(number)))
        fill(old)
        new = Output(old.folder)

        def replaced(new: Output = new) -> None:
            new.claim(SETTINGS | {"model": "m2"}, NAMES, overwrite=True)
            new.commit([row("a")])

        interruption = AtStep(number, replaced)
        with contextlib.suppress(StorageError):
            Output(Watched(old.folder.uri, interruption), old.generation).compact()
        if not interruption.is_done:
            break
        left += keys_in(old.folder, RESULTS) != []
        assert new.has_commits()
    assert number > 10
    assert left <= 1


def test_of_two_that_replace_an_output_at_once_one_goes_on(tmp_path: Path) -> None:
    """And its classes are there, but in one moment, between the other's last look and its classes."""
    wrong = 0
    for number in itertools.count():
        fill(claimed(str(tmp_path / str(number))))
        folder = Folder(str(tmp_path / str(number)))
        jobs = [Output(folder), Output(folder)]
        first = functools.partial(jobs[0].claim, SETTINGS | {"model": "m2"}, {"classes": [2]}, overwrite=True)
        interruption = AtStep(number, first)
        jobs[1].folder = Watched(folder.uri, interruption)
        with contextlib.suppress(ReplacedError, UsageError):
            jobs[1].claim(SETTINGS | {"model": "m3"}, {"classes": [3]}, overwrite=True)
        if not interruption.is_done:
            break
        (going_on,) = [job for job in jobs if job.generation == json.loads(folder.read(RUN))["generation"]]
        model = 2 + jobs.index(going_on)
        assert settings_of(folder)["model"] == f"m{model}"
        wrong += json.loads(folder.read(CLASSES)) != {"classes": [model]}
        going_on.commit([row("a")])
        assert going_on.compact().rows == 1
    assert number > 10
    assert wrong <= 1


# ---------------------------------------------------------------- rows


def test_a_commit_is_known_before_and_after_a_compaction(output: Output) -> None:
    output.commit([row("a"), row("b", ok=False)])
    for compacted in (False, True):
        assert output.has_commits() != compacted
        states = output.committed().states([uri_of(key) for key in ("a", "b", "c", "a")], ["v1", "v1", "v1", "v2"])
        assert states.tolist() == [OK_STATE, FAILED_STATE, ABSENT_STATE, ABSENT_STATE]
        output.compact()


def test_a_shard_is_done_only_when_none_of_its_images_failed(output: Output) -> None:
    output.commit(shard_rows("good.tar", "ooo"))
    output.commit(shard_rows("bad.tar", "ofo"))
    output.commit([*shard_rows("worse.tar", "f"), *shard_rows("fine.tar", "oo")])
    for _ in range(2):
        committed = output.committed()
        assert len(committed) == 4
        uris = [uri_of(f"{name}.tar") for name in ("good", "bad", "worse", "fine", "other")]
        expected = [OK_STATE, FAILED_STATE, FAILED_STATE, OK_STATE, ABSENT_STATE]
        assert committed.states(uris, ["v1"] * 5).tolist() == expected
        output.compact()


def test_a_failed_image_that_succeeds_later_counts_as_done(output: Output) -> None:
    output.commit([row("a", ok=False, at=1), row("b", at=1)])
    assert (known(output, "a"), known(output, "b")) == (FAILED_STATE, OK_STATE)
    output.compact()
    output.commit([row("a", ok=True, at=2)])
    assert (known(output, "a"), known(output, "b")) == (OK_STATE, OK_STATE)


def test_an_image_that_changed_is_known_only_in_its_new_version(output: Output) -> None:
    output.commit([row("a", at=1)])
    output.compact()
    output.commit([row("a", etag="v2", at=2)])
    assert (known(output, "a", "v1"), known(output, "a", "v2")) == (ABSENT_STATE, OK_STATE)


def test_a_batch_that_is_committed_twice_is_one_part(output: Output) -> None:
    first = output.commit([row("a", at=1), row("b", at=1)])
    assert output.commit([row("b", at=2), row("a", at=2)]) == first
    assert keys_in(output.folder, COMMITS) == [f"{COMMITS}/{first}.parquet"]


def test_a_second_attempt_with_another_outcome_does_not_replace_the_first(output: Output) -> None:
    assert output.commit([row("a", ok=False, at=1)]) != output.commit([row("a", ok=True, at=2)])
    assert len(keys_in(output.folder, COMMITS)) == 2


def test_what_users_read_is_the_results(output: Output) -> None:
    output.commit([row("a"), row("b", ok=False), *shard_rows("c.tar", "of")])
    output.compact()
    folder = Path(output.folder.path, RESULTS)
    table = pq.read_table([str(path) for path in folder.glob("*.parquet")]).sort_by("key")
    assert table.equals(output.results())
    assert table.schema.equals(ROW_SCHEMA)
    assert table["key"].to_pylist() == ["a", "b", "c.tar#0", "c.tar#1"]


def test_totals_are_the_sums_over_the_rows(output: Output) -> None:
    other = {"height": 1000, "width": 3000, "pixels": [0, 5, 7, 2**60]}
    output.commit([row("a"), row("b", ok=False), row("c") | other])
    output.compact()
    output.commit([row("d"), row("b", ok=True, at=1)])
    expected = Totals(4, 4, 0, 3.000018, [12, 5, 13, 2**60], [3, 1, 4, 1])
    assert output.compact() == output.totals() == expected
    assert Output(output.folder).compact() == expected


def test_an_output_without_rows_is_empty(tmp_path: Path, output: Output) -> None:
    for empty in (output, Output(Folder(str(tmp_path / "new")))):
        assert empty.compact() == empty.totals() == Totals()
        assert len(empty.committed()) == 0
        assert empty.committed().states(["s3://b/x"], ["v1"]).tolist() == [ABSENT_STATE]
        assert empty.results().num_rows == 0
        assert list(empty.tables()) == []
        assert not empty.has_commits()
    assert not (tmp_path / "new").exists()


def test_tables_read_only_the_columns_that_are_asked_for(output: Output) -> None:
    output.commit([row("a")])
    output.compact()
    (table,) = output.tables(["key", "status"])
    assert table.to_pylist() == [{"key": "a", "status": "ok"}]


def test_tables_that_another_job_compacts_meanwhile_say_so(output: Output) -> None:
    output.commit([row("a")])
    output.compact()

    def meanwhile() -> None:
        output.commit([row("a", at=1, etag="v2")])
        output.compact()

    tables = Output(Watched(output.folder.uri, AtStep(2, meanwhile))).tables()
    with pytest.raises(StorageError, match="another job has just changed the results; read them again"):
        list(tables)


def test_what_is_committed_does_not_travel_to_another_process(output: Output) -> None:
    with pytest.raises(TypeError, match=r"Output\.committed\(\)"):
        pickle.dumps(Committed())


# ---------------------------------------------------------------- merged while the job runs


def test_merged_commits_hold_the_same_rows_in_one_part(output: Output) -> None:
    names = [output.commit([row(f"{i}-{j}", ok=j != 1) for j in range(3)]) for i in range(40)]
    before = output.committed()
    (merged,) = output.merge_commits(names)
    assert keys_in(output.folder, COMMITS) == [f"{COMMITS}/{merged}.parquet"]
    uris, etags = [uri_of(f"{i}-{j}") for i in range(40) for j in range(3)], ["v1"] * 120
    assert (output.committed().states(uris, etags) == before.states(uris, etags)).all()
    assert output.compact().rows == 120


def test_merging_keeps_the_attempt_that_counts_of_each_version(output: Output) -> None:
    names = [
        output.commit([row("a", ok=False, at=1), row("b", at=1)]),
        output.commit([row("a", ok=True, at=2)]),
        output.commit([row("a", ok=False, at=3), row("c", at=3)]),
        output.commit([row("b", etag="v2", ok=False, at=4)]),
        output.commit(shard_rows("s.tar", "ofo", at=5)),
        output.commit(shard_rows("s.tar", "oof", at=6)),
    ]
    (merged,) = output.merge_commits(names)
    rows = pq.read_table(str(Path(output.folder.path, COMMITS, f"{merged}.parquet"))).to_pylist()
    assert [(r["key"], r["etag"], r["status"]) for r in rows] == [
        ("b", "v1", "ok"),  # whether it counts beside v2 is for the compaction to say
        ("a", "v1", "ok"),
        ("c", "v1", "ok"),
        ("b", "v2", "failed"),
        ("s.tar#0", "v1", "ok"),
        ("s.tar#1", "v1", "ok"),
        ("s.tar#2", "v1", "failed"),
    ]
    output.compact()
    assert ("b", "v2", "failed") in state(output)
    assert len(state(output)) == 6


def test_a_merged_part_is_bounded_and_what_is_large_already_stays(
    output: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipelines.bulk.compaction.PART_ROWS", 10)
    large = output.commit(shard_rows("large.tar", "o" * 25))
    names = [output.commit([row(f"{i}-{j}") for j in range(4)]) for i in range(5)]
    merged = output.merge_commits([names[0], large, *names[1:]])
    assert len(merged) == 4  # 4 | 25 | 8 | 8
    assert merged[:2] == [names[0], large]
    assert output.compact().rows == 45


def test_merging_again_what_was_merged_loses_nothing(output: Output) -> None:
    names = [output.commit([row(f"{i}")]) for i in range(9)]
    merged = [*output.merge_commits(names[:5]), *output.merge_commits(names[5:])]
    assert output.merge_commits([*merged, *names]) != names
    assert len(keys_in(output.folder, COMMITS)) == 1
    assert [key for key, _, _ in state(output)] == []
    output.compact()
    assert [key for key, _, _ in state(output)] == [f"{i}" for i in range(9)]


def test_a_merge_that_is_killed_anywhere_loses_nothing(tmp_path: Path) -> None:
    for number in itertools.count():
        output = claimed(str(tmp_path / str(number)))
        names = [output.commit([row(f"{i}", ok=i != 2)]) for i in range(4)]
        killed = False
        try:
            Output(Watched(output.folder.uri, AtStep(number, die))).merge_commits(names)
        except KilledError:
            killed = True
        states = output.committed().states([uri_of(f"{i}") for i in range(4)], ["v1"] * 4)
        assert states.tolist() == [OK_STATE, OK_STATE, FAILED_STATE, OK_STATE]
        assert output.compact() == Totals(4, 3, 1, 18e-6, [12, 0, 6], [3, 0, 3])
        if not killed:
            break
    assert number == 9  # 4 reads, a write, 4 deletes


def test_a_compaction_in_the_middle_of_a_merge_loses_nothing(tmp_path: Path) -> None:
    for number in itertools.count():
        output = claimed(str(tmp_path / str(number)))
        names = [output.commit([row(f"{i}")]) for i in range(3)]
        interruption = AtStep(number, lambda output=output: output.compact())  # type: ignore[misc]
        Output(Watched(output.folder.uri, interruption)).merge_commits(names)
        if not interruption.is_done:
            break
        assert output.compact().rows == 3
        assert state(output) == [(f"{i}", "v1", "ok") for i in range(3)]
    assert number == 7


def test_a_merge_in_the_middle_of_reading_what_is_committed_hides_nothing(tmp_path: Path) -> None:
    for number in itertools.count():
        output = claimed(str(tmp_path / str(number)))
        output.commit([row("results")])
        output.compact()
        names = [output.commit([row(f"{i}")]) for i in range(3)]

        def meanwhile(output: Output = output, names: list[str] = names) -> None:
            output.merge_commits(names)
            output.compact()

        interruption = AtStep(number, meanwhile)
        committed = Output(Watched(output.folder.uri, interruption)).committed()
        uris = [uri_of(key) for key in ("0", "1", "2", "results")]
        assert committed.states(uris, ["v1"] * 4).tolist() == [OK_STATE] * 4
        if not interruption.is_done:
            break
    assert number >= 7
