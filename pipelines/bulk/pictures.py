"""How masks look: overlays of sampled images as pictures of a page, from image files or out of shards."""

from __future__ import annotations

import io
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from pipelines.bulk.shards import read_shard
from pipelines.bulk.survey import SAMPLE_PIXELS, SAMPLES, Kind, Survey
from pipelines.config import SegmentConfig
from pipelines.errors import RepsepError
from pipelines.pages import data_uri
from pipelines.storage import Folder, storage_errors
from repsep_model.images import ImageError, UInt8, decode_image, decode_mask, overlay

PICTURE_WIDTH = 480
SHARDS_READ, SHARD_BYTES = 3, 512 * 1024 * 1024
MASK_ROWS = 64
Colours = Sequence[Sequence[int]]
Row = dict[str, Any]


def sample_pictures(
    found: Survey, source: Folder, target: Folder, colours: Colours, *, kind: Kind, config: SegmentConfig
) -> list[Row]:
    """key, confidence and picture (an overlay as a data URI) of the sampled images.

    A picture that cannot be had any more, such as of an image that was deleted or replaced, is left out.
    """
    encoded = (
        _of_shards(found.sample, source, target, config)
        if kind == "shards"
        else _of_images(found.sample, source, target)
    )
    pictures = []
    for row, image_file, mask_file in encoded:
        try:
            image, ids = decode_image(image_file, SAMPLE_PIXELS), decode_mask(mask_file)
        except ImageError:
            continue
        if image.shape[:2] == ids.shape:
            about = {"key": row["key"], "confidence": row["confidence"]}
            pictures.append(about | {"picture": data_uri(_overlay(image, ids, colours), "jpeg")})
    return sorted(pictures, key=lambda p: str(p["key"]))


def _of_images(sample: list[Row], source: Folder, target: Folder) -> Iterator[tuple[Row, bytes, bytes]]:
    for row in sample:
        try:
            yield row, source.read(row["key"]), target.read(_key_in(target, row["mask_uri"]))
        except RepsepError:
            continue


def _of_shards(
    sample: list[Row], source: Folder, target: Folder, config: SegmentConfig
) -> Iterator[tuple[Row, bytes, bytes]]:
    """Of few shards that are not large: each is read until the last image that is asked for, and its masks once."""
    small: dict[str, str] = {}  # URI -> key
    for uri in dict.fromkeys(row["uri"] for row in sample):
        if len(small) < SHARDS_READ and _is_small(source, _key_in(source, uri)):
            small[uri] = _key_in(source, uri)
    chosen = sorted((row for row in sample if row["uri"] in small), key=lambda row: int(row["rank"]))[:SAMPLES]
    for uri, shard in small.items():
        rows = {row["key"].removeprefix(f"{shard}#"): row for row in chosen if row["uri"] == uri}
        try:
            masks = _masks(target, {_key_in(target, row["mask_uri"]) for row in rows.values()}, rows)
            images = _members(source, shard, rows, config)
        except (RepsepError, pa.ArrowException):
            continue
        yield from ((rows[name], images[name], masks[name]) for name in rows if name in images and name in masks)


def _is_small(source: Folder, shard: str) -> bool:
    try:
        size = source.size_of(shard)
    except RepsepError:
        return False
    return size is not None and size <= SHARD_BYTES


def _members(source: Folder, shard: str, wanted: Collection[str], config: SegmentConfig) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    members = read_shard(
        source, shard, image_column=config.image_column, key_column=config.key_column, include=config.include
    )
    for member in members:
        if member.name in wanted and member.data is not None:
            found[member.name] = member.data
        if len(found) == len(wanted):
            break
    return found


def _masks(target: Folder, keys: Collection[str], wanted: Collection[str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    for key in keys:
        with storage_errors(target.uri_of(key)), target.open(key) as handle:
            for batch in pq.ParquetFile(handle).iter_batches(MASK_ROWS, columns=["key", "mask"]):
                rows = batch.to_pylist()
                found |= {r["key"]: r["mask"] for r in rows if r["key"] in wanted and r["mask"] is not None}
    return found


def _key_in(folder: Folder, uri: str) -> str:
    return uri.removeprefix(f"{folder.uri}/")


def _overlay(image: UInt8, ids: UInt8, colours: Colours) -> bytes:
    """A JPEG of PICTURE_WIDTH at most. Large images are made smaller before they are blended, which takes floats."""
    photo, labels = Image.fromarray(image), Image.fromarray(ids)
    photo.thumbnail((2 * PICTURE_WIDTH, 2 * PICTURE_WIDTH))
    labels = labels.resize(photo.size, Image.Resampling.NEAREST)
    picture = Image.fromarray(overlay(np.asarray(photo), np.asarray(labels), colours))
    picture.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
    out = io.BytesIO()
    picture.save(out, "JPEG", quality=85)
    return out.getvalue()
