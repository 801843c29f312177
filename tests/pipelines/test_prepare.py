"""Folders become shards unchanged, and whatever is wrong with a pair is named with the file and the reason."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import PrepareConfig, Recipe
from pipelines.dataset import SCHEMA, Dataset, open_dataset
from pipelines.errors import RepsepError, StorageError, UsageError
from pipelines.layouts import read_classes
from pipelines.pairs import find_pairs
from pipelines.prepare import prepare, prepared_dataset
from pipelines.stage import Receipt
from pipelines.storage import Folder
from repsep_model.images import decode_mask
from tests.pipelines.layout import (
    CLASSES,
    HEIGHT,
    WIDTH,
    Bytes,
    encoded,
    ids,
    picture,
    rejects_of,
    rows_of,
    write_classes,
    write_pair,
    write_source,
)

GOOD = [f"train/{i}" for i in range(4)] + ["val/0", "val/1"]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Six good pairs."""
    return write_source(tmp_path / "source", GOOD)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Receipt]:
    def call(source: Path | str, workspace: str = "work", **settings: Any) -> Receipt:
        return prepare(str(tmp_path / workspace), PrepareConfig(source=str(source), **settings))

    return call


def dataset_of(receipt: Receipt) -> Dataset:
    return open_dataset(receipt.results["dataset"])


# ---------------------------------------------------------------- what passes


def test_every_pair_is_in_a_shard_with_the_same_bytes(scenes: Path, run: Callable[..., Receipt]) -> None:
    dataset = dataset_of(run(scenes))
    for split, count in (("train", 24), ("val", 8)):
        rows = rows_of(dataset, split)
        assert [row["key"] for row in rows] == [f"{split}/{i:04d}.jpg" for i in range(count)]
        for row in rows:
            mask = (scenes / "masks" / row["key"]).with_suffix(".png").read_bytes()
            labels = decode_mask(mask)
            assert row["image"] == (scenes / "images" / row["key"]).read_bytes()
            assert row["mask"] == mask
            assert (row["height"], row["width"]) == labels.shape == (96, 128)
            assert row["classes"] == sorted(set(np.unique(labels).tolist()) - {255})


def test_the_manifest_describes_what_is_in_the_shards(scenes: Path, run: Callable[..., Receipt]) -> None:
    receipt = run(scenes)
    dataset = dataset_of(receipt)
    assert receipt.results["images"] == {"train": 24, "val": 8}
    assert dataset.class_names == ["sky", "building", "road", "vegetation", "pole", "vehicle", "sign"]
    assert dataset.classes_file == json.loads((scenes / "classes.json").read_text())
    masks = [decode_mask(row["mask"]) for split in ("train", "val") for row in rows_of(dataset, split)]
    counts = np.sum([np.bincount(mask.ravel(), minlength=256)[:7] for mask in masks], axis=0)
    assert dataset.manifest["pixels"] == counts.tolist()
    for split in dataset.manifest["splits"].values():
        assert all(dataset.folder.sha256(shard["file"]) == shard["sha256"] for shard in split["shards"])
    shards = {f"dataset/{s['file']}" for split in dataset.manifest["splits"].values() for s in split["shards"]}
    assert set(receipt.outputs) == shards | {"dataset/dataset.json", "rejects.parquet"}


