"""Which mask of a bulk output belongs to which labelled image.

Both are named by paths: a dataset's key begins below its source's images/, a bulk key below `segment.source`, an image
in a shard by its name there. So the same image may have more folders in one of them, and another extension:

    labelled image        mask of
    val/a.jpg             val/a.jpg    images/val/a.jpg    a.jpg    val/a.png    part-00000.parquet#val/a.jpg

The rule: without extensions one path ends, folder by folder, with all of the other. Of several such masks the one with
the most folders in common is taken, then the one with the same extension. Two that fit equally well, or one that fits
two images best, are an error: no score may depend on a guess.
"""

from __future__ import annotations

import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TypeVar

from pipelines.errors import UsageError

Row = TypeVar("Row")
Fit = tuple[int, bool]
"""Names in common, and whether the extensions are the same."""
Candidates = list[tuple[int, str, Row]]
"""Place among the masks, path and row."""


def match(images: Sequence[str], masks: Iterable[tuple[str, Row]]) -> dict[str, Row]:
    """The row of each image's mask, for those that have one; nothing is kept of masks that fit no image.

    `masks` are paths and whatever is to be found by them. Raises UsageError where it cannot be told which one is meant.
    """
    ends: dict[str, list[str]] = {}
    for image in images:
        for end in _ends(_stem(image)):
            ends.setdefault(end, []).append(image)
    best: dict[str, Fit] = {}
    found: dict[str, Candidates[Row]] = {}
    for place, (mask, row) in enumerate(masks):
        for image in _fitting(mask, ends):
            fit = _fit(image, mask)
            if fit > best.get(image, (0, False)):
                best[image], found[image] = fit, []
            if fit == best[image]:
                found[image].append((place, mask, row))
    return _one_each(found)


def _fitting(mask: str, ends: Mapping[str, list[str]]) -> Iterator[str]:
    """The images of which one path ends with all of the other's."""
    stem = _stem(mask)
    yield from ends.get(stem, ())
    for end in _ends(stem):
        if end != stem:
            yield from (image for image in ends.get(end, ()) if _stem(image) == end)


def _one_each(found: Mapping[str, Candidates[Row]]) -> dict[str, Row]:
    owner: dict[int, str] = {}
    for image, candidates in found.items():
        place, mask, _ = candidates[0]
        if len(candidates) > 1:
            raise UsageError(
                f"the labelled image {image} could be any of {', '.join(mask for _, mask, _ in candidates[:3])}; "
                "segment a source that holds it once, so that masks and labelled images can be told by their paths"
            )
        if place in owner:
            raise UsageError(
                f"the mask of {mask} could be that of {owner[place]} and of {image}; segment the folder above, so that "
                "masks and labelled images can be told by their paths"
            )
        owner[place] = image
    return {image: candidates[0][2] for image, candidates in found.items()}


def _fit(image: str, mask: str) -> Fit:
    return min(image.count("/"), mask.count("/")) + 1, _extension(image) == _extension(mask)


def _stem(key: str) -> str:
    return posixpath.splitext(key)[0]


def _extension(key: str) -> str:
    return posixpath.splitext(key)[1].lower()


def _ends(path: str) -> Iterator[str]:
    """The path, and what is left of it without its first folders."""
    yield path
    while "/" in path:
        path = path.partition("/")[2]
        yield path
