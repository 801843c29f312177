"""The order of training samples, who reads which, and what is held out: none of it depends on who asks, or when."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipelines.config import PrepareConfig, load_recipe
from pipelines.dataset import SCHEMA, SHUFFLE_GROUPS, Dataset, SampleOrder, Split, TrainLoader, group_of, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.prepare import prepare
from pipelines.storage import Folder
from repsep_model.transforms import Augmentation, class_probabilities, sample_rng
from tests.pipelines.layout import write_source

# Row groups of all kinds: alike, uneven, fewer and more than are mixed with each other.
SHAPES = [[5], [3, 3, 3], [4, 1, 7, 2], [2] * 40, [1] * (SHUFFLE_GROUPS + 1), [16] * 15 + [3]]


def split_of(groups: list[int], folder: str = "/nowhere") -> Split:
    """A split that is never read."""
    return Split(Folder(folder), [{"file": "train/part-00000.parquet", "row_groups": groups}], None)


@pytest.fixture(scope="module")
def dataset(scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """24 training images in 3 shards of several row groups, 8 for validation."""
    config = PrepareConfig(source=str(scenes), shard_rows=10, row_group_rows=3)
    return open_dataset(prepare(str(tmp_path_factory.mktemp("work")), config).results["dataset"])


@pytest.fixture(scope="module")
def videos(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """36 training images in 12 folders."""
    keys = [f"train/video{v:02d}/{i}" for v in range(12) for i in range(3)] + ["val/other/0"]
    source = write_source(tmp_path_factory.mktemp("videos"), keys)
    config = PrepareConfig(source=str(source), row_group_rows=5)
    return open_dataset(prepare(str(tmp_path_factory.mktemp("work")), config).results["dataset"])


def keys_of(split: Split) -> list[str]:
    return [split.at(group, int(row))["key"] for group, rows in enumerate(split.rows) for row in rows]


# ---------------------------------------------------------------- the order


@pytest.mark.parametrize("groups", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [0, 7])
def test_every_epoch_is_a_permutation(groups: list[int], seed: int) -> None:
    order = SampleOrder(split_of(groups), seed)
    everything = {(g, r) for g, n in enumerate(groups) for r in range(n)}
    for epoch in range(3):
        found = [order.locate(epoch * sum(groups) + i) for i in range(sum(groups))]
        assert {e for e, _, _ in found} == {epoch}
        assert sorted((g, r) for _, g, r in found) == sorted(everything)


def test_rows_that_are_left_out_never_come() -> None:
    split = split_of([4, 4, 4, 4])
    split.rows = [np.array([1, 3]), np.array([], np.int64), np.array([0]), np.array([], np.int64)]
    order = SampleOrder(split, 0)
    assert order.length == 3
    for epoch in range(4):
        assert sorted(order.locate(3 * epoch + i)[1:] for i in range(3)) == [(0, 1), (0, 3), (2, 0)]


@pytest.mark.parametrize("groups", SHAPES, ids=str)
def test_a_position_is_the_same_whatever_was_asked_before(groups: list[int]) -> None:
    length = 3 * sum(groups)
    forward = [SampleOrder(split_of(groups), 5).locate(p) for p in range(length)]
    order = SampleOrder(split_of(groups), 5)
    shuffled = np.random.default_rng(0).permutation(length)
    assert all(order.locate(int(p)) == forward[p] for p in shuffled)
    assert [order.locate(p) for p in reversed(range(length))] == forward[::-1]
    assert all(SampleOrder(split_of(groups), 5).locate(p) == forward[p] for p in (0, length // 2, length - 1))


def test_a_position_is_the_same_when_threads_ask_at_once() -> None:
    groups = [2] * 40
    forward = [SampleOrder(split_of(groups), 5).locate(p) for p in range(240)]
    order = SampleOrder(split_of(groups), 5)
    with ThreadPoolExecutor(4) as pool:
        positions = [int(p) for p in np.random.default_rng(1).permutation(240)]
        assert list(pool.map(order.locate, positions)) == [forward[p] for p in positions]


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    groups = [3] * 20

    def epoch(seed: int, number: int) -> tuple[tuple[int, int], ...]:
        order = SampleOrder(split_of(groups), seed)
        return tuple(order.locate(60 * number + i)[1:] for i in range(60))

    assert len({epoch(seed, number) for seed in range(3) for number in range(3)}) == 9


def test_known_seed_gives_the_order_that_it_always_gave() -> None:
    """A checkpoint holds a position, not an order: with another order it would go on elsewhere."""
    order = SampleOrder(split_of([4, 1, 7, 2] * 6), 7)
    assert [order.locate(p)[1:] for p in range(80, 88)] == [
        *[(12, 3), (6, 5), (13, 0), (22, 4)],  # the end of the first epoch
        *[(14, 2), (7, 0), (11, 0), (18, 0)],
    ]


def test_large_seeds_keep_all_their_bits() -> None:
    seeds = [2**63, 2**63 + 1, 2**64 - 1]
    assert len({tuple(SampleOrder(split_of([30]), seed).locate(p) for p in range(30)) for seed in seeds}) == 3


def test_rows_of_neighbouring_groups_are_mixed() -> None:
    order = SampleOrder(split_of([16] * SHUFFLE_GROUPS), 0)
    groups = [order.locate(p)[1] for p in range(16 * SHUFFLE_GROUPS)]
    first = Counter(groups[:64])
    assert len(first) > SHUFFLE_GROUPS // 2, "the first rows all come from a few groups"


def test_no_more_groups_are_mixed_than_a_reader_can_hold() -> None:
    order = SampleOrder(split_of([2] * 100), 0)
    block = 2 * SHUFFLE_GROUPS
    for start in range(0, 200, block):
        assert len({order.locate(p)[1] for p in range(start, min(start + block, 200))}) <= SHUFFLE_GROUPS


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
    starts = np.cumsum([0, *(len(rows) for rows in order.split.rows)])
    return [int(starts[group]) + row for _, group, row in map(order.locate, positions)]


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
        plain, rare = ({order.locate(start + p)[1] for p in range(3 * SHUFFLE_GROUPS)} for order in orders)
        assert rare <= plain


@pytest.mark.parametrize("classes", [[[]] * 60, [[0], []] * 30], ids=["no class", "a class of no probability"])
def test_blocks_without_a_class_to_draw_keep_their_plain_order(tmp_path: Path, classes: list[list[int]]) -> None:
    split = split_with(tmp_path, classes, 2)
    probabilities = np.array([0.0, 1.0])
    assert numbers(SampleOrder(split, 0, probabilities), range(120)) == numbers(SampleOrder(split, 0), range(120))


def test_rows_that_are_left_out_are_not_drawn_for_their_classes(tmp_path: Path) -> None:
    split = split_with(tmp_path, [[4], [0], [1], [0], [4], [4]], 2)
    split.rows = [np.array([1]), np.array([0, 1]), np.array([], np.int64)]
    order = SampleOrder(split, 0, PROBABILITIES)
    assert order.length == 3
    assert {order.locate(p)[1:] for p in range(60)} == {(0, 1), (1, 0), (1, 1)}


def test_a_drawn_position_is_the_same_whatever_was_asked_before_or_at_once(tmp_path: Path) -> None:
    split = split_with(tmp_path, random_classes(24), 1)
    forward = [SampleOrder(split, 5, PROBABILITIES).locate(p) for p in range(72)]
    order = SampleOrder(split, 5, PROBABILITIES)
    with ThreadPoolExecutor(4) as pool:
        positions = [int(p) for p in np.random.default_rng(1).permutation(72)]
        assert list(pool.map(order.locate, positions)) == [forward[p] for p in positions]
    assert [order.locate(p) for p in reversed(range(72))] == forward[::-1]


def test_only_the_class_column_of_the_block_is_read_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    split = split_with(tmp_path, random_classes(60), 1)
    read, whole = [], split._read_group
    monkeypatch.setattr(split, "_read_group", lambda *what: read.append(what) or whole(*what))
    order = SampleOrder(split, 0, PROBABILITIES)
    assert read == []
    first = {order.locate(p)[1] for p in range(SHUFFLE_GROUPS)}
    assert first <= {group for group, _ in read}
    assert len(read) == SHUFFLE_GROUPS
    for p in (SHUFFLE_GROUPS, SHUFFLE_GROUPS - 1, SHUFFLE_GROUPS + 1):  # across the border and back
        order.locate(p)
    assert len(read) == 2 * SHUFFLE_GROUPS
    assert all(columns == ["classes"] for _, columns in read)


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


def test_a_temperature_of_nothing_is_refused_by_name() -> None:
    with pytest.raises(UsageError, match=r"train\.rare_class_temperature: .* greater than 0"):
        load_recipe(None, ["train.rare_class_temperature=0"])
    assert load_recipe(None).train.rare_class_temperature is None


# ---------------------------------------------------------------- batches


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
    alone = [loader(split).sample(p) for p in range(4 * batch_size)]
    shares = [steps(split, 0, 4, batch_size, rank, ranks) for rank in range(ranks)]
    for step in range(4):
        images, labels = joined([part for share in shares for part in share[step]])
        expected = alone[step * batch_size : (step + 1) * batch_size]
        assert torch.equal(images, torch.stack([image for image, _ in expected]))
        assert torch.equal(labels, torch.stack([label for _, label in expected]))


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
        by_row.setdefault(source.order.locate(position)[1:], []).append(source.sample(position)[0])
    source.close()
    assert all(len(crops) == 2 for crops in by_row.values())
    assert not any(torch.equal(*crops) for crops in by_row.values())


def test_every_sample_draws_from_random_numbers_of_its_own(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    monkeypatch.setattr("pipelines.dataset.sample_rng", lambda *key: drawn.append(key) or sample_rng(*key))
    source = loader(dataset.split("train"))
    for position in range(60):
        source.sample(position)
    source.close()
    assert drawn == [(3, position // 24, position % 24) for position in range(60)]


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_cover_each_row_exactly_once(dataset: Dataset, ranks: int) -> None:
    split = dataset.split("val")
    found = [[key for key, _, _ in split.share(rank, ranks)] for rank in range(ranks)]
    assert sorted(key for share in found for key in share) == sorted(keys_of(split))
    assert max(map(len, found)) - min(map(len, found)) <= 1


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_a_limit_takes_the_first_rows_however_many_ranks_there_are(dataset: Dataset, ranks: int) -> None:
    split = dataset.split("train")
    found = sorted(key for rank in range(ranks) for key, _, _ in split.share(rank, ranks, limit=7))
    assert found == sorted(keys_of(split)[:7])


def test_a_share_of_a_held_out_part_has_its_rows_only(dataset: Dataset) -> None:
    part = dataset.split("train").held_out(0.4, 0, inside=True)
    assert sorted(key for rank in range(2) for key, _, _ in part.share(rank, 2)) == sorted(keys_of(part))


def test_what_a_share_gives_is_what_was_stored(dataset: Dataset, scenes: Path) -> None:
    from repsep_model.images import decode_image, decode_mask

    for key, image, mask in dataset.split("val").share(0, 1):
        assert np.array_equal(image, decode_image((scenes / "images" / key).read_bytes()))
        assert np.array_equal(mask, decode_mask((scenes / "masks" / key).with_suffix(".png").read_bytes()))


@pytest.mark.parametrize(("limit", "count"), [(1, 1), (5, 5), (24, 24), (1000, 24)])
def test_a_sample_of_masks_is_spread_over_all_of_them(dataset: Dataset, limit: int, count: int) -> None:
    split = dataset.split("train")
    everything = [mask for _, _, mask in split.share(0, 1)]
    found = list(split.masks(limit))
    assert len(found) == count
    every = -(-24 // limit)
    assert all(np.array_equal(ours, theirs) for ours, theirs in zip(found, everything[::every], strict=True))


# ---------------------------------------------------------------- holding out


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.2, 0.5])
def test_what_is_held_out_and_the_rest_are_everything_and_share_no_group(
    videos: Dataset, share: float, seed: int
) -> None:
    full = videos.split("train")
    inside, outside = (keys_of(full.held_out(share, seed, inside=side)) for side in (True, False))
    assert sorted(inside + outside) == sorted(keys_of(full))
    groups = [{key.rpartition("/")[0] for key in keys} for keys in (inside, outside)]
    assert not groups[0] & groups[1]


def test_images_without_a_folder_below_the_split_are_held_out_one_by_one(dataset: Dataset) -> None:
    inside = keys_of(dataset.split("train").held_out(0.5, 0, inside=True))
    assert 4 <= len(inside) <= 20, "of 24 images about half"


def test_holding_out_is_a_function_of_the_seed(videos: Dataset) -> None:
    full = videos.split("train")
    found = [tuple(keys_of(full.held_out(0.3, seed, inside=True))) for seed in (0, 1, 2)]
    assert len(set(found)) > 1
    assert tuple(keys_of(full.held_out(0.3, 0, inside=True))) == found[0]


def test_a_holdout_of_nothing_is_refused(videos: Dataset) -> None:
    with pytest.raises(UsageError, match="holdout of 1e-09"):
        videos.split("train").held_out(1e-9, 0, inside=True)
    with pytest.raises(UsageError, match="no image on one side"):
        videos.split("val").held_out(0.999999, 0, inside=False)


@pytest.mark.parametrize(
    ("key", "pattern", "group"),
    [
        ("city/a/001.png", None, "city/a"),
        ("001.png", None, "001.png"),
        ("city/a_000_001.png", r"^(\w+)/", "city"),
        ("city_7_001.png", r"^(\w+?)_\d", "city"),
        ("seq12/frame3.jpg", r"seq\d+", "seq12"),
        ("other/frame3.jpg", r"seq\d+", "other"),
    ],
)
def test_a_group_is_the_patterns_or_the_folder(key: str, pattern: str | None, group: str) -> None:
    assert group_of(key, pattern) == group


# ---------------------------------------------------------------- reading


def test_a_reader_keeps_a_bounded_number_of_groups(scenes: Path, tmp_path: Path) -> None:
    config = PrepareConfig(source=str(scenes), row_group_rows=1)
    split = open_dataset(prepare(str(tmp_path), config).results["dataset"]).split("train")
    split.groups, split.rows = split.groups * 2, split.rows * 2  # 48 groups
    for number in range(48):
        split.at(number, 0)
    assert len(split._cache) == 2 * SHUFFLE_GROUPS
    assert split.at(0, 0)["key"] == "train/0000.jpg"


def test_a_folder_without_a_data_set_says_what_to_run(tmp_path: Path) -> None:
    with pytest.raises(RepsepError, match="run `repsep prepare` first") as caught:
        open_dataset(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("ask", [Dataset.split, Dataset.split_digest])
def test_a_split_that_is_not_there_is_answered_with_those_that_are(
    dataset: Dataset, ask: Callable[[Dataset, str], object]
) -> None:
    with pytest.raises(UsageError, match="has no split 'test'; it has train, val"):
        ask(dataset, "test")
