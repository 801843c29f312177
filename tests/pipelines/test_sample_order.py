"""The order of training samples is a function of seed and epoch: not of who asks, when, or how many there are."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.config import load_recipe
from pipelines.dataset import SCHEMA, Split
from pipelines.errors import UsageError
from pipelines.sample_order import SHUFFLE_GROUPS, SHUFFLE_SHARDS, SampleOrder, Samples
from pipelines.storage import Folder

# Row groups of all kinds: alike, uneven, fewer and more than are mixed with each other; then shards likewise.
ONE_SHARD = [[5], [3, 3, 3], [4, 1, 7, 2], [2] * 40, [1] * (SHUFFLE_GROUPS + 1), [16] * 15 + [3]]
SHAPES = [[groups] for groups in ONE_SHARD]
SHAPES += [
    [[3, 1], [2]],
    [[2, 2, 1]] * (2 * SHUFFLE_SHARDS + 3),
    [[1]] * (SHUFFLE_SHARDS + 1),
    [[8] * 20, [1], [3] * 5] * 9,
]


def split_of(*shards: list[int]) -> Split:
    """A split that is never read; of each shard the sizes of its row groups."""
    return Split(Folder("/nowhere"), [{"file": f"train/{i}", "row_groups": n} for i, n in enumerate(shards)], None)


def place(order: SampleOrder, position: int) -> tuple[int, int, int]:
    """(epoch, row group, row in it) of a position, asked for alone."""
    found = order.samples(position, position + 1)
    assert found.positions.tolist() == [position]
    return int(found.epochs[0]), int(found.groups[0]), int(found.rows[0])


@pytest.mark.parametrize("shards", SHAPES, ids=range(len(SHAPES)))
@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_is_a_permutation(shards: list[list[int]], seed: int) -> None:
    order = SampleOrder(split_of(*shards), seed)
    groups = [n for shard in shards for n in shard]
    everything = {(g, r) for g, n in enumerate(groups) for r in range(n)}
    for epoch in range(3):
        found = [place(order, epoch * sum(groups) + i) for i in range(sum(groups))]
        assert {e for e, _, _ in found} == {epoch}
        assert sorted((g, r) for _, g, r in found) == sorted(everything)


def test_rows_that_are_left_out_never_come() -> None:
    split = split_of([4, 4, 4, 4])
    split.keep([np.array([1, 3]), np.array([], np.int64), np.array([0]), np.array([], np.int64)])
    order = SampleOrder(split, 0)
    assert order.length == 3
    for epoch in range(4):
        assert sorted(place(order, 3 * epoch + i)[1:] for i in range(3)) == [(0, 1), (0, 3), (2, 0)]


@pytest.mark.parametrize("shards", SHAPES, ids=range(len(SHAPES)))
def test_a_position_is_the_same_whatever_was_asked_before(shards: list[list[int]]) -> None:
    length = 2 * sum(sum(shard) for shard in shards) + 3
    forward = [place(SampleOrder(split_of(*shards), 5), p) for p in range(length)]
    order = SampleOrder(split_of(*shards), 5)
    shuffled = np.random.default_rng(0).permutation(length)
    assert all(place(order, int(p)) == forward[p] for p in shuffled)
    assert [place(order, p) for p in reversed(range(length))] == forward[::-1]
    found = SampleOrder(split_of(*shards), 5).samples(1, length)
    assert list(zip(*(column.tolist() for column in found[1:]), strict=True)) == forward[1:]


def test_a_position_is_the_same_when_threads_ask_at_once() -> None:
    groups = [2] * 40
    forward = [place(SampleOrder(split_of(groups), 5), p) for p in range(240)]
    order = SampleOrder(split_of(groups), 5)
    with ThreadPoolExecutor(4) as pool:
        positions = [int(p) for p in np.random.default_rng(1).permutation(240)]
        assert list(pool.map(lambda p: place(order, p), positions)) == [forward[p] for p in positions]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    groups = [3] * 20

    def epoch(seed: int, number: int) -> tuple[tuple[int, int], ...]:
        order = SampleOrder(split_of(groups), seed)
        return tuple(place(order, 60 * number + i)[1:] for i in range(60))

    assert len({epoch(seed, number) for seed in range(3) for number in range(3)}) == 9


def test_known_seed_gives_the_order_that_it_always_gave() -> None:
    """A checkpoint holds a position, not an order: with another order it would go on elsewhere."""
    order = SampleOrder(split_of(*[[4, 1, 7, 2]] * 20), 7)
    assert [place(order, p)[1:] for p in range(276, 284)] == [
        *[(8, 3), (10, 0), (39, 1), (77, 0)],  # the end of the first epoch
        *[(41, 0), (14, 2), (78, 2), (78, 5)],
    ]


def test_large_seeds_keep_all_their_bits() -> None:
    seeds = [2**63, 2**63 + 1, 2**64 - 1]
    assert len({tuple(place(SampleOrder(split_of([30]), seed), p) for p in range(30)) for seed in seeds}) == 3


def test_rows_of_neighbouring_groups_are_mixed() -> None:
    order = SampleOrder(split_of([16] * SHUFFLE_GROUPS), 0)
    groups = [place(order, p)[1] for p in range(16 * SHUFFLE_GROUPS)]
    first = Counter(groups[:64])
    assert len(first) > SHUFFLE_GROUPS // 2, "the first rows all come from a few groups"


def test_no_more_groups_are_mixed_than_a_reader_can_hold() -> None:
    order = SampleOrder(split_of([2] * 100), 0)
    block = 2 * SHUFFLE_GROUPS
    for start in range(0, 200, block):
        assert len({place(order, p)[1] for p in range(start, min(start + block, 200))}) <= SHUFFLE_GROUPS


def test_shards_that_are_mixed_are_no_more_than_a_window() -> None:
    """What a local cache must hold: an epoch passes through each window of shards once."""
    order = SampleOrder(split_of(*[[2, 3]] * 50), 0)
    window = 5 * SHUFFLE_SHARDS
    seen: list[set[int]] = []
    for start in range(0, 250, window):
        groups = order.samples(start, min(start + window, 250)).groups
        seen.append({order.split.shard_of(int(g)) for g in groups})
    assert [len(shards) for shards in seen] == [16, 16, 16, 2]
    assert len(set.union(*seen)) == 50


def test_a_hundred_million_rows_cost_no_more_than_their_row_groups() -> None:
    shards = [{"file": f"train/{i}", "row_groups": [32] * 64} for i in range(48_829)]
    tracemalloc.start()
    order = SampleOrder(Split(Folder("/nowhere"), shards, None), 0)
    assert order.length > 99_990_000
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    for epoch in range(3):
        order.samples(epoch * order.length - 5 if epoch else 0, epoch * order.length + 1000)
    after, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert held < 16 * sum(len(s["row_groups"]) for s in shards)
    assert after - held < 4e6
    assert peak - held < 6e6


# ---------------------------------------------------------------- whose samples


@pytest.mark.parametrize("batch_size", [1, 8, 60, 700])
@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_shares_in_order_of_rank_are_the_same_batch_for_any_number_of_ranks(batch_size: int, ranks: int) -> None:
    order = SampleOrder(split_of(*[[4, 1, 7, 2]] * 40), 3)
    for step in (0, 1, 5):
        whole = order.step_samples(step, batch_size)
        shares = [order.step_samples(step, batch_size, rank, ranks) for rank in range(ranks)]
        for column, parts in zip(whole, zip(*shares, strict=True), strict=True):
            assert np.array_equal(np.concatenate(parts), column)
        assert sorted(whole.positions.tolist()) == list(range(step * batch_size, (step + 1) * batch_size))
        sizes = [len(share.positions) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@pytest.mark.parametrize(
    ("ranks", "share", "by_place", "by_position"),
    [(1, 8, 1.0, 1.0), (8, 8, 2.3, 6.9), (64, 8, 2.3, 12), (1000, 16, 1.9, 9.9), (1000, 8, 3.1, 12), (1000, 1, 16, 15)],
)
def test_row_groups_are_read_by_few_ranks(ranks: int, share: int, by_place: float, by_position: float) -> None:
    """Rows read over rows used, by each rank for itself, at 16 rows a row group; beside it if they were dealt out as
    they come."""
    order = SampleOrder(split_of(*[[16] * 32] * 200), 0)
    batch = ranks * share
    steps = range(4 * max(1, 256 // batch))
    asked = range(0, ranks, max(1, ranks // 16))

    def ratio(dealt: Callable[[int, int], Samples]) -> float:
        read = 0
        for rank in asked:
            held = {pair for step in steps for pair in zip(*(c.tolist() for c in dealt(step, rank)[1:3]), strict=True)}
            read += 16 * len(held)
        return read / (len(asked) * len(steps) * share)

    def as_they_come(step: int, rank: int) -> Samples:
        return order.samples(step * batch + rank * share, step * batch + (rank + 1) * share)

    found = ratio(lambda step, rank: order.step_samples(step, batch, rank, ranks)), ratio(as_they_come)
    assert found[0] <= by_place
    assert found[1] >= by_position


# ---------------------------------------------------------------- rare classes


def split_with(folder: Path, classes: list[list[int]], group_rows: int) -> Split:
    """A split of one shard whose rows hold these classes, and nothing else."""
    columns = {"key": [str(i) for i in range(len(classes))], "classes": classes}
    columns |= {name: [None] * len(classes) for name in SCHEMA.names if name not in columns}
    (folder / "train").mkdir()
    pq.write_table(pa.table(columns, schema=SCHEMA), folder / "train/0.parquet", row_group_size=group_rows)
    groups = [min(group_rows, len(classes) - start) for start in range(0, len(classes), group_rows)]
    return Split(Folder(str(folder)), [{"file": "train/0.parquet", "row_groups": groups}], None)


def random_classes(rows: int) -> list[list[int]]:
    """Class 0 in nearly every row, the others ever rarer; some rows hold none."""
    rng = np.random.default_rng(0)
    return [np.flatnonzero(rng.random(5) < [0.8, 0.5, 0.3, 0.1, 0.02]).tolist() for _ in range(rows)]


PROBABILITIES = np.array([0.02, 0.08, 0.2, 0.3, 0.4])


def numbers(order: SampleOrder, positions: range) -> list[int]:
    """The rows at these positions, each by its number in the split."""
    return [int(order.split.starts[group]) + row for _, group, row in (place(order, p) for p in positions)]


def test_classes_are_drawn_by_their_probability(tmp_path: Path) -> None:
    classes = [[k] for k in (0, 0, 0, 1, 1, 2, 0, 3, 0, 4, 0, 1)]
    order = SampleOrder(split_with(tmp_path, classes, 2), 0, PROBABILITIES)
    draws = 12 * 300
    drawn = np.bincount([classes[i][0] for i in numbers(order, range(draws))], minlength=5)
    deviation = np.sqrt(draws * PROBABILITIES * (1 - PROBABILITIES))
    assert (np.abs(drawn - draws * PROBABILITIES) < 4.5 * deviation).all(), "less than 1 in 25,000 by chance"


def test_rows_come_as_often_as_the_classes_that_they_hold_say(tmp_path: Path) -> None:
    """Expected by hand, block by block: each class's share among those there, divided among the rows that hold it."""
    classes = random_classes(120)
    split = split_with(tmp_path, classes, 3)
    plain, rare = SampleOrder(split, 0), SampleOrder(split, 0, PROBABILITIES)
    block, epochs = 3 * SHUFFLE_GROUPS, 60
    expected, found = np.zeros(120), np.zeros(120)
    for epoch in range(epochs):
        for start in range(0, 120, block):
            places = range(120 * epoch + start, 120 * epoch + min(start + block, 120))
            rows = numbers(plain, places)
            there = {k for i in rows for k in classes[i]}
            for k in there:
                holders = [i for i in rows if k in classes[i]]
                share = PROBABILITIES[k] / sum(PROBABILITIES[j] for j in there)
                expected[holders] += len(places) * share / len(holders)
            np.add.at(found, numbers(rare, places), 1)
    assert expected.max() > 10 * expected[expected > 0].min()
    assert (np.abs(found - expected) <= 5 * np.sqrt(expected)).all()
    assert found[[i for i, held in enumerate(classes) if not held]].sum() == 0


