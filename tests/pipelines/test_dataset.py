"""The order of training samples, who reads which, and what is held out: none of it depends on who asks, or when."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipelines.config import PrepareConfig
from pipelines.dataset import Dataset, Split, group_of, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.prepare import prepare
from tests.pipelines.layout import write_source


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
    return [
        split.read(group, ["key"])["key"][int(row)].as_py()
        for group in range(split.num_groups)
        for row in split.rows(group)
    ]


# ---------------------------------------------------------------- shares


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shares_cover_each_row_exactly_once(dataset: Dataset, ranks: int) -> None:
    split = dataset.split("val")
    found = [[key for key, _, _ in split.share(rank, ranks)] for rank in range(ranks)]
    assert sorted(key for share in found for key in share) == sorted(keys_of(split))
    assert max(map(len, found)) - min(map(len, found)) <= 1


def test_a_row_group_is_read_by_one_rank_but_at_the_borders(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    split, reads = dataset.split("train"), []
    read = split.read
    monkeypatch.setattr(split, "read", lambda group, *columns: reads.append(group) or read(group, *columns))
    for rank in range(3):
        list(split.share(rank, 3))
    assert split.num_groups > 3
    assert set(reads) == set(range(split.num_groups))
    assert len(reads) <= split.num_groups + 2


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