def test_the_ids_are_counted_by_split_and_told(
    source: Path, run: Callable[..., Receipt], capsys: pytest.CaptureFixture[str]
) -> None:
    for number, key in enumerate(GOOD):
        labels = np.full((HEIGHT, WIDTH), 255, np.uint8)
        labels[: HEIGHT // 2] = number % 2
        write_pair(source, key, number, mask=encoded(labels))
    receipt = run(source)
    half = HEIGHT * WIDTH // 2
    assert receipt.results["pixels"] == {
        "train": {"sky": 2 * half, "road": 2 * half, "tree": 0},
        "val": {"sky": half, "road": half, "tree": 0},
    }
    assert receipt.results["ignored"] == {"train": 4 * half, "val": 2 * half}
    manifest = dataset_of(receipt).manifest
    assert manifest["splits"]["val"]["pixels"] == [half, half, 0]
    assert manifest["splits"]["val"]["ignored"] == manifest["ignored"] // 3 == 2 * half
    assert "prepare: val: sky 25.0 %, road 25.0 %, ignored 50.0 %\n" in capsys.readouterr().err


def test_shards_and_row_groups_have_the_sizes_asked_for(scenes: Path, run: Callable[..., Receipt]) -> None:
    dataset = dataset_of(run(scenes, shard_rows=10, row_group_rows=4))
    shards = dataset.manifest["splits"]["train"]["shards"]
    assert [s["file"] for s in shards] == [f"train/part-{i:05d}.parquet" for i in range(3)]
    assert [(s["rows"], s["row_groups"]) for s in shards] == [(10, [4, 4, 2]), (10, [4, 4, 2]), (4, [4])]
    for shard in shards:
        with dataset.folder.open(shard["file"]) as handle:
            file = pq.ParquetFile(handle)
            assert file.schema_arrow == SCHEMA
            groups = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
        assert groups == shard["row_groups"]


def test_two_preparations_of_the_same_files_have_the_same_digest(
    source: Path, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "elsewhere" / "copy")
    first, second = dataset_of(run(source, "a")), dataset_of(run(copy, "b"))
    assert first.folder.uri != second.folder.uri
    assert first.digest == second.digest
    assert first.split_digest("val") == second.split_digest("val")


def test_another_mask_or_class_name_gives_another_digest(
    source: Path, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    digests = [dataset_of(run(source, "a")).digest]
    write_pair(source, "train/0", 0, mask=encoded(ids(77)))
    digests.append(dataset_of(run(source, "b")).digest)
    write_classes(source, [*CLASSES[:2], CLASSES[2] | {"name": "shrub"}])
    digests.append(dataset_of(run(source, "c")).digest)
    assert len(set(digests)) == 3


def test_an_unchanged_source_is_not_prepared_again(source: Path, run: Callable[..., Receipt]) -> None:
    assert [run(source).cached, run(source).cached] == [False, True]
    write_pair(source, "train/9", 9)
    again = run(source)
    assert (again.cached, again.results["images"]["train"]) == (False, 5)


def test_a_source_on_object_storage_gives_the_same_data_set(source: Path, s3: str, run: Callable[..., Receipt]) -> None:
    Folder(f"s3://{s3}/in").upload(source)
    remote = prepare(f"s3://{s3}/space", PrepareConfig(source=f"s3://{s3}/in"))
    there = dataset_of(remote)
    assert there.folder.uri.startswith(f"s3://{s3}/space/prepare/")
    assert there.digest == dataset_of(run(source)).digest
    assert len(rows_of(there, "train")) == 4
    assert prepare(f"s3://{s3}/space", PrepareConfig(source=f"s3://{s3}/in")).cached


def test_without_a_source_the_generated_scenes_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipelines.scenes import write_scenes

    monkeypatch.setenv("REPSEP_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(
        "pipelines.prepare.write_scenes",
        lambda folder, seed: write_scenes(folder, train=2, val=1, unlabelled=0, size=(48, 64), seed=seed),
    )
    receipt = prepare(str(tmp_path / "work"), PrepareConfig(seed=3))
    assert receipt.results["images"] == {"train": 2, "val": 1}
    assert (tmp_path / "home" / "scenes-3" / "classes.json").is_file()


# ---------------------------------------------------------------- splits


def test_without_split_folders_groups_are_split_and_stay_together(tmp_path: Path, run: Callable[..., Receipt]) -> None:
    keys = [f"city{c}/{i}" for c in range(20) for i in range(2)]
    source = write_source(tmp_path / "source", keys)
    dataset = dataset_of(run(source))
    found = {split: [row["key"] for row in rows_of(dataset, split)] for split in ("train", "val")}
    assert sorted(found["train"] + found["val"]) == sorted(f"{key}.jpg" for key in keys)
    groups = {split: {key.partition("/")[0] for key in keys} for split, keys in found.items()}
    assert not groups["train"] & groups["val"]
    assert 1 <= len(groups["val"]) <= 9, "of 20 groups about a fifth"
    assert dataset_of(run(source, "again")).digest == dataset.digest


def test_a_split_is_a_function_of_the_seed_and_the_fraction() -> None:
    keys = [f"{part}/city{c}/0.{end}" for c in range(200) for part, end in (("images", "jpg"), ("masks", "png"))]

    def val(**settings: Any) -> frozenset[str]:
        pairs, _ = find_pairs("source", keys, PrepareConfig(**settings))
        return frozenset(p.image for p in pairs if p.split == "val")

    assert val() == val()
    assert val(seed=1) != val()
    assert val(val_fraction=0.1) < val(val_fraction=0.2) < val(val_fraction=0.6)
    assert 20 < len(val(val_fraction=0.2)) < 60


def test_a_pattern_names_what_must_not_be_split() -> None:
    stems = [f"{video}_{frame}" for video in range(30) for frame in range(4)]
    keys = [f"{part}/{stem}.png" for part in ("images", "masks") for stem in stems]
    pairs, _ = find_pairs("source", keys, PrepareConfig(group_pattern=r"^(\d+)_", val_fraction=0.5))
    sides: dict[str, set[str]] = {}
    for pair in pairs:
        sides.setdefault(pair.image.removeprefix("images/").partition("_")[0], set()).add(pair.split)
    assert all(len(found) == 1 for found in sides.values())
    assert {split for found in sides.values() for split in found} == {"train", "val"}


def test_an_image_beside_the_split_folders_is_not_guessed_at(source: Path, run: Callable[..., Receipt]) -> None:
    write_pair(source, "extra", 50)
    with pytest.raises(UsageError, match=r"images/extra\.jpg is not; move all below images/train"):
        run(source)


@pytest.mark.parametrize(("keys", "missing"), [(["train/0", "train/1"], "val"), (["val/0", "test/1"], "train")])
def test_both_train_and_val_are_needed(
    tmp_path: Path, run: Callable[..., Receipt], keys: list[str], missing: str
) -> None:
    with pytest.raises(UsageError, match=f"gives no {missing} images"):
        run(write_source(tmp_path / "source", keys))


def test_a_split_whose_every_pair_is_rejected_is_missing(source: Path, run: Callable[..., Receipt]) -> None:
    for key in ("val/0", "val/1"):
        (source / "masks" / f"{key}.png").unlink()
    with pytest.raises(UsageError, match="gives no val images"):
        run(source, max_reject_rate=1)


# ---------------------------------------------------------------- masks that are brought into form


def test_a_mask_in_the_classes_colours_is_converted(source: Path, run: Callable[..., Receipt]) -> None:
    labels = ids(0)
    table = np.zeros((256, 3), np.uint8)  # what is ignored is black
    table[:3] = [c["color"] for c in CLASSES]
    write_pair(source, "train/0", 0, mask=encoded(table[labels]))
    plain = dataset_of(run(source))
    row = rows_of(plain, "train")[0]
    assert row["key"] == "train/0.jpg"
    assert np.array_equal(decode_mask(row["mask"]), labels)
    assert row["classes"] == sorted(set(np.unique(labels).tolist()) - {255})


def indexed(indices: Bytes, palette: dict[int, Sequence[int]]) -> bytes:
    """An indexed PNG; colours that `palette` does not name are black."""
    image = Image.frombytes("P", (indices.shape[1], indices.shape[0]), indices.tobytes())
    image.putpalette([channel for i in range(256) for channel in palette.get(i, (0, 0, 0))])
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


COLOURS = [c["color"] for c in CLASSES]


def test_a_palette_that_numbers_the_colours_of_the_classes_otherwise_is_converted(
    source: Path, run: Callable[..., Receipt]
) -> None:
    labels = ids(0)
    order = np.zeros(256, np.uint8)  # an editor's: tree first, then what is black, sky, road
    order[[2, 255, 0, 1]] = [0, 1, 2, 3]
    palette = {0: COLOURS[2], 2: COLOURS[0], 3: COLOURS[1]}
    write_pair(source, "train/0", 0, mask=indexed(order[labels], palette))
    receipt = run(source)
    row = rows_of(dataset_of(receipt), "train")[0]
    assert np.array_equal(decode_mask(row["mask"]), labels)
    assert row["classes"] == sorted(set(np.unique(labels).tolist()) - {255})
    assert receipt.results["warnings"] == [
        "masks painted in the classes' colours, converted to ids: 1, the first is train/0.jpg"
    ]


@pytest.mark.parametrize(
    "palette",
    [
        dict(enumerate(COLOURS)),
        {},
        {0: (128, 0, 0), 1: (0, 128, 0), 2: (128, 128, 0), 255: (224, 224, 192)},
        {1: COLOURS[1], 2: COLOURS[2]},
        {0: COLOURS[0], 1: COLOURS[0], 2: (1, 2, 3)},
    ],
    ids=["the classes' own", "black", "another list's", "first left black", "one that is no class's"],
)
def test_the_indices_of_other_palettes_are_the_ids(
    source: Path, run: Callable[..., Receipt], palette: dict[int, Sequence[int]]
) -> None:
    mask = indexed(ids(0), palette)
    write_pair(source, "train/0", 0, mask=mask)
    receipt = run(source)
    assert rows_of(dataset_of(receipt), "train")[0]["mask"] == mask
    assert not receipt.results["warnings"]


@pytest.mark.parametrize("kind", ["TIFF", "BMP"])
def test_a_mask_of_another_format_becomes_a_png_of_the_same_ids(
    source: Path, run: Callable[..., Receipt], kind: str
) -> None:
    (source / "masks/train/0.png").unlink()
    (source / f"masks/train/0.{kind.lower()}").write_bytes(encoded(ids(0), kind))
    row = rows_of(dataset_of(run(source)), "train")[0]
    assert row["mask"].startswith(b"\x89PNG")
    assert np.array_equal(decode_mask(row["mask"]), ids(0))


def test_an_image_is_rotated_as_its_mask_is(source: Path, run: Callable[..., Receipt]) -> None:
    upright = ids(0, WIDTH, HEIGHT)  # the photo lies on its side, its mask stands
    write_pair(source, "train/0", 0, image=rotated(picture(0)), mask=encoded(upright))
    row = rows_of(dataset_of(run(source)), "train")[0]
    assert (row["height"], row["width"]) == (WIDTH, HEIGHT)


# ---------------------------------------------------------------- rejects


def rotated(pixels: Bytes, orientation: int = 6) -> bytes:
    """A JPEG that says: turn me, by default by a quarter."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(pixels, "JPEG", exif=exif.tobytes())


def test_an_exif_orientation_that_the_size_cannot_confirm_is_a_warning(
    source: Path, run: Callable[..., Receipt]
) -> None:
    square = HEIGHT
    write_pair(source, "train/0", 0, image=rotated(picture(0, square, square)), mask=encoded(ids(0, square, square)))
    write_pair(source, "train/1", 1, image=rotated(picture(1), 3))
    write_pair(source, "train/2", 2, image=rotated(picture(2)), mask=encoded(ids(2, WIDTH, HEIGHT)))
    receipt = run(source)
    assert receipt.results["rejected"] == 0
    assert receipt.results["warnings"] == [
        "images with an EXIF orientation that no size confirms, their masks must fit the upright image: 2, "
        "the first is train/0.jpg"
    ]


def with_id(value: int) -> Bytes:
    labels = ids(0)
    labels[3:6, 4:8] = value
    return labels


def from_one() -> Bytes:
    labels = ids(0)
    labels[labels != 255] += 1
    return labels


def cut(data: bytes) -> bytes:
    return data[: len(data) * 4 // 5]


def painted(colour: tuple[int, int, int]) -> bytes:
    pixels = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    pixels[:] = CLASSES[0]["color"]
    pixels[5, 5] = colour
    return encoded(pixels)


WRONG: dict[str, tuple[dict[str, Any], str, str]] = {
    "no mask": ({"mask": None}, "images/train/0.jpg", "it has no mask (the same path under masks/, .png)"),
    "truncated image": ({"image": cut(encoded(picture(0), "JPEG"))}, "images/train/0.jpg", "JPEG cannot be decoded"),
    "empty image": ({"image": b""}, "images/train/0.jpg", "the object is empty"),
    "a page instead of an image": ({"image": b"<html>404</html>"}, "images/train/0.jpg", "not an image"),
    "unreadable mask": ({"mask": b"not a picture"}, "masks/train/0.png", "not an image that Pillow can read"),
    "truncated mask": ({"mask": encoded(ids(0))[:60]}, "masks/train/0.png", "cannot be decoded"),
    "16-bit mask": (
        {"mask": encoded(ids(0).astype(np.uint16) * 200)},  # type: ignore[arg-type]
        "masks/train/0.png",
        "one 8-bit channel of class ids, this one is I;16",
    ),
    "sizes differ": (
        {"mask": encoded(ids(0, HEIGHT, WIDTH + 1))},
        "masks/train/0.png",
        f"the mask is {WIDTH + 1} x {HEIGHT}, the image {WIDTH} x {HEIGHT}",
    ),
    "rotated image, mask not": (
        {"image": rotated(picture(0)), "mask": encoded(ids(0))},
        "masks/train/0.png",
        f"the mask is {WIDTH} x {HEIGHT}, the image {HEIGHT} x {WIDTH}; the image carries an EXIF rotation",
    ),
    "id out of range": (
        {"mask": encoded(with_id(17))},
        "masks/train/0.png",
        "the mask has ids out of range: 17; correct the mask, or add the classes to classes.json (ids 0 to 2 and 255",
    ),
    "ids from 1": (
        {"mask": encoded(from_one())},
        "masks/train/0.png",
        "the mask has ids out of range: 3; the ids seem to start at 1: subtract 1, with 0 becoming 255",
    ),
    "ids from 1, 0 unlabelled": (
        {"mask": encoded(with_id(3))},
        "masks/train/0.png",
        "the mask has ids out of range: 3; if 0 means unlabelled, the ids start at 1: subtract 1, with 0 becoming 255",
    ),
    "unknown colour": (
        {"mask": painted((1, 2, 3))},
        "masks/train/0.png",
        "a colour mask with a colour that no class has: [1, 2, 3]",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_pair_is_rejected_by_name_with_the_reason_and_the_rest_is_kept(
    source: Path, run: Callable[..., Receipt], tmp_path: Path, name: str
) -> None:
    files, key, reason = WRONG[name]
    (source / "masks/train/0.png").unlink()
    write_pair(source, "train/0", 0, **files)
    receipt = run(source, max_reject_rate=0.2)
    rejects = rejects_of(tmp_path / "work")
    assert list(rejects) == [key]
    assert reason in rejects[key]
    assert receipt.results["rejected"] == 1
    assert [row["key"] for row in rows_of(dataset_of(receipt), "train")] == [f"train/{i}.jpg" for i in (1, 2, 3)]


def test_a_mask_on_its_side_is_not_blamed_on_exif(source: Path, run: Callable[..., Receipt], tmp_path: Path) -> None:
    write_pair(source, "train/0", 0, mask=encoded(ids(0, WIDTH, HEIGHT)))
    run(source, max_reject_rate=0.2)
    assert rejects_of(tmp_path / "work")["masks/train/0.png"].endswith(f"the image {WIDTH} x {HEIGHT}")


def test_the_same_image_in_two_splits_is_taken_once(source: Path, run: Callable[..., Receipt], tmp_path: Path) -> None:
    shutil.copy(source / "images/train/2.jpg", source / "images/val/1.jpg")
    receipt = run(source, max_reject_rate=0.2)
    assert rejects_of(tmp_path / "work") == {"images/val/1.jpg": "the same bytes are in split train: train/2.jpg"}
    assert receipt.results["images"] == {"train": 4, "val": 1}


def test_the_same_image_twice_in_one_split_is_no_reason_to_reject(source: Path, run: Callable[..., Receipt]) -> None:
    shutil.copy(source / "images/train/2.jpg", source / "images/train/1.jpg")
    assert run(source).results["rejected"] == 0


def test_a_mask_without_an_image_is_rejected_by_name(source: Path, run: Callable[..., Receipt], tmp_path: Path) -> None:
    (source / "images/train/0.jpg").unlink()
    receipt = run(source, max_reject_rate=0.2)
    reason = "no image belongs to the mask (the same path under images/)"
    assert rejects_of(tmp_path / "work") == {"masks/train/0.png": reason}
    assert receipt.results["images"] == {"train": 3, "val": 2}
    with pytest.raises(RepsepError, match="1 of 6 pairs were rejected"):
        run(source, max_reject_rate=0.16)


def test_images_that_share_a_mask_are_rejected_with_each_other(
    source: Path, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    (source / "images/train/0.png").write_bytes(encoded(picture(50)))
    receipt = run(source, max_reject_rate=0.3)
    reason = "its mask could also be that of another image, rename one: images/train/0."
    assert rejects_of(tmp_path / "work") == {
        "images/train/0.jpg": f"{reason}png",
        "images/train/0.png": f"{reason}jpg",
    }
    assert receipt.results["reject_reasons"] == {reason.partition(":")[0]: 2}
    assert [row["key"] for row in rows_of(dataset_of(receipt), "train")] == [f"train/{i}.jpg" for i in (1, 2, 3)]


def test_an_image_with_two_masks_is_rejected_with_both(
    source: Path, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    (source / "masks/train/0.tif").write_bytes(encoded(ids(60), "TIFF"))
    run(source, max_reject_rate=0.2)
    reason = "it has several masks, keep one: masks/train/0.png, masks/train/0.tif"
    assert rejects_of(tmp_path / "work") == {"images/train/0.jpg": reason}


def test_a_colour_of_two_classes_converts_no_mask(source: Path, run: Callable[..., Receipt], tmp_path: Path) -> None:
    write_classes(source, [*CLASSES[:2], CLASSES[2] | {"color": COLOURS[1]}])
    write_pair(source, "train/0", 0, mask=encoded(np.array([*COLOURS[:2], COLOURS[1]], np.uint8)[ids(0) % 3]))
    run(source, max_reject_rate=0.2)
    reason = f"a colour mask with a colour that several classes have: {COLOURS[1]}"
    assert rejects_of(tmp_path / "work") == {"masks/train/0.png": reason}


def test_too_many_rejects_stop_the_stage_and_are_all_listed(
    source: Path, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    (source / "masks/train/0.png").unlink()
    write_pair(source, "val/0", 0, mask=encoded(with_id(17)))
    with pytest.raises(RepsepError) as caught:
        run(source, max_reject_rate=0.3)
    said = str(caught.value)
    assert "2 of 6 pairs were rejected, more than prepare.max_reject_rate=0.3 allows" in said
    assert f"{source}/images/train/0.jpg: it has no mask" in said
    assert "ids out of range: 17; correct the mask, or add the classes" in said
    assert set(rejects_of(tmp_path / "work")) == {"images/train/0.jpg", "masks/val/0.png"}
    assert not list((tmp_path / "work").rglob("_SUCCESS.json"))
    assert run(source, max_reject_rate=0.34).results["rejected"] == 2


# ---------------------------------------------------------------- warnings


def fill(source: Path, **values: Sequence[int]) -> None:
    """Masks of the source become halves and quarters of the values that are given for their split."""
    for number, key in enumerate(GOOD):
        chosen = np.array(values[key.partition("/")[0]], np.uint8)
        write_pair(
            source, key, number, mask=encoded(chosen[np.arange(HEIGHT * WIDTH) % len(chosen)].reshape(HEIGHT, -1))
        )


@pytest.mark.parametrize(
    ("values", "names", "said"),
    [
        ({"train": (0, 1, 2), "val": (0, 1)}, None, []),
        ({"train": (0, 1), "val": (0,)}, None, ["classes that never occur: tree"]),
        ({"train": (0, 1), "val": (0, 2)}, None, ["classes that occur in val but never in train: tree"]),
        (
            {"train": (0, 1, 2), "val": (0,)},
            {0: "Unlabelled"},
            ["id 0 is the class 'Unlabelled', trained and counted as any other; write 255 to ignore it"],
        ),
        ({"train": (0, 1, 2), "val": (0,)}, {0: "background"}, []),
        (
            {"train": (1, 2), "val": (1, 2)},
            None,
            [
                "id 0 (sky) never occurs: if the masks count from 1, every label is one too high",
                "classes that never occur: sky",
            ],
        ),
        (
            {"train": (0, 255), "val": (0, 255)},
            None,
            [
                "the masks hold 0 and 255 only: 255 is ignored; if it means a class here, write its id instead",
                "classes that never occur: road, tree",
            ],
        ),
        (
            {"train": (0, 1, 2), "val": (255,)},
            None,
            ["masks without a labelled pixel: 2, the first is val/0.jpg"],
        ),
    ],
)
def test_what_is_suspicious_is_a_warning(
    source: Path,
    run: Callable[..., Receipt],
    capsys: pytest.CaptureFixture[str],
    values: dict[str, Sequence[int]],
    names: dict[int, str] | None,
    said: list[str],
) -> None:
    write_classes(source, [c | {"name": (names or {}).get(c["id"], c["name"])} for c in CLASSES])
    fill(source, **values)
    assert run(source).results["warnings"] == said
    told = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert told == [f"prepare: warning: {line}" for line in said]


# ---------------------------------------------------------------- classes and sources


def many(count: int) -> list[dict[str, Any]]:
    return [{"id": i, "name": f"c{i}", "color": [i % 256, 0, 0]} for i in range(count)]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "has no classes.json; it lists the classes as"),
        ("{not json", "cannot be understood: JSONDecodeError"),
        ('{"labels": []}', "cannot be understood: KeyError 'classes'"),
        ("[1, 2]", "cannot be understood: TypeError"),
        ({"classes": [{"id": 0, "name": "sky"}]}, "cannot be understood: KeyError 'color'"),
        ({"classes": [{"id": "x", "name": "sky", "color": [0, 0, 0]}]}, "cannot be understood: ValueError"),
        ({"classes": []}, "has 0 classes; 1 to 255 are possible"),
        ({"classes": many(256)}, "has 256 classes; 1 to 255 are possible"),
        ({"classes": [CLASSES[0], CLASSES[2]]}, "ids must be 0 to 1 in order; 255 is what is ignored"),
        ({"classes": CLASSES[::-1]}, "ids must be 0 to 2 in order"),
        ({"classes": [CLASSES[0], CLASSES[0] | {"id": 1}]}, "two classes are called 'sky'; results go by name"),
        ({"classes": [CLASSES[0] | {"color": [0, 0]}]}, "every colour needs three values in 0..255"),
        ({"classes": [CLASSES[0] | {"color": [0, 0, 256]}]}, "every colour needs three values in 0..255"),
    ],
    ids=lambda value: None if isinstance(value, str) else "-",
)
def test_classes_that_cannot_be_used_are_refused_with_the_file(
    source: Path, run: Callable[..., Receipt], content: Any, said: str
) -> None:
    file = source / "classes.json"
    file.unlink()
    if content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UsageError) as caught:
        run(source)
    assert said in str(caught.value)
    assert str(source) in str(caught.value)


def test_255_classes_are_possible(source: Path) -> None:
    write_classes(source, many(255))
    found = read_classes(Folder(str(source)))
    assert len(found["classes"]) == 255
    assert found["ignore_index"] == 255


def test_a_source_without_images_is_told_the_layout(tmp_path: Path, run: Callable[..., Receipt]) -> None:
    write_classes(tmp_path / "source")
    (tmp_path / "source" / "pictures").mkdir()
    (tmp_path / "source" / "pictures" / "0.jpg").write_bytes(encoded(picture(0), "JPEG"))
    with pytest.raises(UsageError, match="has no images under images/; the layout is images/<split>"):
        run(tmp_path / "source")


def test_what_no_layout_names_may_change_without_a_new_data_set(source: Path, run: Callable[..., Receipt]) -> None:
    digest = run(source).digest
    (source / "README.md").write_text("notes")
    again = run(source)
    assert (again.cached, again.digest) == (True, digest)


def test_a_source_that_is_not_there_is_named(tmp_path: Path, run: Callable[..., Receipt]) -> None:
    with pytest.raises(StorageError, match="nowhere: there is nothing there"):
        run(tmp_path / "nowhere")


# ---------------------------------------------------------------- whose data


@pytest.mark.parametrize("stage", ["train", "evaluate", "sweep"])
def test_a_stage_refuses_data_of_another_source_than_its_recipes(
    stage: str, source: Path, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    run(source)
    recipe = Recipe.model_validate({"prepare": {"source": str(tmp_path / "mine")}})
    module = importlib.import_module(f"pipelines.{stage}")
    said = rf"is of {source}, but the recipe's prepare.source is {tmp_path}/mine; run `repsep prepare` with this recipe"
    with pytest.raises(UsageError, match=said):
        getattr(module, stage)(str(tmp_path / "work"), recipe)
    assert [path.name for path in (tmp_path / "work").iterdir()] == ["prepare"]


def test_data_that_a_recipe_names_or_leaves_open_are_taken(
    source: Path, run: Callable[..., Receipt], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri, work = run(source).results["dataset"], str(tmp_path / "work")
    monkeypatch.chdir(tmp_path)
    for given in (None, str(source), f"{source}/", "source"):
        recipe = Recipe.model_validate({"prepare": {"source": given}})
        assert prepared_dataset(work, recipe, None).folder.uri == uri
    assert prepared_dataset(work, Recipe.model_validate({"prepare": {"source": "another"}}), uri).folder.uri == uri
