"""Folders of images and masks -> a sharded dataset. Also the label linter: what is rejected is named with its reason.

The default layout is images/{split}/**, masks/{split}/** (same path, .png) and classes.json. Without split folders the
pairs are split deterministically by group.
"""

from __future__ import annotations

import hashlib
import io
import json
import posixpath
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.config import PrepareConfig
from pipelines.dataset import MANIFEST, SCHEMA, group_of, in_share
from pipelines.errors import RepsepError, StorageError, UsageError
from pipelines.scenes import write_scenes
from pipelines.stage import Receipt, StageRun, digest_of, run_stage
from pipelines.storage import Folder, home
from repsep_model.images import ImageError, UInt8, decode_image, decode_mask, encode_mask, image_size
from repsep_model.labels import IGNORE_INDEX, MAX_CLASSES

PACKAGES = ("pipelines", "repsep_model")
IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".tif", ".tiff", ".bmp")
MASK_EXTENSIONS = (".png", ".tif", ".tiff", ".bmp")
SPLITS = ("train", "val", "test")
REJECTS_SHOWN = 5
THREADS = 8


@dataclass(frozen=True)
class Pair:
    """An image and its mask, by their keys in the source; `mask` is None where there is none."""

    split: str
    image: str
    mask: str | None


@dataclass(frozen=True)
class Row:
    """A pair that passed: what goes into a shard."""

    key: str
    image: bytes
    mask: bytes
    height: int
    width: int
    counts: UInt8 | Any
    image_sha256: str


@dataclass(frozen=True)
class Reject:
    """A pair that did not: which file, and why."""

    key: str
    split: str
    reason: str


def prepare(workspace: str, config: PrepareConfig) -> Receipt:
    """Run the stage. Raises RepsepError if too many pairs are rejected, UsageError for a source that is no dataset."""
    source = Folder(config.source) if config.source is not None else Folder(str(generated_scenes(config.seed)))
    entries = [
        (e.key, e.size, e.etag)
        for e in source.list()
        if e.key.startswith(("images/", "masks/")) or e.key == "classes.json"
    ]
    listing = digest_of([source.uri, *sorted(entries)])
    return run_stage(
        "prepare",
        workspace=workspace,
        config=config,
        inputs={"source": listing},
        packages=PACKAGES,
        body=lambda run: _write_dataset(run, source, [key for key, _, _ in entries], config),
    )


