"""One pass of bulk segmentation over the planned objects, on Ray Data: read -> segment -> commit, back-pressured.

A step never raises for an image: what goes wrong is in its row. So the only blocks that Ray Data loses are those whose
process died (a decoder that crashes, memory, a node that is gone); they are dropped there, and what is missing at the
end goes again in further rounds, the last ones image by image: the image that kills its process alone becomes a row.
This module is what reading and writing tasks import: it knows nothing of torch or MLflow.
"""

from __future__ import annotations

import functools
import itertools
import logging
import math
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.util.annotations import RayDeprecationWarning

from pipelines import cluster, counters
from pipelines.bulk.commits import FAILED, OK, Output, ReplacedError
from pipelines.bulk.steps import (
    DONE_SCHEMA,
    IMAGE_SCHEMA,
    LABEL_SCHEMA,
    CommitMasks,
    CommitSettings,
    PassingError,
    ReadImages,
    Row,
    decode,
    reason_of,
    result_row,
    to_rows,
    to_table,
)
from pipelines.bulk.tally import FIRST_IMAGES, Tally
from pipelines.config import SegmentConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.progress import Progress, say
from pipelines.storage import Folder

if TYPE_CHECKING:
    from pipelines.bulk.plan import Plan

HANDOVER_BYTES = 32 * 1024 * 1024
"""Decoded images go from process to process in blocks of about this size, larger ones where the model takes many."""
BLOCKS_PER_CPU, IMAGES_A_BLOCK, SHARDS_A_BLOCK = 8, 1024, 16
IMAGES_PER_ACTOR = 16
"""Fewer do not pay for another model's start."""
MODEL_BYTES = 2 * 1024**3
"""Memory that a model's process takes beside some copies of the weights."""
MERGE_PARTS = 2048
"""So many small commit parts are merged into one while the job goes on."""
ROUNDS, ALONE_AT_MOST = 20, 10_000
RESTARTS = 20
"""How often a model's process may die before it is given up, as long as nothing shows that the model itself works."""
SILENCE_S = 300
"""For so long the output may refuse every commit."""


