"""The label linter: a pair is judged alone, then a split by what its masks hold.

What is wrong with a pair rejects it, by the file's name and the reason; what is only suspicious becomes a warning.
Shapes: H x W pixels, K classes.
"""

from __future__ import annotations

import hashlib
import io
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipelines.errors import StorageError
from pipelines.label_maps import LabelMap
from pipelines.native_layouts import read_matlab
from pipelines.pairs import Pair, Reject
from pipelines.storage import Folder
from repsep_model.images import ImageError, UInt8, decode_image, decode_mask, encode_mask, image_size
from repsep_model.labels import IGNORE_INDEX

SHOWN = 8
PACKED = np.array([65536, 256, 1])  # a colour as one number
BLACK = 0
UNLABELLED = {"unlabeled", "unlabelled", "unknown", "void", "ignore", "ignored", "none"}
PAINTED, TURNED, EMPTY = "painted", "turned", "empty"
NOTES = {
    PAINTED: "masks painted in the classes' colours, converted to ids",
    TURNED: "images with an EXIF orientation that no size confirms, their masks must fit the upright image",
    EMPTY: "masks without a labelled pixel",
}


@dataclass(frozen=True)
class Row:
    """A pair that passed: what goes into a shard, pixels of each class (K), ignored ones, and what is worth a note."""

    key: str
    image: bytes
    mask: bytes
    height: int
    width: int
    counts: NDArray[np.int64]
    ignored: int
    image_sha256: str
    notes: tuple[str, ...]


def check_pair(source: Folder, pair: Pair, classes: list[dict[str, Any]], labels: LabelMap | None) -> Row | Reject:
    """Read a pair and judge it. `labels` remaps the ids of a native layout.

    Without it the masks hold train ids; one that is painted in the classes' colours, RGB or indexed, is converted.
    """
    try:
        image, mask = source.read(pair.image), source.read(pair.mask)
    except StorageError as error:
        return Reject(pair.image, pair.split, str(error))
    try:
        pixels = decode_image(image)
    except ImageError as error:
        return Reject(pair.image, pair.split, str(error))
    colours = [c["color"] for c in classes]
    painted = False
    try:
        if labels is not None:
            ids = labels.remap(read_matlab(mask) if pair.mask.endswith(".mat") else decode_mask(mask))
            mask = encode_mask(ids, colours)
        else:
            ids, mask, painted = _class_ids(mask, classes)
    except ImageError as error:
        return Reject(pair.mask, pair.split, str(error))
    turned, stored_size = _orientation(image)
    if ids.shape != pixels.shape[:2]:
        hint = "; the image carries an EXIF rotation that the mask does not have" if ids.shape == stored_size else ""
        sizes = f"the mask is {ids.shape[1]} x {ids.shape[0]}, the image {pixels.shape[1]} x {pixels.shape[0]}"
        return Reject(pair.mask, pair.split, sizes + hint)
    counts = np.bincount(ids.ravel(), minlength=256)
    outside = [int(i) for i in np.flatnonzero(counts[:IGNORE_INDEX]) if i >= len(classes)]
    if outside:
        return Reject(pair.mask, pair.split, _outside(outside, counts, len(classes)))
    ignored = int(counts[IGNORE_INDEX])
    notes = {PAINTED: painted, TURNED: turned and stored_size == ids.shape, EMPTY: ignored == ids.size}
    return Row(
        key=pair.key,
        image=image,
        mask=mask,
        height=ids.shape[0],
        width=ids.shape[1],
        counts=counts[: len(classes)],
        ignored=ignored,
        image_sha256=hashlib.sha256(image).hexdigest(),
        notes=tuple(note for note, applies in notes.items() if applies),
    )


class Survey:
    """What the masks that passed hold, by split, and the warnings that follow."""

    def __init__(self, classes: Sequence[dict[str, Any]], *, native: bool) -> None:
        self.names = [str(c["name"]) for c in classes]
        self.native = native
        self.pixels: dict[str, NDArray[np.int64]] = {}
        self.ignored: dict[str, int] = {}
        self.noted: dict[str, list[str]] = defaultdict(list)

    def begin(self, split: str) -> None:
        self.pixels[split], self.ignored[split] = np.zeros(len(self.names), np.int64), 0

    def add(self, split: str, row: Row) -> None:
        self.pixels[split] += row.counts
        self.ignored[split] += row.ignored
        for note in row.notes:
            self.noted[note].append(row.key)

    def totals(self) -> NDArray[np.int64]:
        """Pixels of each class over all splits, (K,)."""
        return np.sum(list(self.pixels.values()), axis=0, dtype=np.int64)

    def histogram(self, split: str) -> str:
        """Shares of the pixels in one line: the commonest classes, then what is ignored."""
        counts = self.pixels[split]
        total = max(1, int(counts.sum()) + self.ignored[split])
        common = np.argsort(-counts, kind="stable")[:SHOWN]
        shares = [f"{self.names[i]} {100 * counts[i] / total:.1f} %" for i in common if counts[i]]
        more = int(np.count_nonzero(counts)) - len(shares)
        rest = [f"{more} more classes"] if more else []
        return ", ".join([*shares, *rest, f"ignored {100 * self.ignored[split] / total:.1f} %"])

    def warnings(self) -> list[str]:
        """One line for each thing that a person should look at."""
        found = [f"{NOTES[note]}: {len(keys)}, the first is {keys[0]}" for note, keys in sorted(self.noted.items())]
        if not self.native:
            found += self._conventions()
        train = self.pixels.get("train")
        if train is not None:
            absent = train == 0
            found += self._about(absent & (self.totals() == 0), "never occur")
            for split, counts in self.pixels.items():
                found += self._about(absent & (counts > 0), f"occur in {split} but never in train")
        return found

    def _conventions(self) -> list[str]:
        """What 0 and 255 seem to mean, where it is not what it means here."""
        found = []
        for i, name in enumerate(self.names):
            if name.lower() in UNLABELLED:
                found.append(f"id {i} is the class {name!r}, trained and counted as any other; write 255 to ignore it")
        occurs = self.totals() > 0
        if occurs[1:].any() and not occurs[0]:
            found.append(f"id 0 ({self.names[0]}) never occurs: if the masks count from 1, every label is one too high")
        if len(occurs) > 1 and occurs[0] and not occurs[1:].any() and sum(self.ignored.values()):
            found.append(
                "the masks hold 0 and 255 only: 255 is ignored; if it means a class here, write its id instead"
            )
        return found

    def _about(self, which: NDArray[np.bool_], what: str) -> list[str]:
        names = [self.names[i] for i in np.flatnonzero(which)]
        if not names:
            return []
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        return [f"classes that {what}: {', '.join(names[:SHOWN])}{more}"]


