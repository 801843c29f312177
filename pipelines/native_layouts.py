"""The layouts in which public data sets come: templates of their files below the source, and their label maps.

Templates hold {split}, a data set's own name for a split, and {stem}, what an image and its mask have in common.
Shapes: H x W pixels.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.io import loadmat

from pipelines.errors import UsageError
from pipelines.label_maps import ADE20K, CITYSCAPES, COCO_STUFF_10K, COCO_STUFF_164K, PASCAL_CONTEXT, LabelMap
from pipelines.pairs import Pair, Reject
from pipelines.storage import Folder
from repsep_model.images import ImageError

Places = Mapping[tuple[str, str], str]
"""(split, stem) -> key; the split is "" where lists say it."""


@dataclass(frozen=True)
class NativeLayout:
    """Where a data set keeps its files. Of several templates the first that exists counts.

    `stem` is a pattern, `splits` gives our names for its splits, `lists` is the template of the files that say which
    stems a split has where folders do not, `groups` the pattern of what a holdout must not split, `origin` where masks
    and lists come from that are not the data set's own.
    """

    labels: LabelMap
    images: tuple[str, ...]
    masks: tuple[str, ...]
    stem: str
    splits: Mapping[str, str]
    lists: str | None = None
    groups: str | None = r"[^/]+$"
    origin: str | None = None

    @property
    def list_files(self) -> dict[str, str]:
        """Split -> the file that lists its stems."""
        return {ours: self.lists.format(split=theirs) for theirs, ours in self.splits.items()} if self.lists else {}

    def part(self, keys: Iterable[str]) -> set[str]:
        """Those of the keys that belong to the layout."""
        patterns = [self._pattern(template) for template in (*self.images, *self.masks)]
        lists = set(self.list_files.values())
        return {key for key in keys if key in lists or any(pattern.fullmatch(key) for pattern in patterns)}

    def find(self, keys: Iterable[str], templates: Sequence[str]) -> Places:
        """The keys that have the form of these templates."""
        patterns = [self._pattern(template) for template in templates]
        found: dict[tuple[str, str], tuple[int, str]] = {}
        for key in keys:
            for rank, pattern in enumerate(patterns):
                if match := pattern.fullmatch(key):
                    parts = match.groupdict()
                    place = (parts.get("split", ""), parts["stem"])
                    found[place] = min(found.get(place, (rank, key)), (rank, key))
        return {place: key for place, (_, key) in found.items()}

    def described(self) -> str:
        """The layout in one line, for messages."""
        choice = f"{{{','.join(self.splits)}}}"
        files = [self.images[0], self.masks[0], *([self.lists] if self.lists else [])]
        return ", ".join(file.replace("{split}", choice).replace("{stem}", "*") for file in files)

    @property
    def origin_hint(self) -> str:
        """What a message that misses masks or lists ends with."""
        return f"; {self.origin}" if self.origin else ""

    def where_it_begins(self, keys: Iterable[str]) -> str | None:
        """The folder below which the first image lies, for a source that is too high."""
        for key in keys:
            parts = key.split("/")
            for depth in range(1, len(parts)):
                if self.find(["/".join(parts[depth:])], self.images):
                    return "/".join(parts[:depth])
        return None

    def _pattern(self, template: str) -> re.Pattern[str]:
        escaped = re.escape(template).replace(r"\{split\}", f"(?P<split>{'|'.join(self.splits)})")
        return re.compile(escaped.replace(r"\{stem\}", f"(?P<stem>{self.stem})"))


NATIVE = {
    "ade20k": NativeLayout(
        ADE20K,
        images=("images/{split}/{stem}.jpg",),
        masks=("annotations/{split}/{stem}.png",),
        stem="[^/]+",
        splits={"training": "train", "validation": "val"},
    ),
    "cityscapes": NativeLayout(
        CITYSCAPES,
        images=("leftImg8bit/{split}/{stem}_leftImg8bit.png",),
        masks=("gtFine/{split}/{stem}_gtFine_labelIds.png",),
        stem="[^/]+/[^/]+",
        splits={"train": "train", "val": "val"},  # the masks of the public test split are dummies
        groups=None,  # the folders are cities
    ),
    "pascal_context": NativeLayout(
        PASCAL_CONTEXT,
        images=("JPEGImages/{stem}.jpg",),
        masks=("SegmentationClassContext/{stem}.png",),
        stem="[^/]+",
        splits={"train": "train", "val": "val"},
        lists="ImageSets/SegmentationContext/{split}.txt",
        # The data set itself comes as one .mat file of 459 labels for each image.
        origin="masks and lists are made from the data set's 459 labels by a converter such as MMSegmentation's "
        "tools/dataset_converters/pascal_context.py",
    ),
    "coco_stuff_10k": NativeLayout(
        COCO_STUFF_10K,
        images=("images/{stem}.jpg",),
        masks=("annotations/{stem}.mat",),
        stem="[^/]+",
        splits={"train": "train", "test": "val"},
        lists="imageLists/{split}.txt",
    ),
    "coco_stuff_164k": NativeLayout(
        COCO_STUFF_164K,
        images=("images/{split}/{stem}.jpg", "{split}/{stem}.jpg"),
        masks=("annotations/{split}/{stem}.png", "stuffthingmaps/{split}/{stem}.png"),
        stem="[0-9]+",  # converters leave <id>_labelTrainIds.png beside the masks
        splits={"train2017": "train", "val2017": "val"},
    ),
}


def native_pairs(source: Folder, keys: Sequence[str], layout: NativeLayout) -> tuple[list[Pair], list[Reject]]:
    """Pairs, and files without a partner. Raises UsageError where a list is missing."""
    images, masks = layout.find(keys, layout.images), layout.find(keys, layout.masks)
    return _listed(source, layout, images, masks) if layout.lists else _matched(layout, images, masks)


def read_matlab(data: bytes) -> NDArray[np.int64]:
    """The label map `S` of a MATLAB file, (H, W). Raises ImageError."""
    try:
        labels = np.asarray(loadmat(io.BytesIO(data), variable_names=["S"])["S"])
    except KeyError as error:
        raise ImageError("the MATLAB file has no label map S") from error
    except Exception as error:  # scipy raises ValueError, TypeError, NotImplementedError, zlib.error and more
        raise ImageError(f"not a MATLAB file that can be read ({type(error).__name__})") from error
    if labels.ndim != 2 or labels.dtype.kind not in "uif" or not (labels == np.rint(labels)).all():
        raise ImageError(f"the label map S must hold whole numbers in rows and columns, this one is {labels.dtype}")
    return labels.astype(np.int64)


def _matched(layout: NativeLayout, images: Places, masks: Places) -> tuple[list[Pair], list[Reject]]:
    """By the split and the stem in the paths."""
    pairs, rejects = [], []
    for place, image in sorted(images.items(), key=lambda found: found[1]):
        split = layout.splits[place[0]]
        if place in masks:
            pairs.append(Pair(split, image, image, masks[place]))
        else:
            rejects.append(Reject(image, split, f"it has no mask: {_at(layout.masks, place)}"))
    for place in sorted(masks.keys() - images.keys()):
        reason = f"no image belongs to the mask: {_at(layout.images, place)}"
        rejects.append(Reject(masks[place], layout.splits[place[0]], reason))
    return pairs, rejects


def _listed(source: Folder, layout: NativeLayout, images: Places, masks: Places) -> tuple[list[Pair], list[Reject]]:
    """By the lists of the splits; images and masks that no list names are left out."""
    pairs, rejects = [], []
    for split, file in layout.list_files.items():
        for stem in _stems(source, file, layout):
            place = ("", stem)
            if place not in images:
                rejects.append(Reject(_at(layout.images, place), split, f"it is not there, but {file} names it"))
            elif place not in masks:
                rejects.append(Reject(images[place], split, f"it has no mask: {_at(layout.masks, place)}"))
            else:
                pairs.append(Pair(split, images[place], images[place], masks[place]))
    return pairs, rejects


def _stems(source: Folder, file: str, layout: NativeLayout) -> Iterator[str]:
    data = source.read_if_present(file)
    if data is None:
        missing = f"{source.uri_of(file)} is missing; it lists the images of a split, one a line"
        raise UsageError(missing + layout.origin_hint)
    yield from sorted({line.strip() for line in data.decode(errors="replace").splitlines()} - {""})


def _at(templates: Sequence[str], place: tuple[str, str]) -> str:
    return templates[0].format(split=place[0], stem=place[1])
