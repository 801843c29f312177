"""What does an image cost the store, and the driver, when 1,000 workers commit? Requests by kind, seconds, bytes.

    python benchmarks/commits.py [--workers 1000] [--batches 2] [--images 16] [--blocks 2000]

Workers are our own steps (`CommitMasks`) without a model: each writes its masks and its attempt parts into one output
on a real S3 store, a Ceph RGW of its own if no endpoint is given. Then the driver's part: counting what came back,
merging the parts, compacting, and reading all for a resume.
"""

from __future__ import annotations

import argparse
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from benchmarks.s3_endpoint import endpoint
from pipelines import cluster
from pipelines.bulk.commits import Output
from pipelines.bulk.job import IMAGES_A_BLOCK, MERGE_PARTS, SegmentJob
from pipelines.bulk.plan import LISTED_SCHEMA
from pipelines.bulk.result_parts import newest_manifest
from pipelines.bulk.steps import DONE_SCHEMA, CommitMasks, CommitSettings, Row, to_table
from pipelines.config import SegmentConfig
from pipelines.patient_s3 import PatientS3
from pipelines.progress import Progress
from pipelines.storage import Folder

CLASSES = 19
SIDE = 64
AT_ONCE = 16
SOURCE = "s3://synthetic/photos"


class Requests:
    """Counts what this process asks of the store, repetitions included."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        attempt = PatientS3._attempt

        async def counted(filesystem: PatientS3, method: str, *defaults: Any, **arguments: Any) -> Any:
            self.counts[method] += 1
            return await attempt(filesystem, method, *defaults, **arguments)

        PatientS3._attempt = counted  # type: ignore[method-assign]

    @contextmanager
    def line(self, what: str, images: int) -> Iterator[None]:
        """Print what the block asked for, in all and for each image."""
        self.counts.clear()
        began, used = time.perf_counter(), time.process_time()
        yield
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
        asked = ", ".join(f"{count:,} {name} ({count / images:.4f})" for name, count in sorted(self.counts.items()))
        print(f"{what:28}{seconds:8.1f} s {cpu:8.1f} s CPU   {asked}", flush=True)


def key_of(number: int) -> str:
    return f"site-{number % 256:04d}/2026-11-22/camera-{number:010d}.jpg"


def labelled(number: int, labels: Any) -> Row:
    """A row as the model's step leaves it."""
    size = {"size": 100_000, "height": SIDE, "width": SIDE}
    row = {"n": number, "key": key_of(number), "etag": f"{number:032x}", "labels": labels, "confidence_map": None}
    times = {"read_s": 0.1, "reader": 1, "segment_s": 0.1, "segmenter": 2, "confidence": 0.9}
    return row | size | times | {"stage": None, "error": None, "passing": False}


def commit_all(settings: CommitSettings, options: argparse.Namespace) -> list[Row]:
    """Every worker commits its batches, some workers at a time."""
    labels = np.random.default_rng(0).integers(0, CLASSES, (8, 8), np.uint8).repeat(8, 0).repeat(8, 1)

    def work(worker: int) -> list[Row]:
        committer, done = CommitMasks(settings), []
        for batch in range(options.batches):
            first = (worker * options.batches + batch) * options.images
            done += committer([labelled(first + i, labels) for i in range(options.images)])
        committer.pool.shutdown()
        return done

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return [row for rows in pool.map(work, range(options.workers)) for row in rows]


def count_on_driver(output: Output, done: list[Row]) -> float:
    """CPU seconds in which the driver counts what came back, block by block."""
    source, plan = Folder(SOURCE), SimpleNamespace(retried=0)
    job = SegmentJob(SegmentConfig(), source, output, plan, files={}, model_version="benchmark", colours=())
    job.done, job.progress = np.zeros(len(done), bool), Progress("counted", len(done), every_s=1e9)
    blocks = [to_table(done[start : start + 32], DONE_SCHEMA) for start in range(0, len(done), 32)]
    began = time.process_time()
    for block in blocks:
        for row in block.to_pylist():
            job._count(row)
        job._breaker()
    return time.process_time() - began


def plan_block(rows: int) -> pa.Table:
    """A block of the plan as the driver puts it into Ray's object store."""
    keys = [key_of(number) for number in range(rows)]
    etags = [f"{number:032x}" for number in range(rows)]
    table = pa.table([keys, etags, [100_000] * rows], schema=LISTED_SCHEMA)
    return table.append_column("n", pa.array(range(rows), pa.int64()))


def hand_over(blocks: int) -> None:
    """How long Ray Data takes to know the blocks of a plan, on a Ray of this machine."""
    cluster.connect(dashboard=False)
    table = plan_block(IMAGES_A_BLOCK)
    ray.data.from_arrow_refs([ray.put(table)])  # a worker process is there
    began = time.perf_counter()
    ray.data.from_arrow_refs([ray.put(table) for _ in range(blocks)])
    print(f"{blocks:,} blocks known after {time.perf_counter() - began:.1f} s")
    ray.shutdown()


def measure(options: argparse.Namespace) -> None:
    bucket = f"commits-{secrets.token_hex(4)}"
    target = Folder(f"s3://{bucket}/out")
    target.fs.mkdir(bucket)
    requests, output = Requests(), Output(target)
    output.claim({"model": "benchmark"}, {"classes": []}, overwrite=False)
    colours = tuple((i, i, i) for i in range(CLASSES))
    settings = CommitSettings(SOURCE, target.uri, colours, False, "benchmark", 8, generation=output.generation)
    images = options.workers * options.batches * options.images
    print(f"{options.workers:,} workers, {options.batches} batches of {options.images}: {images:,} images")
    with requests.line("workers commit", images):
        done = commit_all(settings, options)
    assert len(done) == images
    assert not any(row["error"] for row in done)
    seconds = count_on_driver(output, done)
    print(f"{'driver counts':28}{'':10} {seconds:8.1f} s CPU   {1e6 * seconds / images:.1f} us an image")
    parts = [row["part"] for row in done if row.get("part")]
    with requests.line(f"merge of {len(parts):,} parts", images):
        merged = [
            n for i in range(0, len(parts), MERGE_PARTS) for n in output.merge_commits(parts[i : i + MERGE_PARTS])
        ]
    with requests.line(f"compaction of {len(merged)}", images):
        totals = output.compact()
    assert totals.rows == images
    with requests.line("resume reads the results", images):
        assert len(Output(target).committed()) == images
    size = sum(part.bytes for part in newest_manifest(target).parts)
    print(f"results: {size / images:.0f} bytes an image, all alike here")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--batches", type=int, default=2, help="of each worker")
    parser.add_argument("--images", type=int, default=16, help="of a batch")
    parser.add_argument("--blocks", type=int, default=0, help="of a plan to hand over to Ray Data too")
    parser.add_argument("--endpoint", help="an S3 endpoint, with its keys in the AWS variables")
    options = parser.parse_args()
    block = plan_block(IMAGES_A_BLOCK)
    print(f"plan in the object store: {block.nbytes / block.num_rows:.0f} bytes an image", flush=True)
    with endpoint(options.endpoint):
        if options.blocks:
            hand_over(options.blocks)
        if options.workers:
            measure(options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
