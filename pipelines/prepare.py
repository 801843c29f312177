"""Images and masks -> a sharded dataset. What is rejected is named with its reason; what is suspicious is a warning.

Which files belong together is for layouts.py, what is wrong with them for linter.py.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.config import PrepareConfig, Recipe
from pipelines.dataset import MANIFEST, SCHEMA, Dataset, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.layouts import Contents, check_listing, layout_part, read_layout
from pipelines.linter import Row, Survey, check_pair
from pipelines.pairs import SPLITS, Pair, Reject
from pipelines.progress import say
from pipelines.scenes import write_scenes
from pipelines.stage import Receipt, StageRun, digest_of, latest_receipt, run_stage
from pipelines.storage import Folder, home

PACKAGES = ("pipelines", "repsep_model")
REJECTS_SHOWN = 5
THREADS = 8


def prepare(workspace: str, config: PrepareConfig) -> Receipt:
    """Run the stage. Raises RepsepError if too many pairs are rejected, UsageError for a source that is no dataset."""
    source = Folder(config.source) if config.source is not None else Folder(str(generated_scenes(config.seed)))
    listed = [(e.key, e.size, e.etag) for e in source.list()]
    keys = [key for key, _, _ in listed]
    check_listing(source, keys, config)
    part = layout_part(keys, config)
    entries = [entry for entry in listed if entry[0] in part]
    listing = digest_of([source.uri, *sorted(entries)])
    return run_stage(
        "prepare",
        workspace=workspace,
        config=config,
        inputs={"source": listing},
        packages=PACKAGES,
        body=lambda run: _write_dataset(run, source, [key for key, _, _ in entries], config),
    )


def prepared_dataset(workspace: str, recipe: Recipe, uri: str | None) -> Dataset:
    """The dataset at `uri` where a section names one, else the latest prepare's.

    Raises UsageError where that was made of another source than the recipe's: another recipe in this workspace did it.
    """
    if uri is not None:
        return open_dataset(uri)
    dataset = open_dataset(latest_receipt(workspace, "prepare").results["dataset"])
    source = recipe.prepare.source
    if source is not None and Folder(source).uri != dataset.manifest["source"]:
        raise UsageError(
            f"the latest prepare in {workspace} is of {dataset.manifest['source']}, but the recipe's prepare.source is "
            f"{source}; run `repsep prepare` with this recipe first"
        )
    return dataset


def _write_dataset(run: StageRun, source: Folder, keys: list[str], config: PrepareConfig) -> None:
    found = read_layout(source, keys, config)
    rejects = list(found.rejects)
    candidates = len(found.pairs) + len(rejects)
    splits: dict[str, Any] = {}
    survey = Survey(found.classes, native=found.labels is not None)
    seen: dict[str, tuple[str, str]] = {}
    for split in sorted({pair.split for pair in found.pairs}, key=SPLITS.index):
        survey.begin(split)
        writer = _ShardWriter(run.folder, f"dataset/{split}", config)
        for row in _checked_rows(source, found, split, rejects, seen):
            survey.add(split, row)
            writer.add(row)
        counted = {"pixels": survey.pixels[split].tolist(), "ignored": survey.ignored[split]}
        splits[split] = writer.close() | counted
    _write_rejects(run.folder, rejects)
    rate = len(rejects) / max(1, candidates)
    if rate > config.max_reject_rate:
        first = "; ".join(f"{source.uri_of(r.key)}: {r.reason}" for r in rejects[:REJECTS_SHOWN])
        raise RepsepError(
            f"{len(rejects)} of {candidates} pairs were rejected, more than "
            f"prepare.max_reject_rate={config.max_reject_rate} allows. First: {first}. "
            f"All are listed in {run.folder.uri_of('rejects.parquet')}"
        )
    for split in ("train", "val"):
        if split not in splits or splits[split]["images"] == 0:
            raise UsageError(f"{source.uri} gives no {split} images; both train and val are needed")
    manifest = found.classes_file | {
        "splits": splits,
        "pixels": survey.totals().tolist(),
        "ignored": sum(survey.ignored.values()),
        "group_pattern": found.group_pattern,
        "source": source.uri,
        "layout": config.layout,
        "rejected": len(rejects),
    }
    run.folder.write(f"dataset/{MANIFEST}", json.dumps(manifest, indent=1, ensure_ascii=False).encode())
    run.results = {
        "dataset": run.folder.uri_of("dataset"),
        "images": {name: split["images"] for name, split in splits.items()},
        "classes": len(found.classes),
        "pixels": {name: dict(zip(survey.names, split["pixels"], strict=True)) for name, split in splits.items()},
        "ignored": survey.ignored,
        "warnings": survey.warnings(),
        "rejected": len(rejects),
        "reject_reasons": dict(Counter(r.reason.split(":")[0] for r in rejects)),
    }
    for split in splits:
        say(f"prepare: {split}: {survey.histogram(split)}")
    for line in run.results["warnings"]:
        say(f"prepare: warning: {line}")
    shards = [f"dataset/{s['file']}" for split in splits.values() for s in split["shards"]]
    run.outputs = [f"dataset/{MANIFEST}", "rejects.parquet", *shards]


def _checked_rows(
    source: Folder, found: Contents, split: str, rejects: list[Reject], seen: dict[str, tuple[str, str]]
) -> Iterator[Row]:
    """Rows of a split in order of their pairs, read ahead by threads; rejects are put aside."""

    def check(pair: Pair) -> Row | Reject:
        return check_pair(source, pair, found.classes, found.labels)

    pairs = [pair for pair in found.pairs if pair.split == split]
    with ThreadPoolExecutor(THREADS) as pool:
        for start in range(0, len(pairs), 16 * THREADS):
            batch = pairs[start : start + 16 * THREADS]
            for pair, checked in zip(batch, pool.map(check, batch), strict=True):
                if isinstance(checked, Row):
                    twin = seen.setdefault(checked.image_sha256, (split, checked.key))
                    if twin[0] != split:
                        checked = Reject(pair.image, split, f"the same bytes are in split {twin[0]}: {twin[1]}")
                if isinstance(checked, Reject):
                    rejects.append(checked)
                else:
                    yield checked


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
