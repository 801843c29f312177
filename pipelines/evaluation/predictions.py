"""The masks of a bulk output beside the labels of a split: judged as a model's would be, as far as masks go.

Shapes: K classes, H x W pixels.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bulk.commits import CLASSES, OK, RUN, Output
from pipelines.bulk.result_parts import newest_manifest
from pipelines.config import EvaluateConfig
from pipelines.dataset import Dataset
from pipelines.errors import StorageError, UsageError
from pipelines.evaluation.matching import match
from pipelines.evaluation.measures import Counted, Measured, Unjudged, is_among
from pipelines.pictures import encoded, triptych
from pipelines.stage import digest_of
from pipelines.storage import Folder, storage_errors
from repsep_model.images import ImageError, UInt8, decode_image, decode_mask

COLUMNS = ["key", "uri", "status", "stage", "error", "mask_uri", "model_version"]
Row = dict[str, Any]


@dataclass(frozen=True)
class Place:
    """Where an image's mask is in the output: a PNG, or the row of this name among a shard's; or why there is none."""

    key: str | None
    name: str | None = None
    failure: str | None = None


@dataclass(frozen=True)
class Predictions:
    """What a bulk output has for the images of a split, by their keys in the dataset."""

    folder: Folder
    places: dict[str, Place]
    digest: str
    """Of its settings and its results as they are now."""
    version: str
    """The model that made them, as the rows say."""
    model_digest: str


def open_predictions(uri: str, dataset: Dataset, split: str) -> Predictions:
    """Raises UsageError for what is no finished output, has other classes, or fits no image or not just one."""
    folder = Folder(uri)
    output, about, classes = Output(folder), folder.read_if_present(RUN), folder.read_if_present(CLASSES)
    if about is None or classes is None:
        missing = RUN if about is None else CLASSES
        raise UsageError(f"{folder.uri} is not an output of `repsep segment`: {missing} is missing")
    _check_classes(folder, json.loads(classes), dataset)
    if output.has_commits():
        raise UsageError(
            f"{folder.uri} is not finished: wait for its `repsep segment`, or run that again if it was ended"
        )
    settings = json.loads(about)
    keys = _keys(dataset, split)
    found = match(keys, _named(output, settings["source"]))
    if not found:
        _, row = next(_named(output, settings["source"]), ("", {"key": "none"}))
        raise UsageError(
            f"no mask of {folder.uri} ({output.totals().rows} rows, the first {row['key']}) belongs to an image of the "
            f"split {split} of {dataset.folder.uri} ({len(keys)} images, the first {keys[0]}): their paths must end "
            "alike"
        )
    return Predictions(
        folder,
        {key: _place(folder, row, settings["source"]) for key, row in found.items()},
        digest_of({"run": settings, "parts": newest_manifest(folder).files}),
        next(iter(found.values()))["model_version"],
        settings["model"],
    )


def _check_classes(folder: Folder, listed: Mapping[str, Any], dataset: Dataset) -> None:
    theirs, ours = ({c["id"]: c["name"] for c in those["classes"]} for those in (listed, dataset.manifest))
    wrong = [k for k in sorted(theirs | ours) if theirs.get(k) != ours.get(k)]
    if wrong:
        differences = "; ".join(f"id {k} is {theirs.get(k, 'none')} and {ours.get(k, 'none')}" for k in wrong[:5])
        raise UsageError(
            f"the masks of {folder.uri} and the dataset {dataset.folder.uri} have other classes ({differences}); "
            "they must be the same, by id and name"
        )


def _keys(dataset: Dataset, split: str) -> list[str]:
    part = dataset.split(split)
    return [key for group in range(part.num_groups) for key in part.read(group, ["key"])["key"].to_pylist()]


def _named(output: Output, source: str) -> Iterator[tuple[str, Row]]:
    """Each row with the image's path: its name in the shard where it is of one."""
    for table in output.tables(COLUMNS):
        for batch in table.to_batches(max_chunksize=1024):
            for row in batch.to_pylist():
                yield _name(row, source) or row["key"], row


def _name(row: Row, source: str) -> str | None:
    """The image's name in its shard. An image's own key may hold a # too."""
    shard = row["uri"].removeprefix(f"{source}/")
    return row["key"].removeprefix(f"{shard}#") if row["key"].startswith(f"{shard}#") else None


