"""The mask of an image is found by its path alone, or the doubt is said."""

from __future__ import annotations

import pytest

from pipelines.errors import UsageError
from pipelines.evaluation.matching import match


def matched(images: list[str], masks: list[str]) -> dict[str, str]:
    return match(images, ((mask, mask) for mask in masks))


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("val/a.jpg", "val/a.jpg"),
        ("val/a.jpg", "images/val/a.jpg"),
        ("val/a.jpg", "a.jpg"),
        ("val/a.jpg", "val/a.png"),
        ("val/a.jpg", "a.PNG"),
        ("a.jpg", "x/y/a.jpg"),
        ("val/a.b.jpg", "a.b.tif"),
        ("val/a#1.jpg", "a#1.jpg"),
    ],
)
def test_paths_that_end_alike_belong_together(image: str, mask: str) -> None:
    assert matched([image], [mask]) == {image: mask}


@pytest.mark.parametrize(
    ("image", "mask"),
    [
        ("val/a.jpg", "train/a.jpg"),
        ("val/a.jpg", "b/a.jpg"),
        ("val/ba.jpg", "a.jpg"),
        ("a.jpg", "ba.jpg"),
        ("val/a.jpg", "val/a.jpg/b.jpg"),
        ("val/a.jpg", "val/A.jpg"),
    ],
)
def test_other_paths_do_not(image: str, mask: str) -> None:
    assert matched([image], [mask]) == {}


def test_of_several_masks_the_one_with_the_most_folders_in_common_is_taken() -> None:
    images = ["val/a.jpg", "val/night/a.jpg"]
    masks = ["a.jpg", "night/a.jpg"]
    for order in (masks, masks[::-1]):
        assert matched(images, order) == {"val/a.jpg": "a.jpg", "val/night/a.jpg": "night/a.jpg"}


def test_of_equal_paths_the_extension_decides() -> None:
    assert matched(["a.jpg", "a.png"], ["a.png", "a.jpg"]) == {"a.jpg": "a.jpg", "a.png": "a.png"}


def test_images_without_a_mask_and_masks_without_an_image_are_left_out() -> None:
    assert matched(["val/a.jpg", "val/b.jpg"], ["val/b.jpg", "train/c.jpg"]) == {"val/b.jpg": "val/b.jpg"}


@pytest.mark.parametrize(
    ("images", "masks", "said"),
    [
        (["a.jpg"], ["x/a.jpg", "y/a.jpg"], "the labelled image a.jpg could be any of x/a.jpg, y/a.jpg"),
        (["v/a.jpg"], ["a.png", "a.tif"], "the labelled image v/a.jpg could be any of a.png, a.tif"),
        (["x/a.jpg", "y/a.jpg"], ["a.jpg"], "the mask of a.jpg could be that of x/a.jpg and of y/a.jpg"),
        (["a.jpg", "a.png"], ["a.jpg"], "the mask of a.jpg could be that of a.jpg and of a.png"),
    ],
)
def test_a_doubt_is_said_and_not_decided(images: list[str], masks: list[str], said: str) -> None:
    with pytest.raises(UsageError, match="can be told by their paths") as caught:
        matched(images, masks)
    assert said in str(caught.value)