def test_rare_classes_leave_each_block_its_row_groups(tmp_path: Path) -> None:
    split = split_with(tmp_path, random_classes(2 * 3 * SHUFFLE_GROUPS), 3)
    orders = SampleOrder(split, 0), SampleOrder(split, 0, PROBABILITIES)
    for start in range(0, 3 * len(split), 3 * SHUFFLE_GROUPS):
        plain, rare = ({place(order, start + p)[1] for p in range(3 * SHUFFLE_GROUPS)} for order in orders)
        assert rare <= plain


@pytest.mark.parametrize("classes", [[[]] * 60, [[0], []] * 30], ids=["no class", "a class of no probability"])
def test_blocks_without_a_class_to_draw_keep_their_plain_order(tmp_path: Path, classes: list[list[int]]) -> None:
    split = split_with(tmp_path, classes, 2)
    probabilities = np.array([0.0, 1.0])
    assert numbers(SampleOrder(split, 0, probabilities), range(120)) == numbers(SampleOrder(split, 0), range(120))


def test_rows_that_are_left_out_are_not_drawn_for_their_classes(tmp_path: Path) -> None:
    split = split_with(tmp_path, [[4], [0], [1], [0], [4], [4]], 2)
    split.keep([np.array([1]), np.array([0, 1]), np.array([], np.int64)])
    order = SampleOrder(split, 0, PROBABILITIES)
    assert order.length == 3
    assert {place(order, p)[1:] for p in range(60)} == {(0, 1), (1, 0), (1, 1)}