def read_classes(source: Folder) -> dict[str, Any]:
    """classes.json, checked: ids 0..K-1 in order, names, colours. Raises UsageError."""
    data = source.read_if_present("classes.json")
    if data is None:
        raise UsageError(
            f"{source.uri} has no classes.json; it lists the classes as [{{id, name, color: [r, g, b]}}, ...]"
        )
    try:
        found = json.loads(data)
        classes: list[dict[str, Any]] = [
            {"id": int(c["id"]), "name": str(c["name"]), "color": [int(v) for v in c["color"]]}
            for c in found["classes"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(
            f"{source.uri_of('classes.json')} cannot be understood: {type(error).__name__} {error}"
        ) from error
    if not classes or len(classes) > MAX_CLASSES:
        raise UsageError(f"{source.uri_of('classes.json')} has {len(classes)} classes; 1 to {MAX_CLASSES} are possible")
    if [c["id"] for c in classes] != list(range(len(classes))):
        raise UsageError(
            f"{source.uri_of('classes.json')}: ids must be 0 to {len(classes) - 1} in order; 255 is what is ignored"
        )
    if any(len(c["color"]) != 3 or not all(0 <= v <= 255 for v in c["color"]) for c in classes):
        raise UsageError(f"{source.uri_of('classes.json')}: every colour needs three values in 0..255")
    name = str(found.get("name") or posixpath.basename(source.uri))
    return {"name": name, "ignore_index": IGNORE_INDEX, "classes": classes}


def find_pairs(keys: Iterable[str], config: PrepareConfig) -> list[Pair]:
    """Pair images with masks by path; splits from the folders, or by group where there are none."""
    by_stem = {
        k[len("masks/") :].rpartition(".")[0]: k
        for k in keys
        if k.startswith("masks/") and k.lower().endswith(MASK_EXTENSIONS)
    }
    images = sorted(k for k in keys if k.startswith("images/") and k.lower().endswith(IMAGE_EXTENSIONS))
    stems = {k: k[len("images/") :].rpartition(".")[0] for k in images}
    outside = [image for image in images if not stems[image].startswith(tuple(f"{split}/" for split in SPLITS))]
    split_folders = not outside
    if outside and len(outside) < len(images):
        raise UsageError(
            f"some images are in folders for a split, {outside[0]} is not; move all below images/train, images/val or "
            "images/test, or rename those folders"
        )
    pairs = []
    for image in images:
        if split_folders:
            split = stems[image].partition("/")[0]
        else:
            group = group_of(image[len("images/") :], config.group_pattern)
            split = "val" if in_share(group, config.val_fraction, config.seed) else "train"
        pairs.append(Pair(split, image, by_stem.get(stems[image])))
    return pairs


def check_pair(source: Folder, pair: Pair, classes: list[dict[str, Any]]) -> Row | Reject:
    """Read a pair and judge it; a colour mask in the classes' colours is converted, anything else wrong is rejected."""
    if pair.mask is None:
        return Reject(pair.image, pair.split, "it has no mask (the same path under masks/, .png)")
    try:
        image, mask = source.read(pair.image), source.read(pair.mask)
    except StorageError as error:
        return Reject(pair.image, pair.split, str(error))
    try:
        pixels = decode_image(image)
    except ImageError as error:
        return Reject(pair.image, pair.split, str(error))
    try:
        ids, mask = _class_ids(mask, classes)
    except ImageError as error:
        return Reject(pair.mask, pair.split, str(error))
    if ids.shape != pixels.shape[:2]:
        with Image.open(io.BytesIO(image)) as raw:
            turned = ids.shape == raw.size[::-1]
        hint = "; the image carries an EXIF rotation that the mask does not have" if turned else ""
        return Reject(
            pair.mask,
            pair.split,
            f"the mask is {ids.shape[1]} x {ids.shape[0]}, the image {pixels.shape[1]} x {pixels.shape[0]}{hint}",
        )
    counts = np.bincount(ids.ravel(), minlength=256)
    outside = [int(i) for i in np.flatnonzero(counts[:IGNORE_INDEX]) if i >= len(classes)]
    if outside:
        return Reject(pair.mask, pair.split, _outside(outside, counts, len(classes)))
    key = pair.image[len("images/") :]
    height, width = ids.shape
    return Row(key, image, mask, height, width, counts[: len(classes)], hashlib.sha256(image).hexdigest())


def _outside(outside: list[int], counts: Any, classes: int) -> str:
    possible = f"ids 0 to {classes - 1} and {IGNORE_INDEX}, ignored, are possible"
    hint = f"; correct the mask, or add the classes to classes.json ({possible})"
    if outside == [classes] and counts[0] == 0:
        hint = "; the ids seem to start at 1: subtract 1, with 0 becoming 255"
    return f"the mask has ids out of range: {', '.join(map(str, outside[:8]))}{hint}"


def _class_ids(data: bytes, classes: list[dict[str, Any]]) -> tuple[UInt8, bytes]:
    """Ids and the PNG that holds them; masks painted in the classes' colours are converted by table."""
    image_size(data)  # raises ImageError for what Pillow cannot open
    with Image.open(io.BytesIO(data)) as image:
        colour, is_png = image.mode in ("RGB", "RGBA"), image.format == "PNG"
    if not colour:
        ids = decode_mask(data)
        return ids, data if is_png else encode_mask(ids, [c["color"] for c in classes])
    painted = decode_image(data).astype(np.int32) @ np.array([65536, 256, 1])
    ids = np.full(painted.shape, IGNORE_INDEX, np.uint8)
    for c in classes:
        ids[painted == np.array(c["color"]) @ np.array([65536, 256, 1])] = c["id"]
    if (unknown := (ids == IGNORE_INDEX) & (painted != 0)).any():
        first = int(painted[unknown][0])
        raise ImageError(
            f"a colour mask with a colour that no class has: {[first >> 16, first >> 8 & 255, first & 255]}"
        )
    return ids, encode_mask(ids, [c["color"] for c in classes])


def _write_dataset(run: StageRun, source: Folder, keys: list[str], config: PrepareConfig) -> None:
    described = read_classes(source)
    classes = described["classes"]
    pairs = find_pairs(keys, config)
    if not pairs:
        raise UsageError(
            f"{source.uri} has no images under images/; the layout is images/<split>/*.jpg, "
            "masks/<split>/*.png, classes.json"
        )
    rejects: list[Reject] = []
    splits: dict[str, Any] = {}
    pixels = np.zeros(len(classes), np.int64)
    seen: dict[str, tuple[str, str]] = {}
    for split in sorted({pair.split for pair in pairs}, key=SPLITS.index):
        rows = _checked_rows(source, [p for p in pairs if p.split == split], classes, rejects, seen)
        writer = _ShardWriter(run.folder, f"dataset/{split}", config)
        for row in rows:
            pixels += row.counts
            writer.add(row)
        splits[split] = writer.close()
    _write_rejects(run.folder, rejects)
    rate = len(rejects) / len(pairs)
    if rate > config.max_reject_rate:
        first = "; ".join(f"{source.uri_of(r.key)}: {r.reason}" for r in rejects[:REJECTS_SHOWN])
        raise RepsepError(
            f"{len(rejects)} of {len(pairs)} pairs were rejected, more than "
            f"prepare.max_reject_rate={config.max_reject_rate} allows. First: {first}. "
            f"All are listed in {run.folder.uri_of('rejects.parquet')}"
        )
    for split in ("train", "val"):
        if split not in splits or splits[split]["images"] == 0:
            raise UsageError(f"{source.uri} gives no {split} images; both train and val are needed")
    manifest = described | {
        "splits": splits,
        "pixels": pixels.tolist(),
        "group_pattern": config.group_pattern,
        "source": source.uri,
        "rejected": len(rejects),
    }
    run.folder.write(f"dataset/{MANIFEST}", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    run.results = {
        "dataset": run.folder.uri_of("dataset"),
        "images": {name: split["images"] for name, split in splits.items()},
        "classes": len(classes),
        "rejected": len(rejects),
        "reject_reasons": dict(Counter(r.reason.split(":")[0] for r in rejects)),
    }
    shards = [f"dataset/{s['file']}" for split in splits.values() for s in split["shards"]]
    run.outputs = [f"dataset/{MANIFEST}", "rejects.parquet", *shards]


def _checked_rows(
    source: Folder,
    pairs: list[Pair],
    classes: list[dict[str, Any]],
    rejects: list[Reject],
    seen: dict[str, tuple[str, str]],
) -> Iterator[Row]:
    """Rows in order of their pairs, read ahead by threads; rejects are put aside."""
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(pairs), 16 * THREADS):
            batch = pairs[start : start + 16 * THREADS]
            for pair, found in zip(batch, pool.map(lambda p: check_pair(source, p, classes), batch), strict=True):
                if isinstance(found, Row):
                    twin = seen.setdefault(found.image_sha256, (pair.split, found.key))
                    if twin[0] != pair.split:
                        found = Reject(pair.image, pair.split, f"the same bytes are in split {twin[0]}: {twin[1]}")
                if isinstance(found, Reject):
                    rejects.append(found)
                else:
                    yield found


class _ShardWriter:
    """Writes rows to part files of `shard_rows` rows and keeps what dataset.json says of them."""

    def __init__(self, folder: Folder, prefix: str, config: PrepareConfig) -> None:
        self.folder, self.prefix, self.config = folder, prefix, config
        self.waiting: list[Row] = []
        self.shards: list[dict[str, Any]] = []

    def add(self, row: Row) -> None:
        self.waiting.append(row)
        if len(self.waiting) == self.config.shard_rows:
            self._flush()

    def close(self) -> dict[str, Any]:
        if self.waiting:
            self._flush()
        return {"images": sum(s["rows"] for s in self.shards), "digest": digest_of(self.shards), "shards": self.shards}

    def _flush(self) -> None:
        rows, self.waiting = self.waiting, []
        columns = {name: [getattr(r, name) for r in rows] for name in ("key", "image", "mask", "height", "width")}
        columns["classes"] = [np.flatnonzero(r.counts).tolist() for r in rows]
        out = io.BytesIO()
        size = self.config.row_group_rows
        pq.write_table(
            pa.table(columns, schema=SCHEMA),
            out,
            row_group_size=size,
            compression={"key": "zstd"} | dict.fromkeys(("image", "mask"), "none"),
        )
        data = out.getvalue()
        file = f"{self.prefix.partition('/')[2]}/part-{len(self.shards):05d}.parquet"
        self.folder.write(f"dataset/{file}", data)
        groups = [min(size, len(rows) - start) for start in range(0, len(rows), size)]
        self.shards.append(
            {"file": file, "rows": len(rows), "row_groups": groups, "sha256": hashlib.sha256(data).hexdigest()}
        )


def _write_rejects(folder: Folder, rejects: list[Reject]) -> None:
    schema = pa.schema([("key", pa.string()), ("split", pa.string()), ("reason", pa.string())])
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([vars(r) for r in rejects], schema=schema), out)
    folder.write("rejects.parquet", out.getvalue())


def generated_scenes(seed: int) -> Path:
    """The folder of generated scenes in `home()`, written if it is not there."""
    folder = home() / f"scenes-{seed}"
    write_scenes(folder, seed=seed)
    return folder