def _place(folder: Folder, row: Row, source: str) -> Place:
    if row["status"] != OK:
        return Place(None, failure=f"{row['stage']}: {row['error']}")
    if not row["mask_uri"].startswith(f"{folder.uri}/"):
        raise UsageError(
            f"{folder.uri} was written elsewhere: its masks are at {row['mask_uri']}; give the prefix that they are in"
        )
    return Place(row["mask_uri"].removeprefix(f"{folder.uri}/"), _name(row, source))


class UnjudgedError(Exception):
    """An image has no mask that can be compared with its labels."""

    def __init__(self, kind: Literal["missing", "failed", "unreadable", "size"], reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason


class MaskJudge:
    """Measures row groups of a split by masks that are there already; knows nothing of Ray."""

    def __init__(self, folder: Folder, places: Mapping[str, Place], dataset: Dataset, config: EvaluateConfig) -> None:
        self.folder, self.places, self.dataset, self.config = folder, places, dataset, config
        self.split = dataset.split(config.split)
        self.shard: tuple[str, pq.ParquetFile, dict[str, int]] | None = None
        """Of the shard last read: its key, the file, and the place of each name."""
        self.masks: tuple[str, int, list[bytes]] | None = None
        """Of the row group last read: the shard's key, the group's number and its masks."""

    def __call__(self, group: int) -> Measured:
        table, first = self.split.read(group), int(self.split.starts[group])
        found = Counted(first, self.dataset.num_classes)
        for number, row in enumerate(self.split.rows(group).tolist(), first):
            key, mask = table["key"][row].as_py(), decode_mask(table["mask"][row].as_py())
            try:
                labels = self.labels(key, mask.shape)
            except UnjudgedError as error:
                found.unjudged.append(Unjudged(key, error.kind, error.reason))
                continue
            found.add(number, key, mask, labels)
            if is_among(number, len(self.split), self.config.overlays):
                sample = (decode_image(table["image"][row].as_py()), mask, labels)
                found.pictures[number] = encoded(triptych(sample, self.dataset.colours), "JPEG")
        return found.measured()

    def picture(self, key: str, group: int) -> bytes:
        """Image, labels and prediction of one image that has all of them."""
        table = self.split.read(group)
        row = table["key"].to_pylist().index(key)
        image, mask = decode_image(table["image"][row].as_py()), decode_mask(table["mask"][row].as_py())
        return encoded(triptych((image, mask, self.labels(key, mask.shape)), self.dataset.colours), "JPEG")

    def labels(self, key: str, size: tuple[int, ...]) -> UInt8:
        """The predicted ids (H, W) of an image of this size; raises UnjudgedError."""
        place = self.places.get(key)
        if place is None:
            raise UnjudgedError("missing", "the output has no row for it")
        if place.key is None:
            raise UnjudgedError("failed", place.failure or "")
        try:
            ids = decode_mask(self._file(place.key, place.name))
        except (ImageError, StorageError, pa.ArrowException) as error:
            raise UnjudgedError("unreadable", f"{self.folder.uri_of(place.key)}: {error}") from error
        if ids.shape != size:
            here, there = (f"{height} x {width}" for height, width in (size, ids.shape))
            raise UnjudgedError("size", f"its labels have {here} pixels, its mask {there}")
        if ids.max(initial=0) >= self.dataset.num_classes:
            raise UnjudgedError("unreadable", f"its mask holds the id {ids.max()}, which is no class")
        return ids

    def _file(self, where: str, name: str | None) -> bytes:
        """A mask's PNG."""
        if name is None:
            return self.folder.read(where)
        with storage_errors(self.folder.uri_of(where)):
            if self.shard is None or self.shard[0] != where:
                file = pq.ParquetFile(self.folder.open(where))
                names = file.read(columns=["key"])["key"].to_pylist()
                self.shard = where, file, {each: place for place, each in enumerate(names)}
            _, file, places = self.shard
            if name not in places:
                raise ImageError(f"it has no row {name}")
            group, place = 0, places[name]
            while place >= (rows := file.metadata.row_group(group).num_rows):
                group, place = group + 1, place - rows
            if self.masks is None or self.masks[:2] != (where, group):
                self.masks = where, group, file.read_row_group(group, columns=["mask"])["mask"].to_pylist()
            return self.masks[2][place]
