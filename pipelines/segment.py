"""Bulk segmentation with Ray Data: every image under a prefix becomes a mask and a row, whatever happens on the way.

list -> leave out what is committed -> read and decode -> segment -> encode and commit -> compact -> report

The stage always lists; it says "cached" only when the listing adds nothing. Killed at any moment and started again,
every image ends with exactly one row and one mask.
"""

from __future__ import annotations

import functools
import json
import logging
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.exceptions import (
    ActorDiedError,
    ActorUnavailableError,
    NodeDiedError,
    OutOfMemoryError,
    RayTaskError,
    WorkerCrashedError,
)
from ray.util.annotations import RayDeprecationWarning

from pipelines import cluster
from pipelines.commits import CLASSES, OK, REPORT, RUN, Committed, Output
from pipelines.config import Recipe, SegmentConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.models import FetchedModel, fetch_model
from pipelines.progress import Progress, say
from pipelines.segment_steps import LISTED_SCHEMA, CommitMasks, CommitSettings, ReadImages, SegmentImages, failed_row
from pipelines.stage import Receipt, StageRun, digest_of, run_stage
from pipelines.storage import Entry, Folder, absolute_uri
from repsep_model.checkpoint import load_classes

PACKAGES = ("pipelines", "repsep_model")
BREAKER_IMAGES = 20
WORKER_LOST = (ActorDiedError, ActorUnavailableError, NodeDiedError, OutOfMemoryError, WorkerCrashedError)
# These do not decide what the output is in the end.
THIS_RUN_ONLY = {"model": None, "limit": None, "retry_failed": False, "overwrite": False, "max_failure_rate": 1.0}
# What decides a mask.
MASK_SETTINGS = ("bf16", "pixel_budget", "confidence", "model_batch")


@dataclass
class Plan:
    """What there is to do: the images to take, and what was left out and why."""

    todo: list[Entry]
    listed: int
    skipped: int
    done: int
    failed_before: int
    listing: str


@dataclass
class Tally:
    """What was done in this run."""

    ok: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    megapixels: float = 0.0

    def add(self, row: dict[str, Any]) -> None:
        if row["status"] == OK:
            self.ok += 1
            self.megapixels += row["height"] * row["width"] / 1e6
        else:
            self.failed += 1
            self.reasons[row["stage"]] += 1


def segment(workspace: str, recipe: Recipe, *, dry_run: bool = False) -> Receipt | Plan:
    """Run the stage; with `dry_run` only list and compare, writing nothing.

    Raises UsageError for an empty prefix or an output of another model, RepsepError when too many images fail.
    """
    config = recipe.segment or SegmentConfig()
    source, target = _folders(config)
    model_uri = config.model or f"models:/{recipe.register_.name}@champion"
    with fetch_model(model_uri, recipe.tracking) as model:
        output = Output(target)
        identity = _identity(config, model, source)
        images, skipped = _images(source, target, config)  # before the output is touched
        if dry_run:
            ours = output.check(identity, overwrite=config.overwrite) == "ours"
            return _plan(images, skipped, config, output.committed() if ours else {})
        output.claim(identity, load_classes(model.directory), overwrite=config.overwrite)
        plan = _plan(images, skipped, config, output.committed())
        return run_stage(
            "segment",
            workspace=workspace,
            config=config.model_copy(update=THIS_RUN_ONLY),
            inputs={"model": model.digest, "listing": plan.listing},
            packages=PACKAGES,
            again=bool(plan.todo) or output.has_commits(),
            body=lambda run: _segment(run, config, source, output, model, plan, images),
        )


def image_entries(source: Folder, target: Folder, include: tuple[str, ...]) -> Iterator[tuple[Entry, bool]]:
    """(object, is it an image) of everything under the prefix; an output inside the input is left out."""
    inside = target.uri.removeprefix(source.uri + "/") + "/" if target.uri.startswith(source.uri + "/") else None
    for entry in source.list():
        if inside is None or not entry.key.startswith(inside):
            yield entry, entry.key.lower().endswith(include)


def _folders(config: SegmentConfig) -> tuple[Folder, Folder]:
    if config.source is None or config.target is None:
        raise UsageError("segment needs an input and an output: segment.source and segment.target (URIs)")
    source, target = absolute_uri(config.source).rstrip("/"), absolute_uri(config.target).rstrip("/")
    if source == target:
        raise UsageError(f"segment.source and segment.target are both {source}; masks need a prefix of their own")
    return Folder(source), Folder(target)


def _identity(config: SegmentConfig, model: FetchedModel, source: Folder) -> dict[str, Any]:
    settings = config.model_dump(mode="json")
    fixed = {"format": 1, "model": model.digest, "source": source.uri}  # keys are relative to the source
    return fixed | {name: settings[name] for name in MASK_SETTINGS}