def _orientation(image: bytes) -> tuple[bool, tuple[int, int]]:
    """(whether EXIF turns or mirrors the image, (height, width) as stored)."""
    with Image.open(io.BytesIO(image)) as raw:
        # Pillow decodes a PNG a second time to look for its EXIF, which next to none has.
        turned = raw.format != "PNG" and raw.getexif().get(0x0112, 1) in range(2, 9)
        return turned, (raw.height, raw.width)


def _outside(outside: list[int], counts: NDArray[np.int64], classes: int) -> str:
    possible = f"ids 0 to {classes - 1} and {IGNORE_INDEX}, ignored, are possible"
    hint = f"; correct the mask, or add the classes to classes.json ({possible})"
    if outside == [classes]:
        seem = "the ids seem to start at 1" if counts[0] == 0 else "if 0 means unlabelled, the ids start at 1"
        hint = f"; {seem}: subtract 1, with 0 becoming 255"
    return f"the mask has ids out of range: {', '.join(map(str, outside[:SHOWN]))}{hint}"


def _class_ids(data: bytes, classes: list[dict[str, Any]]) -> tuple[UInt8, bytes, bool]:
    """Ids, the PNG that holds them, and whether it was painted in the classes' colours."""
    image_size(data)  # raises ImageError for what Pillow cannot open
    with Image.open(io.BytesIO(data)) as image:
        colour, is_png = image.mode in ("RGB", "RGBA"), image.format == "PNG"
        palette = np.array(image.getpalette("RGB") or [], np.int64).reshape(-1, 3) @ PACKED
    colours = [c["color"] for c in classes]
    if colour:
        ids = _ids_of_colours(decode_image(data).astype(np.int64) @ PACKED, classes)
        return ids, encode_mask(ids, colours), True
    ids = decode_mask(data)
    if (table := _table_of_palette(np.unique(ids), palette, classes)) is not None:
        ids = table[ids]
        return ids, encode_mask(ids, colours), True
    return ids, data if is_png else encode_mask(ids, colours), False


def _ids_of_colours(painted: NDArray[np.int64], classes: list[dict[str, Any]]) -> UInt8:
    """(H, W) packed colours -> ids by table. Black is ignored where no class has it."""
    known = _by_colour(classes)
    ids = np.full(painted.shape, IGNORE_INDEX, np.uint8)
    for value in np.unique(painted).tolist():
        found = known.get(value, [])
        colour = [value >> 16, value >> 8 & 255, value & 255]
        if not found and value != BLACK:
            raise ImageError(f"a colour mask with a colour that no class has: {colour}")
        if len(found) > 1:
            raise ImageError(f"a colour mask with a colour that several classes have: {colour}")
        if found:
            ids[painted == value] = found[0]
    return ids


def _table_of_palette(used: UInt8, palette: NDArray[np.int64], classes: list[dict[str, Any]]) -> UInt8 | None:
    """Index -> id, where an indexed PNG shows every index in a class's colour, or black, but numbers them otherwise.

    Editors number the colours of a palette as they come: such indices are not ids. None where the indices are the ids.
    """
    indices = [int(i) for i in used if i != IGNORE_INDEX]
    if not indices or max(indices) >= len(palette):
        return None
    known = _by_colour(classes)
    shown = {i: known.get(int(palette[i]), []) for i in indices}
    if any(len(found) != 1 and (found or palette[i] != BLACK) for i, found in shown.items()):
        return None
    if all(i in found for i, found in shown.items() if found):  # black alone proves nothing: it is a palette's default
        return None
    table = np.full(256, IGNORE_INDEX, np.uint8)
    for i, found in shown.items():
        table[i] = found[0] if found else IGNORE_INDEX
    return table


def _by_colour(classes: list[dict[str, Any]]) -> dict[int, list[int]]:
    """Packed colour -> the ids that have it."""
    known = defaultdict(list)
    for c in classes:
        known[int(np.array(c["color"]) @ PACKED)].append(int(c["id"]))
    return dict(known)
