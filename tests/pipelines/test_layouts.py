"""Public data sets as they come: written here in their own layout, prepared, and compared pixel by pixel.

What the ids mean is said here once more, by other means than in the package.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.io import savemat

from pipelines.config import PrepareConfig, load_recipe
from pipelines.dataset import Dataset, group_of, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.label_maps import (
    ADE20K,
    CITYSCAPES,
    COCO_STUFF_10K,
    COCO_STUFF_164K,
    PASCAL_CONTEXT,
    PASCAL_CONTEXT_60,
    LabelMap,
    distinct_colours,
)
from pipelines.native_layouts import NATIVE
from pipelines.prepare import prepare
from pipelines.stage import Receipt
from repsep_model.images import decode_mask
from tests.pipelines.layout import encoded, picture, rejects_of, rows_of

HEIGHT, WIDTH = 16, 24

Ids = NDArray[np.int64]


# ---------------------------------------------------------------- what the ids mean


def less_one(raw: Ids) -> Ids:
    """0 is not labelled, 1 is the first class."""
    return np.where((raw == 0) | (raw == 255), 255, raw - 1)


# The 19 of 34, in the order of the train ids.
CITYSCAPES_TRAINED = [7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33]
COCO_ABSENT = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]


def cityscapes(raw: Ids) -> Ids:
    found = np.full(raw.shape, 255)
    for i, source_id in enumerate(CITYSCAPES_TRAINED):
        found[raw == source_id] = i
    return found


def coco_10k(raw: Ids) -> Ids:
    skipped = sum((raw > absent).astype(int) for absent in COCO_ABSENT)
    return np.where((raw == 0) | (raw == 255), 255, raw - 1 - skipped)


def coco_164k(raw: Ids) -> Ids:
    return np.where(raw == 255, 255, coco_10k(raw + 1))


def matlab(raw: Ids, **more: Any) -> bytes:
    out = io.BytesIO()
    savemat(out, {"S": raw.astype(np.uint8), "captions": np.array(["a cat"], object)} | more, do_compression=True)
    return out.getvalue()


def png(raw: Ids) -> bytes:
    return encoded(raw.astype(np.uint8))


# ---------------------------------------------------------------- how the files lie


@dataclass(frozen=True)
class Case:
    """A layout: its templates, stems by split, every id that its masks may hold, one that they may not."""

    layout: str
    image: str
    mask: str
    stems: dict[str, Sequence[str]]
    legal: Sequence[int]
    wrong: int
    train_ids: Callable[[Ids], Ids]
    classes: int
    write_mask: Callable[[Ids], bytes] = png
    lists: str | None = None
    theirs: tuple[str, str] = ("train", "val")
    settings: tuple[tuple[str, Any], ...] = ()

    def key(self, template: str, split: str, stem: str) -> str:
        theirs = dict(zip(("train", "val"), self.theirs, strict=True))
        return template.format(split=theirs[split], stem=stem)

    def raw(self, number: int) -> Ids:
        """(H, W) holding every legal id."""
        return np.resize(np.roll(np.array(self.legal), number), (HEIGHT, WIDTH))

    def places(self) -> list[tuple[str, str]]:
        return [(split, stem) for split, stems in self.stems.items() for stem in stems]

    def write(self, folder: Path) -> Path:
        for number, (split, stem) in enumerate(self.places()):
            pixels = picture(number, HEIGHT, WIDTH)
            kind = "JPEG" if self.image.endswith(".jpg") else "PNG"
            put(folder / self.key(self.image, split, stem), encoded(pixels, kind))
            put(folder / self.key(self.mask, split, stem), self.write_mask(self.raw(number)))
        if self.lists is not None:
            for split, stems in self.stems.items():
                put(folder / self.key(self.lists, split, ""), "".join(f"{stem}\n" for stem in stems).encode())
        return folder


def put(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


CONTEXT = Case(
    "pascal_context",
    "JPEGImages/{stem}.jpg",
    "SegmentationClassContext/{stem}.png",
    {"train": [f"2008_00000{i}" for i in range(5)], "val": ["2010_000001", "2010_000002"]},
    legal=[*range(60), 255],
    wrong=60,
    train_ids=less_one,
    classes=59,
    lists="ImageSets/SegmentationContext/{split}.txt",
)
COCO_STEMS = {"train": [f"{i:012d}" for i in (9, 25, 30, 34, 36)], "val": ["000000000139", "000000000285"]}
COCO = Case(
    "coco_stuff_164k",
    "images/{split}/{stem}.jpg",
    "annotations/{split}/{stem}.png",
    COCO_STEMS,
    legal=[*(i for i in range(182) if i + 1 not in COCO_ABSENT), 255],
    wrong=11,
    train_ids=coco_164k,
    classes=171,
    theirs=("train2017", "val2017"),
)
CASES = {
    "ade20k": Case(
        "ade20k",
        "images/{split}/{stem}.jpg",
        "annotations/{split}/{stem}.png",
        {"train": [f"ADE_train_0000000{i}" for i in range(1, 6)], "val": ["ADE_val_00000001", "ADE_val_00000002"]},
        legal=[*range(151), 255],
        wrong=151,
        train_ids=less_one,
        classes=150,
        theirs=("training", "validation"),
    ),
    "cityscapes": Case(
        "cityscapes",
        "leftImg8bit/{split}/{stem}_leftImg8bit.png",
        "gtFine/{split}/{stem}_gtFine_labelIds.png",
        {
            "train": [f"{city}/{city}_000000_000019" for city in ("aachen", "bochum", "bremen", "ulm", "zurich")],
            "val": ["munster/munster_000173_000019", "munster/munster_000173_000029"],
        },
        legal=[*range(34), 255],
        wrong=34,
        train_ids=cityscapes,
        classes=19,
    ),
    "pascal_context": CONTEXT,
    "pascal_context with background": Case(
        **vars(CONTEXT) | {"train_ids": lambda raw: raw, "classes": 60, "settings": (("background", True),)}
    ),
    "coco_stuff_10k": Case(
        "coco_stuff_10k",
        "images/{stem}.jpg",
        "annotations/{stem}.mat",
        {
            "train": [f"COCO_train2014_0000000000{i}" for i in (77, 78, 81, 86, 89)],
            "val": ["COCO_train2014_000000000064", "COCO_train2014_000000000092"],
        },
        legal=[0, *(i for i in range(1, 183) if i not in COCO_ABSENT)],
        wrong=12,
        train_ids=coco_10k,
        classes=171,
        write_mask=matlab,
        lists="imageLists/{split}.txt",
        theirs=("train", "test"),
    ),
    "coco_stuff_164k": COCO,
    "coco_stuff_164k as it unpacks": Case(
        **vars(COCO) | {"image": "{split}/{stem}.jpg", "mask": "stuffthingmaps/{split}/{stem}.png"}
    ),
}


@pytest.fixture(params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., Receipt]:
    def call(case: Case, source: Path, **settings: Any) -> Receipt:
        config = PrepareConfig(source=str(source), **{"layout": case.layout, **dict(case.settings), **settings})
        return prepare(str(tmp_path / "work"), config)

    return call


def dataset_of(receipt: Receipt) -> Dataset:
    return open_dataset(receipt.results["dataset"])


# ---------------------------------------------------------------- what passes


def test_every_pixel_becomes_what_the_label_map_says(case: Case, run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = case.write(tmp_path / "source")
    receipt = run(case, source)
    dataset = dataset_of(receipt)
    assert (receipt.results["rejected"], receipt.results["warnings"]) == (0, [])
    assert receipt.results["images"] == {"train": 5, "val": 2}
    assert dataset.num_classes == case.classes
    numbers = {place: number for number, place in enumerate(case.places())}
    for split, stems in case.stems.items():
        rows = rows_of(dataset, split)
        assert [row["key"] for row in rows] == [case.key(case.image, split, stem) for stem in stems]
        for row, stem in zip(rows, stems, strict=True):
            expected = case.train_ids(case.raw(numbers[split, stem]))
            assert np.array_equal(decode_mask(row["mask"]), expected)
            assert row["image"] == (source / row["key"]).read_bytes()
            assert row["classes"] == list(range(case.classes)), "every class is in every mask"


def test_a_class_keeps_the_id_that_the_benchmark_knows_it_by(
    case: Case, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    classes = dataset_of(run(case, case.write(tmp_path / "source"))).classes_file["classes"]
    assert [c["id"] for c in classes] == list(range(case.classes))
    assert case.train_ids(np.array([c["source_id"] for c in classes])).tolist() == [c["id"] for c in classes]


def test_each_image_or_city_of_train_can_be_held_out(case: Case, run: Callable[..., Receipt], tmp_path: Path) -> None:
    dataset = dataset_of(run(case, case.write(tmp_path / "source")))
    keys = [row["key"] for row in rows_of(dataset, "train")]
    assert len({group_of(key, dataset.manifest["group_pattern"]) for key in keys}) == 5


def test_what_the_layout_does_not_name_is_neither_read_nor_missed(
    case: Case, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    source = case.write(tmp_path / "source")
    before = run(case, source)
    for key in (
        "objectInfo150.txt",
        "images/extra/ADE_train_1.jpg",
        "leftImg8bit/test/berlin/berlin_000000_000019_leftImg8bit.png",
        "gtFine/test/berlin/berlin_000000_000019_gtFine_labelIds.png",
        "gtFine/train/aachen/aachen_000000_000019_gtFine_labelTrainIds.png",
        "gtFine/train/aachen/aachen_000000_000019_gtFine_color.png",
        "SegmentationClass/2008_000001.png",
        "annotations/train2017/000000000009_labelTrainIds.png",
        "imageLists/all.txt",
        "classes.json",
    ):
        put(source / key, b"not to be read")
    assert run(case, source).cached
    assert dataset_of(run(case, source)).digest == dataset_of(before).digest


def test_images_and_masks_that_no_list_names_are_left_out(run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = CONTEXT.write(tmp_path / "source")
    for stem in ("2007_000032", "2007_000033"):
        put(source / f"JPEGImages/{stem}.jpg", b"an image of another task")
    put(source / "SegmentationClassContext/2007_000033.png", b"no mask")
    receipt = run(CONTEXT, source)
    assert receipt.results["images"] == {"train": 5, "val": 2}
    assert receipt.results["rejected"] == 0


def test_a_class_that_is_absent_does_not_put_a_known_numbering_in_doubt(
    run: Callable[..., Receipt], tmp_path: Path
) -> None:
    case = replace(CONTEXT, legal=[0, 2, 3, 255])
    warnings = run(case, case.write(tmp_path / "source")).results["warnings"]
    assert [line.partition(",")[0] for line in warnings] == ["classes that never occur: aeroplane"]
    assert warnings[0].endswith(" and 49 more")


def test_another_list_is_another_data_set(run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = CONTEXT.write(tmp_path / "source")
    assert run(CONTEXT, source).results["images"] == {"train": 5, "val": 2}
    put(source / "ImageSets/SegmentationContext/train.txt", b"2008_000000\n\n  2008_000003\r\n")
    again = run(CONTEXT, source)
    assert (again.cached, again.results["images"]) == (False, {"train": 2, "val": 2})


def test_of_two_places_for_masks_the_first_counts(run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = COCO.write(tmp_path / "source")
    for split, stem in COCO.places():
        put(source / COCO.key("stuffthingmaps/{split}/{stem}.png", split, stem), png(np.full((HEIGHT, WIDTH), 3)))
    receipt = run(COCO, source)
    assert receipt.results["rejected"] == 0
    assert all(row["classes"] == list(range(171)) for row in rows_of(dataset_of(receipt), "train"))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.int32, np.float64])
def test_a_matlab_label_map_may_be_of_any_type_of_number(
    run: Callable[..., Receipt], tmp_path: Path, dtype: type
) -> None:
    case = CASES["coco_stuff_10k"]
    source = case.write(tmp_path / "source")
    stem = case.stems["train"][0]
    put(source / f"annotations/{stem}.mat", matlab(case.raw(0), S=case.raw(0).astype(dtype)))
    row = rows_of(dataset_of(run(case, source)), "train")[0]
    assert np.array_equal(decode_mask(row["mask"]), coco_10k(case.raw(0)))


# ---------------------------------------------------------------- what does not


def test_an_id_that_the_data_set_does_not_have_rejects_the_mask_and_is_named(
    case: Case, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    source = case.write(tmp_path / "source")
    raw = case.raw(0)
    raw[3, 4:6] = case.wrong, 253
    split, stem = case.places()[0]
    mask = case.key(case.mask, split, stem)
    put(source / mask, case.write_mask(raw))
    receipt = run(case, source, max_reject_rate=0.2)
    (reason,) = [reason for key, reason in rejects_of(tmp_path / "work").items() if key == mask]
    assert reason.endswith(f"does not have: {case.wrong}, 253")
    assert receipt.results["images"] == {"train": 4, "val": 2}


def test_an_image_without_its_mask_is_rejected_with_the_place_where_it_should_be(
    case: Case, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    source = case.write(tmp_path / "source")
    split, stem = case.places()[1]
    (source / case.key(case.mask, split, stem)).unlink()
    receipt = run(case, source, max_reject_rate=0.2)
    expected = case.key(CASES[case.layout].mask, split, stem)
    assert rejects_of(tmp_path / "work") == {case.key(case.image, split, stem): f"it has no mask: {expected}"}
    assert receipt.results["reject_reasons"] == {"it has no mask": 1}


def test_a_mask_without_its_image_is_named(case: Case, run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = case.write(tmp_path / "source")
    split, stem = case.places()[-1]
    (source / case.key(case.image, split, stem)).unlink()
    run(case, source, max_reject_rate=0.2)
    image, mask = case.key(CASES[case.layout].image, split, stem), case.key(case.mask, split, stem)
    expected = {mask: f"no image belongs to the mask: {image}"}
    if case.lists is not None:
        expected = {image: f"it is not there, but {case.key(case.lists, split, '')} names it"}
    assert rejects_of(tmp_path / "work") == expected


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a MATLAB file that can be read"),
        (b"not MATLAB" * 40, "not a MATLAB file that can be read"),
        (matlab(CASES["coco_stuff_10k"].raw(0))[:200], "not a MATLAB file that can be read"),
        (b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM", "not a MATLAB file that can be read (NotImplementedError)"),
        (matlab(np.zeros((2, 2), np.int64), S=np.full((HEIGHT, WIDTH), 1.5)), "must hold whole numbers"),
        (matlab(np.zeros((2, 2), np.int64), S=np.zeros((HEIGHT, WIDTH, 3))), "must hold whole numbers"),
        (matlab(np.zeros((2, 2), np.int64), S=np.full((HEIGHT, WIDTH), -1)), "does not have: -1"),
        (matlab(np.zeros((2, 2), np.int64), S=np.full((HEIGHT, WIDTH), 700)), "does not have: 700"),
        (matlab(np.zeros((HEIGHT, WIDTH + 1), np.int64)), f"the mask is {WIDTH + 1} x {HEIGHT}"),
    ],
    ids=["empty", "foreign", "cut", "v7.3", "fractions", "three axes", "negative", "large", "another size"],
)
def test_a_matlab_file_that_cannot_serve_is_rejected_with_the_reason(
    run: Callable[..., Receipt], tmp_path: Path, data: bytes, said: str
) -> None:
    case = CASES["coco_stuff_10k"]
    source = case.write(tmp_path / "source")
    mask = f"annotations/{case.stems['train'][0]}.mat"
    put(source / mask, data)
    run(case, source, max_reject_rate=0.2)
    assert said in rejects_of(tmp_path / "work")[mask]


def test_a_matlab_file_without_the_label_map_is_rejected(run: Callable[..., Receipt], tmp_path: Path) -> None:
    case = CASES["coco_stuff_10k"]
    source = case.write(tmp_path / "source")
    out = io.BytesIO()
    savemat(out, {"names": np.zeros(3)})
    mask = f"annotations/{case.stems['train'][0]}.mat"
    put(source / mask, out.getvalue())
    run(case, source, max_reject_rate=0.2)
    assert rejects_of(tmp_path / "work") == {mask: "the MATLAB file has no label map S"}


def test_a_colour_mask_in_a_native_layout_is_not_guessed_at(run: Callable[..., Receipt], tmp_path: Path) -> None:
    case = CASES["cityscapes"]
    source = case.write(tmp_path / "source")
    mask = case.key(case.mask, *case.places()[0])
    put(source / mask, encoded(np.full((HEIGHT, WIDTH, 3), (128, 64, 128), np.uint8)))
    run(case, source, max_reject_rate=0.2)
    assert "one 8-bit channel of class ids, this one is RGB" in rejects_of(tmp_path / "work")[mask]


def test_too_many_rejects_stop_a_native_layout_too(case: Case, run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = case.write(tmp_path / "source")
    (source / case.key(case.mask, *case.places()[0])).unlink()
    with pytest.raises(RepsepError, match="1 of 7 pairs were rejected"):
        run(case, source)


# ---------------------------------------------------------------- sources in another place or layout


def test_a_public_data_set_taken_for_folders_is_told_its_layout(
    case: Case, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    source = case.write(tmp_path / "source")
    with pytest.raises(UsageError, match=f"set prepare.layout={case.layout}$"):
        run(case, source, layout="folders", background=False)


def test_a_source_that_is_a_folder_too_high_is_told_where_the_data_set_begins(
    case: Case, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    inner = case.write(tmp_path / "source" / "downloads" / "inner")
    with pytest.raises(UsageError) as caught:
        run(case, tmp_path / "source")
    assert str(caught.value).endswith(f"; set prepare.source={inner}")


def test_a_source_of_another_kind_is_told_the_layout(run: Callable[..., Receipt], tmp_path: Path) -> None:
    put(tmp_path / "source" / "pictures" / "0.jpg", encoded(picture(0), "JPEG"))
    with pytest.raises(UsageError) as caught:
        run(CONTEXT, tmp_path / "source")
    assert str(caught.value) == (
        f"{tmp_path / 'source'} has no images of the layout JPEGImages/*.jpg, SegmentationClassContext/*.png, "
        "ImageSets/SegmentationContext/{train,val}.txt"
    )


def test_a_list_that_is_missing_is_named(run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = CONTEXT.write(tmp_path / "source")
    (source / "ImageSets/SegmentationContext/val.txt").unlink()
    with pytest.raises(UsageError, match=r"ImageSets/SegmentationContext/val\.txt is missing; it lists the images"):
        run(CONTEXT, source)


@pytest.mark.parametrize("gone", ["ImageSets/SegmentationContext/train.txt", "SegmentationClassContext"])
def test_a_pascal_context_that_no_converter_has_seen_is_told_what_makes_its_masks_and_lists(
    run: Callable[..., Receipt], tmp_path: Path, gone: str
) -> None:
    source = CONTEXT.write(tmp_path / "source")
    (source / gone).rename(tmp_path / "gone")
    with pytest.raises(UsageError) as caught:
        run(CONTEXT, source)
    assert str(caught.value).endswith(
        "; masks and lists are made from the data set's 459 labels by a converter such as MMSegmentation's "
        "tools/dataset_converters/pascal_context.py"
    )


def test_a_native_layout_without_any_mask_is_refused_at_once(
    case: Case, run: Callable[..., Receipt], tmp_path: Path
) -> None:
    source = case.write(tmp_path / "source")
    for place in case.places():
        (source / case.key(case.mask, *place)).unlink()
    with pytest.raises(UsageError, match=f"{source} has no masks of the layout "):
        run(case, source)


def test_empty_lists_leave_nothing_to_train_on(run: Callable[..., Receipt], tmp_path: Path) -> None:
    source = CONTEXT.write(tmp_path / "source")
    for split in ("train", "val"):
        put(source / f"ImageSets/SegmentationContext/{split}.txt", b"\n")
    with pytest.raises(UsageError, match="gives no train images"):
        run(CONTEXT, source)


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("prepare.layout=ade", "prepare.layout: input should be 'folders', 'ade20k'"),
        ("prepare.layout=ade20k", "prepare: layout=ade20k needs a source"),
        ("prepare.background=true", "prepare: background=true belongs to layout=pascal_context, this one is folders"),
    ],
)
def test_settings_that_do_not_go_together_are_named(setting: str, said: str) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(None, [setting])
    assert said in str(caught.value)


# ---------------------------------------------------------------- the label maps

MAPS: list[tuple[LabelMap, int, dict[int, str]]] = [
    (ADE20K, 150, {1: "wall", 13: "person", 21: "car", 81: "bus", 128: "bicycle", 137: "traffic light", 150: "flag"}),
    (CITYSCAPES, 19, {7: "road", 17: "pole", 24: "person", 26: "car", 31: "train", 33: "bicycle"}),
    (PASCAL_CONTEXT, 59, {1: "aeroplane", 2: "bag", 37: "person", 55: "tvmonitor", 58: "window", 59: "wood"}),
    (PASCAL_CONTEXT_60, 60, {0: "background", 1: "aeroplane", 55: "tvmonitor", 59: "wood"}),
    (
        COCO_STUFF_10K,
        171,
        {1: "person", 13: "stop sign", 72: "tv", 90: "toothbrush", 92: "banner", 149: "road", 182: "wood"},
    ),
    (
        COCO_STUFF_164K,
        171,
        {0: "person", 12: "stop sign", 89: "toothbrush", 91: "banner", 156: "sky-other", 181: "wood"},
    ),
]


@pytest.mark.parametrize(("labels", "count", "known"), MAPS, ids=lambda value: getattr(value, "name", None))
def test_the_classes_have_the_names_that_their_ids_are_known_by(
    labels: LabelMap, count: int, known: dict[int, str]
) -> None:
    names = {c["source_id"]: c["name"] for c in labels.classes}
    assert len(labels.classes) == len(set(names.values())) == count
    assert {source_id: names[source_id] for source_id in known} == known
    colours = {tuple(c["color"]) for c in labels.classes}
    assert len(colours) == count
    assert all(len(colour) == 3 and 0 <= min(colour) <= max(colour) <= 255 for colour in colours)


def test_pascal_context_is_named_in_the_alphabetical_order_of_its_ids() -> None:
    names = [c["name"] for c in PASCAL_CONTEXT.classes]
    assert names == sorted(names)
    assert [c["name"] for c in PASCAL_CONTEXT_60.classes] == ["background", *names]


def test_both_releases_of_coco_stuff_have_the_same_classes() -> None:
    assert [c["name"] for c in COCO_STUFF_10K.classes] == [c["name"] for c in COCO_STUFF_164K.classes]
    ids = np.arange(182)
    drawn = ids[~np.isin(ids + 1, COCO_ABSENT)]
    assert np.array_equal(COCO_STUFF_10K.remap(drawn + 1), COCO_STUFF_164K.remap(drawn))


def test_more_colours_change_none_and_all_differ() -> None:
    colours = np.array(distinct_colours(255))
    assert np.array_equal(colours[:59], distinct_colours(59))
    apart = np.abs(colours[:, None] - colours[None]).sum(axis=2) + 1000 * np.eye(255, dtype=int)
    assert apart.min() >= 20
    assert colours.max(axis=1).min() >= 100, "none is so dark that it looks ignored"


def test_a_layout_maps_to_our_splits_only() -> None:
    assert all(set(layout.splits.values()) == {"train", "val"} for layout in NATIVE.values())