class SegmentJob:
    """Drives Ray Data over a plan, counts what comes back and puts what was lost on the way through again."""

    def __init__(
        self,
        config: SegmentConfig,
        source: Folder,
        output: Output,
        plan: Plan,
        *,
        files: dict[str, bytes],
        model_version: str,
        colours: tuple[tuple[int, ...], ...],
    ) -> None:
        self.config, self.source, self.output, self.plan = config, source, output, plan
        self.files, self.model_version = files, model_version
        self.settings = CommitSettings(
            source.uri,
            output.folder.uri,
            colours,
            config.confidence,
            model_version,
            config.runtime.threads,
            generation=output.generation,
        )
        self.tally = Tally(retried=plan.retried)
        self.trouble = ""
        self.refused_since: float | None = None
        self.parts: list[str] = []
        self.merging: Future[list[str]] | None = None

    def run(self) -> Tally:
        """Everything planned gets its rows. Raises RepsepError when too many fail or nothing can be committed."""
        cluster.connect(dashboard=False)
        cluster.refuse_local(self.source.uri, "segment.source")
        cluster.refuse_local(self.output.folder.uri, "segment.target")
        self.files_ref = ray.put(self.files)
        self.done = np.zeros(self.plan.todo, bool)
        self.progress = Progress(f"segment: {self.plan.kind.removesuffix('s')}", self.plan.todo)
        self.began = time.monotonic()
        with ThreadPoolExecutor(1, thread_name_prefix="merge") as self.merger:
            self._rounds()
        return self.tally

    def _rounds(self) -> None:
        """Again what was lost, until nothing is, or what is left has died alone."""
        left, alone = self.plan.todo, False
        for _ in range(ROUNDS):
            self._round(alone=alone)
            before, left = left, int((~self.done).sum())
            if left == 0:
                return
            if left == before and (alone or left > ALONE_AT_MOST):
                break
            say(f"segment: {left} {self.plan.kind} did not come through and are tried again. {self.trouble}".rstrip())
            alone = left <= ALONE_AT_MOST
        if self.refused_since is not None:
            raise RepsepError(f"{self.output.folder.uri} cannot be written. {self.trouble}")
        if not alone or (left >= FIRST_IMAGES and not self.done.any()):
            raise RepsepError(
                f"the processes that took the last {left} {self.plan.kind} died before they were done; see Ray's logs. "
                f"Often it is memory: fewer models at once need less (segment.runtime.model_actors). {self.trouble}"
            )
        self._give_up()

    def _round(self, *, alone: bool) -> None:
        """One execution of Ray Data over what is not done; `alone`: no two objects share a process at a time."""
        pipeline = self._images(alone) if self.plan.kind == "images" else self._shards(alone)
        try:
            for batch in pipeline.iter_batches(batch_size=None, batch_format="pyarrow"):
                for row in batch.to_pylist():
                    self._count(row)
                self.tally.batch_came(time.monotonic() - self.began)
                self._breaker()
                self._merge()
        except ray.exceptions.RayError as error:  # what was on a node that is gone, or a model that does not start
            self.trouble = f"The last error: {type(error).__name__}: {str(error).strip()[-500:]}"

    def _blocks(self, alone: bool) -> list[Any]:
        """What is not done, in tables with the position `n` in the plan."""
        cpus = int(ray.cluster_resources().get("CPU", 1))
        most = IMAGES_A_BLOCK if self.plan.kind == "images" else SHARDS_A_BLOCK
        rows = 1 if alone else max(1, min(most, math.ceil(self.plan.todo / (cpus * BLOCKS_PER_CPU))))
        found, first = [], 0
        for block in self.plan.blocks(rows):
            numbers = np.arange(first, first + block.num_rows)
            first += block.num_rows
            keep = ~self.done[numbers]
            if keep.any():
                table = block.append_column("n", pa.array(numbers, pa.int64()))
                found.append(ray.put(table.filter(pa.array(keep))))
        return found

    def _images(self, alone: bool) -> Any:
        read = functools.partial(_read, source=self.source.uri, config=self.config)
        commit = functools.partial(_commit, settings=replace(self.settings, final=alone))
        # Reading and writing wait for the store half of the time; without GPUs they share the cores with the model, and
        # more processes of them would cost more to start than they do.
        task: dict[str, Any] = {"num_cpus": 0.5 if self._use_gpu() else 0.25, "max_retries": 0}
        if not self._use_gpu():
            cpus = int(ray.cluster_resources().get("CPU", 1))
            task["compute"] = ray.data.TaskPoolStrategy(size=max(1, cpus // 2))
        data = self._dataset(alone).map_batches(read, batch_size=None, batch_format="pyarrow", **task)
        options = self._actor_options(alone, cpus=1.0 if self._use_gpu() else 0.5)
        data = data.map_batches(
            SegmentActor, fn_constructor_args=(self._model(), self.config, self.source.uri), **options
        )
        return data.map_batches(commit, batch_size=None, batch_format="pyarrow", **task)

    def _shards(self, alone: bool) -> Any:
        cpus = max(1.0, min(cluster.cpus_per_gpu(), default=1.0) - 1) if self._use_gpu() else 1.0
        options = self._actor_options(alone, cpus=cpus)
        return self._dataset(alone).map_batches(
            ShardActor, fn_constructor_args=(self._model(), self.config, replace(self.settings, final=alone)), **options
        )

    def _dataset(self, alone: bool) -> Any:
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = False
        context.print_on_execution_start = False
        context.target_max_block_size = HANDOVER_BYTES * max(1, self.config.model_batch // 4)
        context.max_errored_blocks = -1  # they are counted here and go again
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
        # Ray 2.60 deprecates every way to give a task's options and names no other yet.
        warnings.filterwarnings("ignore", message="`ray_remote_args", category=RayDeprecationWarning)
        # A round of images that die while they are read leaves the steps behind without any: no reason to warn.
        warnings.filterwarnings("ignore", message="The m..imum number of concurrent", category=UserWarning)
        return ray.data.from_arrow_refs(self._blocks(alone))

    def _use_gpu(self) -> bool:
        if self.config.runtime.gpu and not cluster.has_gpu() and len(cluster.nodes()) == 1:
            raise UsageError("segment.runtime.gpu is true, but this machine has no GPU that Ray knows of")
        return cluster.has_gpu() if self.config.runtime.gpu is None else self.config.runtime.gpu

    def _actors(self) -> int:
        """In how many processes the model runs."""
        there, wanted = ray.cluster_resources(), self.config.runtime.model_actors
        if self._use_gpu():
            gpus = max(1, int(there.get("GPU", 0)))
            most = min(wanted or gpus, gpus)
        else:
            weights = sum(len(data) for data in self.files.values())
            fitting = int(there.get("memory", MODEL_BYTES) // (MODEL_BYTES + 3 * weights))
            most = wanted or max(1, min(int(there.get("CPU", 1)), fitting))
        return min(most, math.ceil(self.plan.todo / (IMAGES_PER_ACTOR if self.plan.kind == "images" else 1)))

    def _model(self) -> ModelSettings:
        threads = max(1, int(ray.cluster_resources().get("CPU", 1)) // len(cluster.nodes()) // self._actors())
        return ModelSettings(self.files_ref, self._use_gpu(), threads)

    def _actor_options(self, alone: bool, *, cpus: float) -> dict[str, Any]:
        """NOTE no retries by Ray: it would retry without end what the node's memory monitor kills."""
        there, actors = ray.cluster_resources().get("CPU", 1), self._actors()
        self.tally.slots = {"reader": int(there), "model": actors, "writer": int(there)}
        cpus = min(cpus, max(0.01, (there - 0.5) / actors))  # some are left to read with
        pool = ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=1 if alone else 4)
        options = {"num_cpus": cpus, "max_restarts": -1 if self.done.any() else RESTARTS, "max_task_retries": 0}
        gpus = int(self._use_gpu())
        return {"compute": pool, "batch_size": None, "batch_format": "pyarrow", "num_gpus": gpus} | options

    def _count(self, row: Row) -> None:
        if row["status"] is None:
            if row["stage"] in ("model", "output"):
                raise RepsepError(row["error"])
            self.trouble = f"The last error: {row['error']}"
            if row["stage"] != "write":
                return
            self.refused_since = self.refused_since or time.monotonic()
            if time.monotonic() - self.refused_since > SILENCE_S:
                raise RepsepError(f"{self.output.folder.uri} cannot be written. {self.trouble}")
            return
        if not self.done[row["n"]]:
            self.done[row["n"]] = True
            self.progress.advance(1, f"{self.tally.failed} failed" if self.tally.failed else "")
        if row["part"]:
            self.refused_since = None
            self.parts.append(row["part"])
        self.tally.add(row)
        if row["status"] == OK:
            counters.IMAGES_DONE.add()
        else:
            counters.IMAGES_FAILED.add(stage=row["stage"])

    def _breaker(self) -> None:
        if (said := self.tally.too_many_failed(self.config.max_failure_rate)) is not None:
            raise RepsepError(
                f"{said}, more than segment.max_failure_rate={self.config.max_failure_rate} allows. "
                f"The last: {self.tally.last_error}. All are in {self.output.folder.uri_of('results')}; "
                "mend the cause, then add --retry-failed"
            )

    def _merge(self) -> None:
        """Small commit parts become large ones in the background, so that the end has not millions to read."""
        if self.merging is not None and self.merging.done():
            self.merging.result()  # an error of the store ends the job
            self.merging = None
        if len(self.parts) >= MERGE_PARTS and self.merging is None:
            self.merging = self.merger.submit(self.output.merge_commits, self.parts)
            self.parts = []

    def _give_up(self) -> None:
        """What did not come through even alone gets a row that says so."""
        first = 0
        for block in self.plan.blocks(IMAGES_A_BLOCK):
            lost = []
            for n, listed in enumerate(block.to_pylist(), first):
                if not self.done[n]:
                    reason = f"its worker process died while it had this alone (a crash, or memory). {self.trouble}"
                    lost.append(listed | {"n": n, "stage": "worker", "error": reason.rstrip()})
            first += block.num_rows
            if lost:
                self.output.commit([result_row(row, self.source, self.model_version) for row in lost])
                for row in lost:
                    self._count(row | {"status": FAILED, "part": None})


@dataclass(frozen=True)
class ModelSettings:
    """What a model's process is told: where the model's files are, and what it runs on."""

    files: Any
    """A reference into the object store, where they lie once for all."""
    gpu: bool
    threads: int


class SegmentActor:
    """The model's actor."""

    def __init__(self, model: ModelSettings, config: SegmentConfig, source: str) -> None:
        from pipelines.bulk.model_step import SegmentImages

        folder = Folder(source)

        def read(row: Row) -> Row:
            return decode(row, lambda: folder.read(row["key"], etag=row["etag"], size=row["size"]), config.max_pixels)

        try:
            self.segment: Any = SegmentImages(
                ray.get(model.files), config, gpu=model.gpu, threads=model.threads, read=read
            )
            self.broken = None
        except RepsepError as error:
            self.broken = error

    def __call__(self, images: pa.Table) -> Iterator[pa.Table]:
        """Large images one at a time, the others together."""
        rows = to_rows(images, {"pixels": 3})
        if self.broken is not None:
            yield to_table([row | {"stage": "model", "error": str(self.broken)} for row in rows], LABEL_SCHEMA)
            return
        large = [row["pixels"] is None and row["error"] is None for row in rows]
        if together := [row for row, alone in zip(rows, large, strict=True) if not alone]:
            yield to_table(self.segment(together), LABEL_SCHEMA)
        for row in itertools.compress(rows, large):
            yield to_table(self.segment([row]), LABEL_SCHEMA)
            row.clear()  # its labels lie in the object store: here they would stay beside the next image


class ShardActor:
    """Shards whole, from reading to the one PUT of their masks."""

    def __init__(self, model: ModelSettings, config: SegmentConfig, settings: CommitSettings) -> None:
        from pipelines.bulk.shard_step import SegmentShards

        try:
            self.steps: Any = SegmentShards(
                ray.get(model.files), config, settings, gpu=model.gpu, threads=model.threads
            )
            self.broken = None
        except RepsepError as error:
            self.broken = error

    def __call__(self, todo: pa.Table) -> Iterator[pa.Table]:
        for shard in todo.to_pylist():
            if self.broken is not None:
                yield _not_committed([shard], self.broken, stage="model")
                continue
            try:
                yield to_table(self.steps(shard), DONE_SCHEMA)
            except Exception as error:
                yield _not_committed([shard], error, stage="read" if isinstance(error, PassingError) else "write")


# A task's process keeps its connections for the batches to come.
_reader = functools.lru_cache(maxsize=4)(ReadImages)
_committer = functools.lru_cache(maxsize=4)(CommitMasks)


def _read(todo: pa.Table, source: str, config: SegmentConfig) -> Iterator[pa.Table]:
    for row in _reader(source, config)(todo.to_pylist()):
        yield to_table([row], IMAGE_SCHEMA)


def _commit(labelled: pa.Table, settings: CommitSettings) -> pa.Table:
    rows = to_rows(labelled, {"labels": 1, "confidence_map": 1})
    if any(row["stage"] == "model" for row in rows):
        return _not_committed(rows, RepsepError(rows[0]["error"]), stage="model")
    try:
        return to_table(_committer(settings)(rows), DONE_SCHEMA)
    except Exception as error:
        return _not_committed(rows, error)


def _not_committed(rows: list[Row], error: Exception, stage: str = "write") -> pa.Table:
    if isinstance(error, ReplacedError):
        stage = "output"
    return to_table([{"n": rows[0]["n"], "stage": stage, "error": reason_of(error)}], DONE_SCHEMA)