def _images(source: Folder, target: Folder, config: SegmentConfig) -> tuple[list[Entry], int]:
    """The images below the prefix and how many other objects there are. Raises UsageError where there is none."""
    include = tuple(ending.lower() for ending in config.include)
    entries = list(image_entries(source, target, include))
    images = [entry for entry, is_image in entries if is_image]
    if not images:
        found = f"{len(entries)} other objects" if entries else "nothing"
        raise UsageError(
            f"{source.uri} holds no image ({found} there; images end in {', '.join(include)}); correct the prefix"
        )
    return images, len(entries) - len(images)


def _plan(images: list[Entry], skipped: int, config: SegmentConfig, known: dict[str, Committed]) -> Plan:
    todo, failed_before = [], 0
    for entry in images:
        before = known.get(entry.key)
        if before is None or before.etag != entry.etag:
            todo.append(entry)
        elif not before.ok:
            failed_before += 1
            if config.retry_failed:
                todo.append(entry)
    done = len(images) - len(todo)
    listing = digest_of(sorted((e.key, e.etag) for e in images))
    return Plan(todo[: config.limit], len(images), skipped, done, failed_before, listing)


def _segment(
    run: StageRun,
    config: SegmentConfig,
    source: Folder,
    output: Output,
    model: FetchedModel,
    plan: Plan,
    images: list[Entry],
) -> None:
    output.compact()
    say(
        f"segment: {plan.listed} images in {source.uri}, {plan.done} done before, {plan.skipped} other objects; "
        f"{len(plan.todo)} to do"
    )
    began = time.monotonic()
    try:
        tally = _Job(config, source, output, model).run(plan.todo) if plan.todo else Tally()
    finally:
        rows, _ = output.compact()  # also when it failed: people read results/, not _commits/
    known = output.committed()
    failed_rows = sum(e.key in known and not known[e.key].ok for e in images)  # those deleted since do not count
    seconds = time.monotonic() - began
    report = {
        "source": source.uri,
        "target": output.folder.uri,
        "model": model.version,
        "images": plan.listed,
        "skipped": plan.skipped,
        "rows": rows,
        "failed_rows": failed_rows,
        "ok": tally.ok,
        "failed": tally.failed,
        "done_before": plan.done,
        "failed_before": plan.failed_before,
        "failures": dict(tally.reasons),
        "seconds": round(seconds, 2),
        "images_per_s": round((tally.ok + tally.failed) / seconds, 2) if plan.todo else 0.0,
        "megapixels_per_s": round(tally.megapixels / seconds, 3) if plan.todo else 0.0,
    }
    output.folder.write(REPORT, json.dumps(report, indent=1).encode())
    run.results = report | {
        "results": output.folder.uri_of("results"),
        "run": output.folder.uri_of(RUN),
        "classes": output.folder.uri_of(CLASSES),
    }


