import json
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from pipelines.errors import UsageError
from pipelines.scenes import CLASSES, IGNORE, POLE, render_scene, write_scenes

Bytes = NDArray[np.uint8]
IDS = [entry["id"] for entry in CLASSES]
# Pixels of each class and of IGNORE in scene (0, 0).
GOLDEN_COUNTS = (1560, 16046, 21265, 6021, 496, 3063, 315, 386)


@pytest.fixture(scope="module")
def masks() -> Bytes:
    """(80, H, W)"""
    return np.stack([render_scene(7, index)[1] for index in range(80)])


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_same_seed_and_index_give_the_same_bytes() -> None:
    for first, again in zip(render_scene(3, 5), render_scene(3, 5), strict=True):
        assert first.tobytes() == again.tobytes()


@pytest.mark.parametrize("other", [(3, 6), (4, 5), (5, 3)])
def test_another_seed_or_index_gives_another_scene(other: tuple[int, int]) -> None:
    image, mask = render_scene(3, 5)
    other_image, other_mask = render_scene(*other)
    assert (image != other_image).mean() > 0.5
    assert (mask != other_mask).mean() > 0.1


def test_the_drawing_is_the_one_that_version_1_names() -> None:
    # Another Pillow or processor may move a pixel here and there; a new drawing moves many: raise VERSION.
    _, mask = render_scene(0, 0)
    counts = np.bincount(mask.ravel(), minlength=256)[[*IDS, IGNORE]]
    assert np.abs(counts - GOLDEN_COUNTS).max() <= 20


@pytest.mark.parametrize("size", [(192, 256), (97, 131), (64, 200), (256, 96), (17, 23)])
def test_image_and_mask_have_the_size_asked_for(size: tuple[int, int]) -> None:
    image, mask = render_scene(0, 1, size)
    assert image.shape == (*size, 3)
    assert mask.shape == size
    assert image.dtype == mask.dtype == np.uint8


@pytest.mark.parametrize("index", range(3))
def test_a_larger_size_of_the_same_proportions_shows_the_same_things(index: int) -> None:
    small, large = render_scene(7, index)[1], render_scene(7, index, (384, 512))[1]
    assert (small == large[::2, ::2]).mean() > 0.95


def test_masks_hold_only_class_ids_and_few_ignored_pixels(masks: Bytes) -> None:
    assert set(np.unique(masks)) == {*IDS, IGNORE}
    assert 0.001 < (masks == IGNORE).mean() < 0.03


@pytest.mark.parametrize("entry", CLASSES, ids=lambda entry: entry["name"])
def test_a_class_is_in_at_least_half_of_the_scenes(entry: dict[str, object], masks: Bytes) -> None:
    assert (masks[:20] == entry["id"]).any(axis=(1, 2)).mean() >= 0.5


def test_poles_are_thin(masks: Bytes) -> None:
    poles = masks[:20] == POLE
    left = sum(ndimage.binary_erosion(pole, iterations=2).sum() for pole in poles)  # what is 5 pixels wide
    assert left < 0.02 * poles.sum()


def test_the_majority_class_per_position_does_not_solve_it(masks: Bytes) -> None:
    seen, unseen = masks[:60], masks[60:]
    prior = np.stack([(seen == k).sum(axis=0) for k in IDS]).argmax(axis=0)
    valid = unseen != IGNORE
    ious = []
    for k in IDS:
        guess, truth = (prior == k) & valid, unseen == k
        ious.append((guess & truth).sum() / (guess | truth).sum())
    assert np.mean(ious) < 0.35