def test_a_drawn_position_is_the_same_whatever_was_asked_before_or_at_once(tmp_path: Path) -> None:
    split = split_with(tmp_path, random_classes(24), 1)
    forward = [place(SampleOrder(split, 5, PROBABILITIES), p) for p in range(72)]
    order = SampleOrder(split, 5, PROBABILITIES)
    with ThreadPoolExecutor(4) as pool:
        positions = [int(p) for p in np.random.default_rng(1).permutation(72)]
        assert list(pool.map(lambda p: place(order, p), positions)) == [forward[p] for p in positions]
    assert [place(order, p) for p in reversed(range(72))] == forward[::-1]


def test_only_the_class_column_of_the_block_is_read_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_with(tmp_path, random_classes(60), 1)
    read, whole = [], split.read
    monkeypatch.setattr(split, "read", lambda *what: read.append(what) or whole(*what))
    order = SampleOrder(split, 0, PROBABILITIES)
    assert read == []
    first = {place(order, p)[1] for p in range(SHUFFLE_GROUPS)}
    assert first <= {group for group, _ in read}
    assert len(read) == SHUFFLE_GROUPS
    for p in (SHUFFLE_GROUPS, SHUFFLE_GROUPS - 1, SHUFFLE_GROUPS + 1):  # across the border and back
        place(order, p)
    assert len(read) == 2 * SHUFFLE_GROUPS
    assert all(columns == ["classes"] for _, columns in read)


def test_a_temperature_of_nothing_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"train\.rare_class_temperature: .* greater than 0"):
        load_recipe(None, ["train.rare_class_temperature=0"])
    assert load_recipe(None).train.rare_class_temperature is None
