"""Images and masks of the default layout, paired by path; what has no partner, or several, is rejected with the reason.

The layout is images/{split}/**, masks/{split}/** (same path, .png) and classes.json. Without split folders the pairs
are split deterministically by group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from pipelines.config import PrepareConfig
from pipelines.dataset import group_of, in_share
from pipelines.errors import UsageError

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Pair:
    """An image and its mask, by their keys in the source; `key` is what the dataset calls the image."""

    split: str
    key: str
    image: str
    mask: str


@dataclass(frozen=True)
class Reject:
    """What did not pass: which file, and why."""

    key: str
    split: str
    reason: str


def find_pairs(uri: str, keys: Iterable[str], config: PrepareConfig) -> tuple[list[Pair], list[Reject]]:
    """Pairs in order of their images, and files without a partner. Raises UsageError where there are no images."""
    images, masks = _by_stem(keys, "images/", IMAGE_EXTENSIONS), _by_stem(keys, "masks/", MASK_EXTENSIONS)
    if not images:
        raise UsageError(
            f"{uri} has no images under images/; the layout is images/<split>/*.jpg, masks/<split>/*.png, classes.json"
        )
    ordered = sorted((image, stem) for stem, several in images.items() for image in several)
    split_of = _splitter([image for image, _ in ordered], config)
    pairs, rejects = [], []
    for image, stem in ordered:
        split = split_of(image)
        if stem not in masks:
            rejects.append(Reject(image, split, "it has no mask (the same path under masks/, .png)"))
        elif len(masks[stem]) > 1:
            rejects.append(Reject(image, split, f"it has several masks, keep one: {', '.join(masks[stem])}"))
        elif len(images[stem]) > 1:
            others = ", ".join(other for other in images[stem] if other != image)
            rejects.append(Reject(image, split, f"its mask could also be that of another image, rename one: {others}"))
        else:
            pairs.append(Pair(split, image.removeprefix("images/"), image, masks[stem][0]))
    for stem in sorted(masks.keys() - images.keys()):
        split = stem.partition("/")[0] if stem.startswith(tuple(f"{split}/" for split in SPLITS)) else ""
        reason = "no image belongs to the mask (the same path under images/)"
        rejects += [Reject(mask, split, reason) for mask in masks[stem]]
    return pairs, rejects


def _by_stem(keys: Iterable[str], root: str, extensions: tuple[str, ...]) -> dict[str, list[str]]:
    """The path below `root` without its extension -> the keys that have it."""
    found = defaultdict(list)
    for key in sorted(keys):
        if key.startswith(root) and key.lower().endswith(extensions):
            found[key.removeprefix(root).rpartition(".")[0]].append(key)
    return dict(found)


def _splitter(images: Sequence[str], config: PrepareConfig) -> Callable[[str], str]:
    """Which split an image belongs to: from the folders, or by group where there are none."""
    inside = tuple(f"images/{split}/" for split in SPLITS)
    outside = [image for image in images if not image.startswith(inside)]
    if not outside:
        return lambda image: image.split("/")[1]
    if len(outside) < len(images):
        raise UsageError(
            f"some images are in folders for a split, {outside[0]} is not; move all below images/train, images/val or "
            "images/test, or rename those folders"
        )

    def by_group(image: str) -> str:
        group = group_of(image.removeprefix("images/"), config.group_pattern)
        return "val" if in_share(group, config.val_fraction, config.seed) else "train"

    return by_group