def test_colour_alone_does_not_tell_the_classes_apart() -> None:
    scenes = [render_scene(7, index) for index in range(40)]
    colours = np.stack([image // 32 for image, _ in scenes]).astype(int) @ (64, 8, 1)  # 8 x 8 x 8 colours
    labels = np.stack([mask for _, mask in scenes])
    votes = np.stack([np.bincount(colours[:30][labels[:30] == k], minlength=512) for k in IDS]).argmax(axis=0)
    valid = labels[30:] != IGNORE
    assert (votes[colours[30:]] == labels[30:])[valid].mean() < 0.7


def test_the_layout_is_the_default_one(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "scenes"
    write_scenes(folder, train=3, val=2, unlabelled=5, size=(48, 64))
    assert sorted(contents(folder)) == sorted(
        [f"images/train/000{i}.jpg" for i in range(3)]
        + [f"masks/train/000{i}.png" for i in range(3)]
        + [f"images/val/000{i}.jpg" for i in range(2)]
        + [f"masks/val/000{i}.png" for i in range(2)]
        + [f"unlabelled/a/000{i}.jpg" for i in range(3)]
        + [f"unlabelled/b/000{i}.jpg" for i in range(2)]
        + ["classes.json", "scenes.json"]
    )
    assert json.loads((folder / "classes.json").read_text()) == {
        "name": "scenes",
        "ignore_index": 255,
        "classes": list(CLASSES),
    }
    images = [data for name, data in contents(folder).items() if name.endswith(".jpg")]
    assert len(set(images)) == len(images), "two images are the same"
    assert list(folder.parent.iterdir()) == [folder], "a temporary folder was left behind"


def test_a_mask_file_holds_the_ids_under_the_palette_of_the_classes(tmp_path: Path) -> None:
    write_scenes(tmp_path / "scenes", train=2, val=1, unlabelled=0, size=(48, 64), seed=9)
    for image_path in (tmp_path / "scenes" / "images").rglob("*.jpg"):
        mask_path = tmp_path / "scenes" / "masks" / image_path.parent.name / f"{image_path.stem}.png"
        with Image.open(image_path) as image, Image.open(mask_path) as mask:
            assert image.size == mask.size == (64, 48)
            assert (image.mode, mask.mode) == ("RGB", "P")
            palette = mask.getpalette() or []
            assert [palette[3 * k : 3 * k + 3] for k in IDS] == [entry["color"] for entry in CLASSES]
    with Image.open(tmp_path / "scenes/masks/train/0001.png") as mask:
        assert np.array_equal(np.asarray(mask), render_scene(9, 1, (48, 64))[1])
    header = (tmp_path / "scenes/masks/train/0001.png").read_bytes()
    assert header[24] == 8, "bits per pixel, in the PNG header"


def test_a_scene_does_not_depend_on_how_many_there_are(tmp_path: Path) -> None:
    write_scenes(tmp_path / "few", train=1, val=1, unlabelled=2, size=(24, 32))
    write_scenes(tmp_path / "many", train=2, val=2, unlabelled=4, size=(24, 32))
    few, many = contents(tmp_path / "few"), contents(tmp_path / "many")
    assert all(many[name] == data for name, data in few.items() if name != "scenes.json")


def test_a_second_call_does_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scenes"
    write_scenes(folder, train=1, val=1, unlabelled=2, size=(24, 32))
    before = contents(folder), folder.stat().st_mtime_ns
    monkeypatch.setattr("pipelines.scenes.render_scene", lambda *_: pytest.fail("drew a scene again"))
    write_scenes(folder, train=1, val=1, unlabelled=2, size=(24, 32))
    assert (contents(folder), folder.stat().st_mtime_ns) == before


def test_a_folder_with_other_data_is_refused_and_left_alone(tmp_path: Path) -> None:
    folder = tmp_path / "scenes"
    write_scenes(folder, train=1, val=1, unlabelled=2, size=(24, 32))
    before = contents(folder)
    with pytest.raises(UsageError, match="name another folder"):
        write_scenes(folder, train=2, val=1, unlabelled=2, size=(24, 32))
    assert contents(folder) == before
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "holiday.jpg").write_bytes(b"mine")
    with pytest.raises(UsageError, match="photos"):
        write_scenes(tmp_path / "photos", train=1, val=1, unlabelled=2, size=(24, 32))


def test_a_failure_half_way_leaves_nothing_to_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails_at_the_third(seed: int, index: int, size: tuple[int, int]) -> tuple[Bytes, Bytes]:
        if index == 2:
            raise OSError("disk full")
        return render_scene(seed, index, size)

    monkeypatch.setattr("pipelines.scenes.render_scene", fails_at_the_third)
    with pytest.raises(OSError, match="disk full"):
        write_scenes(tmp_path / "scenes", train=4, val=1, unlabelled=2, size=(24, 32))
    assert list(tmp_path.iterdir()) == []


def test_the_second_to_rename_keeps_the_first_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rename = tmp_path / "scenes", Path.rename

    def another_process_is_quicker(path: Path, target: Path) -> Path:
        monkeypatch.setattr(Path, "rename", rename)
        write_scenes(folder, train=1, val=1, unlabelled=2, size=(24, 32))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", another_process_is_quicker)
    write_scenes(folder, train=1, val=1, unlabelled=2, size=(24, 32))
    assert list(tmp_path.iterdir()) == [folder]