class _Job:
    """One pass over the images that are to do, with all that can be lost on the way."""

    def __init__(self, config: SegmentConfig, source: Folder, output: Output, model: FetchedModel) -> None:
        self.config, self.source, self.output, self.model = config, source, output, model
        self.classes = load_classes(model.directory)
        self.tally = Tally()
        self.last_error = ""

    def run(self, todo: list[Entry]) -> Tally:
        """Batches through Ray Data; when workers keep dying, what is left goes image by image."""
        cluster.connect()
        cluster.refuse_local(self.source.uri, "segment.source")
        cluster.refuse_local(self.output.folder.uri, "segment.target")
        self.files = ray.put(self.model.files())
        self.progress = Progress("segment: image", len(todo))
        waiting = {entry.key: entry for entry in todo}
        for _ in range(1 + self.config.runtime.retries):
            try:
                for row in self._batches(list(waiting.values())):
                    self._count(row)
                    del waiting[row["key"]]
                return self.tally
            except WORKER_LOST as error:
                say(f"segment: a worker was lost ({type(error).__name__}); {len(waiting)} images are tried again")
                waiting = self._uncommitted(waiting)
        for row in self._one_by_one(list(waiting.values())):
            self._count(row)
        return self.tally

    def _batches(self, todo: list[Entry]) -> Iterator[dict[str, Any]]:
        config, runtime = self.config, self.config.runtime
        use_gpu = cluster.has_gpu() if runtime.gpu is None else runtime.gpu
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        logging.getLogger("ray.data").setLevel(logging.WARNING)
        context.print_on_execution_start = False
        size = runtime.batch_size
        rows = [{"key": e.key, "etag": e.etag, "size": e.size} for e in todo]
        blocks = [pa.Table.from_pylist(rows[i : i + size], schema=LISTED_SCHEMA) for i in range(0, len(rows), size)]
        # Ray Data's default is to retry without end. Ray 2.60 deprecates every way to say so and names no other yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args", category=RayDeprecationWarning)
        task: dict[str, Any] = {
            "batch_format": "pyarrow",
            "batch_size": size,
            "num_cpus": 0.5,  # half of the time it waits for the store
            "ray_remote_args_fn": lambda: {"max_retries": runtime.retries},
        }
        data: Any = (
            ray.data.from_arrow(blocks)
            .map_batches(functools.partial(_read, source=self.source.uri, config=config), **task)
            .map_batches(
                SegmentActor,
                fn_constructor_args=(self.files, config),
                compute=ray.data.ActorPoolStrategy(size=runtime.model_actors),
                batch_format="pyarrow",
                batch_size=size,
                num_cpus=self._actor_cpus(),
                num_gpus=1 if use_gpu else 0,
                ray_remote_args_fn=lambda: {"max_restarts": runtime.retries, "max_task_retries": runtime.retries},
            )
            .map_batches(functools.partial(_commit, settings=self._commit_settings()), **task)
        )
        try:
            for batch in data.iter_batches(batch_size=None, batch_format="pyarrow"):
                yield from batch.to_pylist()
        except RayTaskError as error:
            if isinstance(error.cause, RepsepError):
                raise error.cause from error
            raise

    def _one_by_one(self, todo: list[Entry]) -> Iterator[dict[str, Any]]:
        """Each image in a task of its own: the one that kills its worker becomes a row with stage `worker`."""
        task = ray.remote(num_cpus=1, num_gpus=1 if cluster.has_gpu() else 0, max_retries=0)(_segment_one)
        settings = (self.files, self.source.uri, self.config, self._commit_settings())
        limit = max(1, int(ray.cluster_resources().get("CPU", 1)))
        running: dict[Any, dict[str, Any]] = {}
        queue = [{"key": e.key, "etag": e.etag, "size": e.size} for e in reversed(todo)]
        while queue or running:
            while queue and len(running) < limit:
                row = queue.pop()
                running[task.remote(row, *settings)] = row
            (done,), _ = ray.wait(list(running))
            row = running.pop(done)
            try:
                yield ray.get(done)
            except WORKER_LOST as error:
                reason = f"its worker process died ({type(error).__name__})"
                failed = failed_row(
                    row, source=self.source, model_version=self.model.version, stage="worker", error=reason
                )
                self.output.commit([failed])
                yield failed

    def _actor_cpus(self) -> float:
        """A CPU for each model actor, less where that would leave none to read with."""
        return min(1.0, max(0.1, (ray.cluster_resources().get("CPU", 1) - 0.5) / self.config.runtime.model_actors))

    def _commit_settings(self) -> CommitSettings:
        colours = tuple(tuple(c["color"]) for c in self.classes["classes"])
        return CommitSettings(
            self.source.uri, self.output.folder.uri, colours, self.config.confidence, self.model.version
        )

    def _uncommitted(self, waiting: dict[str, Entry]) -> dict[str, Entry]:
        """What has no row yet: batches may have been committed whose answer was lost with the worker."""
        known = self.output.committed()
        left = {}
        for key, entry in waiting.items():
            before = known.get(key)
            again = self.config.retry_failed and before is not None and not before.ok
            if before is None or before.etag != entry.etag or again:
                left[key] = entry
            else:
                self._count({"status": OK if before.ok else "failed", "stage": "", "height": 0, "width": 0})
        return left

    def _count(self, row: dict[str, Any]) -> None:
        self.tally.add(row)
        self.progress.advance(1, f"{self.tally.failed} failed" if self.tally.failed else "")
        self.last_error = row.get("error") or self.last_error
        tally = self.tally
        seen = tally.ok + tally.failed
        if seen >= BREAKER_IMAGES and tally.failed > self.config.max_failure_rate * seen:
            raise RepsepError(
                f"{tally.failed} of the first {seen} images failed ({dict(tally.reasons)}), more than "
                f"segment.max_failure_rate={self.config.max_failure_rate} allows. The last: {self.last_error}. "
                f"All are in {self.output.folder.uri_of('results')}; mend the cause, then add --retry-failed"
            )


class SegmentActor(SegmentImages):
    """The model's actor: takes the model's files out of the object store, where they lie once for all actors."""

    def __init__(self, files: Any, config: SegmentConfig) -> None:
        super().__init__(ray.get(files), config)


# A task's process keeps its connections for the batches to come.
_reader = functools.lru_cache(maxsize=4)(ReadImages)
_committer = functools.lru_cache(maxsize=4)(CommitMasks)


def _read(todo: pa.Table, source: str, config: SegmentConfig) -> pa.Table:
    return _reader(source, config)(todo)


def _commit(labels: pa.Table, settings: CommitSettings) -> pa.Table:
    return _committer(settings)(labels)


def _segment_one(
    row: dict[str, Any], files: dict[str, bytes], source: str, config: SegmentConfig, settings: CommitSettings
) -> dict[str, Any]:
    todo = pa.Table.from_pylist([row], schema=LISTED_SCHEMA)
    labels = SegmentImages(files, config)(_read(todo, source, config))
    found: list[dict[str, Any]] = _commit(labels, settings).to_pylist()
    return found[0]
