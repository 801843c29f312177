"""Which attempt counts, compared with the rule written out by hand; states looked up in a million."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pytest

from pipelines.bulk import attempts
from pipelines.bulk.attempts import COLUMNS, Committed, Hashed, attempts_of, hashed, settle
from pipelines.bulk.commits import ROW_SCHEMA
from tests.pipelines.bulk.output_rows import row, shard_rows, uri_of


class Attempt(NamedTuple):
    object: int
    version: int
    empty: bool
    finished_at: int


def counting(found: list[Attempt]) -> dict[int, Attempt]:
    """The rule, one object after the other."""
    by_object: dict[int, list[Attempt]] = defaultdict(list)
    for attempt in found:
        by_object[attempt.object].append(attempt)
    best = {}
    for number, those in by_object.items():
        newest_first = sorted(those, key=lambda a: -a.finished_at)
        since = []
        for attempt in newest_first:
            if attempt.version != newest_first[0].version:
                break
            since.append(attempt)
        best[number] = next((a for a in since if not a.empty), since[0])
    return best


def random_attempts(seed: int) -> list[Attempt]:
    rng = random.Random(seed)
    count = rng.randint(1, 60)
    times = rng.sample(range(1000), count)
    return [Attempt(rng.randrange(12), rng.randrange(3), rng.random() < 0.5, at) for at in times]


def settled(found: list[Attempt]) -> list[int]:
    objects, versions, empty, finished_at = (np.array(column) for column in zip(*found, strict=True))
    return settle(objects, versions, empty, finished_at).tolist()


@pytest.mark.parametrize("seed", range(200))
def test_settling_agrees_with_the_rule_whatever_the_order(seed: int) -> None:
    found = random_attempts(seed)
    expected = counting(found)
    for _ in range(3):
        chosen = [found[i] for i in settled(found)]
        assert {attempt.object: attempt for attempt in chosen} == expected
        assert len(chosen) == len(expected)
        random.Random(seed).shuffle(found)


def test_of_copies_of_one_attempt_the_last_stays() -> None:
    assert settled([Attempt(7, 1, True, 5)] * 3) == [2]
    assert settled([Attempt(7, 1, False, 5), Attempt(7, 1, True, 5)]) == [0]


@pytest.mark.parametrize(
    ("found", "kept"),
    [
        ([Attempt(0, 1, True, 1), Attempt(0, 1, False, 2)], 1),
        ([Attempt(0, 1, False, 1), Attempt(0, 1, True, 2)], 0),
        ([Attempt(0, 1, False, 1), Attempt(0, 2, True, 2)], 1),
        # Changed and changed back: the first mask has been overwritten by the second.
        ([Attempt(0, 1, False, 1), Attempt(0, 2, False, 2), Attempt(0, 1, True, 3)], 2),
        ([Attempt(0, 1, False, 1), Attempt(0, 2, False, 2), Attempt(0, 1, False, 3), Attempt(0, 1, True, 4)], 2),
    ],
)
def test_the_newest_version_counts_and_what_went_well_in_it(found: list[Attempt], kept: int) -> None:
    assert settled(found) == [kept]


def test_attempts_of_a_file_are_its_objects_versions() -> None:
    rows = [row("a"), *shard_rows("s", "of", at=3), row("a", etag="v2", ok=False), *shard_rows("s", "o", at=9)]
    found = attempts_of(pa.Table.from_pylist(rows, schema=ROW_SCHEMA))
    assert found.uri.to_pylist() == [uri_of("a"), uri_of("s"), uri_of("a")]
    assert found.etag.to_pylist() == ["v1", "v1", "v2"]
    assert found.empty.tolist() == [False, False, True]
    assert found.of_row.tolist() == [0, 1, 1, 2, 1]
    times = pa.array([r["finished_at"] for r in (rows[0], rows[4], rows[3])], ROW_SCHEMA.field("finished_at").type)
    assert found.finished_at.tolist() == times.cast(pa.int64()).to_pylist()


def batches(table: pa.Table, size: int) -> Iterator[pa.RecordBatch]:
    return iter(table.select(COLUMNS).to_batches(max_chunksize=size))


def test_hashed_attempts_are_the_same_however_the_file_is_cut() -> None:
    rows = [r for i in range(30) for r in shard_rows(f"s{i}", "of"[i % 2] * (i % 4 + 1) + "of"[i % 3 == 0], at=i)]
    table = pa.Table.from_pylist(rows, schema=ROW_SCHEMA)
    whole = sorted(zip(*(column.tolist() for column in hashed(batches(table, 1000))), strict=True))
    assert len(whole) == 30
    for size in (1, 2, 7):
        assert sorted(zip(*(c.tolist() for c in hashed(batches(table, size))), strict=True)) == whole
    exact = attempts_of(table)
    assert sorted(attempts.uri_hashes(exact).tolist()) == [uri for uri, *_ in whole]
    assert sum(failed for _, _, failed, _, _ in whole) == 20
    assert exact.empty.sum() == sum(empty for _, _, _, empty, _ in whole) == 5


def files_of(found: list[Attempt], files: int) -> Iterator[Hashed]:
    for start in range(files):
        rows = [row(f"{a.object}", etag=f"v{a.version}", ok=not a.empty, at=a.finished_at) for a in found[start::files]]
        yield hashed(batches(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), 4))


@pytest.mark.parametrize("slice_rows", [1, 3, 1 << 14])
def test_states_agree_with_the_rule(slice_rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "SLICE", slice_rows)
    for seed in range(30):
        # One attempt of a version in a file: more of them are one attempt.
        found = random_attempts(seed)
        committed = Committed(files_of(found, len(found)))
        expected = counting(found)
        assert len(committed) == len(expected)
        for number, version in [(number, version) for number in range(13) for version in range(3)]:
            counts = expected.get(number)
            here = counts is not None and counts.version == version
            state = (attempts.FAILED_STATE if counts.empty else attempts.OK_STATE) if counts and here else 0
            assert committed.states([uri_of(f"{number}")], [f"v{version}"]).tolist() == [state]


def test_a_hash_that_two_uris_share_never_makes_one_done(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hash
    monkeypatch.setattr(attempts, "hash", lambda text: real(text) if "\0" in text else 1, raising=False)
    rows = [row("a"), row("b", ok=False)]
    committed = Committed([hashed(batches(pa.Table.from_pylist(rows, schema=ROW_SCHEMA), 4))])
    states = committed.states([uri_of(k) for k in "abc"], ["v1"] * 3).tolist()
    assert states[0] in (attempts.ABSENT_STATE, attempts.OK_STATE)
    assert states[1] in (attempts.ABSENT_STATE, attempts.FAILED_STATE)
    assert states[2] == attempts.ABSENT_STATE


def test_a_hash_that_two_versions_share_never_makes_one_done(monkeypatch: pytest.MonkeyPatch) -> None:
    real = hash
    monkeypatch.setattr(attempts, "hash", lambda text: 1 if "\0" in text else real(text), raising=False)
    committed = Committed([hashed(batches(pa.Table.from_pylist([row("a")], schema=ROW_SCHEMA), 4))])
    states = committed.states([uri_of("a"), uri_of("b")], ["v1", "v1"])
    assert states.tolist() == [attempts.OK_STATE, attempts.ABSENT_STATE]


def test_what_is_committed_takes_at_most_32_bytes_each() -> None:
    draw = np.random.default_rng(0)
    count = 100_000
    uri, version = (draw.integers(0, 1 << 63, count).astype(np.uint64) for _ in range(2))
    found = Hashed(uri, version, *np.zeros((2, count), bool), np.arange(count))
    committed = Committed([found])
    assert len(committed) == count
    assert committed.nbytes <= 32 * count
