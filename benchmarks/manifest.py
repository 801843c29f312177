"""What do a million keys cost the driver of a bulk run? Seconds and peak memory of its planning.

    python benchmarks/manifest.py [--keys 1000000] [--folders 256]

The listing comes over HTTP from a synthetic store, a process of its own, which answers list_objects_v2 for generated
keys; so requests, parsing, comparison and the plan's file are all measured. Each line is a process that imports only
what it needs: a first listing; the compaction of a finished run's rows; a resume with all done; one with all changed.
The goal for the plans is 256 MiB + 64 bytes for each committed image. Exit code 1 if one is over it.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.bulk.commits import COMMITS, ROW_SCHEMA, Output
from pipelines.bulk.plan import make_plan
from pipelines.config import SegmentConfig
from pipelines.storage import Folder

ROOT = Path(__file__).parents[1]
SOURCE = "s3://synthetic/photos"
MEBIBYTE = 1024 * 1024
BASE, EACH = 256 * MEBIBYTE, 64
CLASSES = 19
COMMIT_ROWS = 32_000  # as the driver merges them: 2,000 commits of 16 images


def key_of(number: int, folders: int) -> str:
    """A key of usual length."""
    return f"site-{number % folders:04d}/2026-11-22/camera-{number:010d}.jpg"


def etag_of(key: str) -> str:
    """As the synthetic store says it."""
    return hashlib.blake2b(key.encode(), digest_size=16).hexdigest()


# ------------------------------------------------------------------------------------------- what a process measures


def plan(target: str) -> dict[str, Any]:
    """What the driver does before it starts workers."""
    source, folder = Folder(SOURCE), Folder(target)
    began = time.perf_counter()
    committed = Output(folder).committed()
    read = time.perf_counter()
    with make_plan(source, folder, SegmentConfig(), committed) as made:
        seconds = time.perf_counter() - read
        taken = sum(block.num_rows for block in made.blocks(1000))
        assert taken == made.todo
        note = f"{made.listed:,} listed, {made.done:,} done, {made.todo:,} to do"
    figures = {
        "committed_s": read - began,
        "listing_s": seconds,
        "cpu_s": time.process_time(),
        "committed": len(committed),
    }
    return figures | {"bytes_each": committed.nbytes / max(1, len(committed)), "note": note}


def compact(target: str) -> dict[str, Any]:
    began = time.perf_counter()
    totals = Output(Folder(target)).compact()
    parts = sum(1 for _ in Folder(target).list("results/part-"))
    return {
        "compact_s": time.perf_counter() - began,
        "cpu_s": time.process_time(),
        "note": f"{totals.rows:,} rows in {parts} parts",
    }


def measured(what: str, target: str) -> None:
    figures = plan(target) if what == "plan" else compact(target)
    unwanted = {"ray", "torch", "mlflow"} & sys.modules.keys()
    assert not unwanted, unwanted
    # NOTE not ru_maxrss, which begins with what the process that started this one had.
    with open("/proc/self/status") as status:
        (peak,) = (int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    print(json.dumps(figures | {"peak": peak}))


# --------------------------------------------------------------------------------------------------------- the table


def write_rows(target: Folder, count: int, folders: int) -> None:
    """The commits of a run over all keys."""
    draw = np.random.default_rng(0)
    for start in range(0, count, COMMIT_ROWS):
        keys = [key_of(number, folders) for number in range(start, min(start + COMMIT_ROWS, count))]
        rows = len(keys)
        pixels = draw.multinomial(1_000_000, draw.dirichlet(np.full(CLASSES, 0.3)), size=rows)
        columns: dict[str, Any] = {
            "key": keys,
            "uri": [f"{SOURCE}/{key}" for key in keys],
            "etag": [etag_of(f"photos/{key}") for key in keys],
            "size": np.full(rows, 100_000),
            "status": ["ok"] * rows,
            "height": np.full(rows, 1000, np.int32),
            "width": np.full(rows, 1000, np.int32),
            "pixels": pa.ListArray.from_arrays(np.arange(0, rows * CLASSES + 1, CLASSES), pixels.ravel()),
            "confidence": draw.random(rows, np.float32),
            "seconds": draw.random(rows, np.float32),
            "model_version": ["models:/benchmark/1"] * rows,
            "mask_uri": [f"{target.uri}/masks/{key}.png" for key in keys],
            "finished_at": [datetime.now(UTC)] * rows,
        }
        table = pa.table([pa.array(columns.get(f.name, [None] * rows), f.type) for f in ROW_SCHEMA], ROW_SCHEMA)
        out = io.BytesIO()
        pq.write_table(table, out, compression="zstd")
        target.write(f"{COMMITS}/{start:08d}.parquet", out.getvalue())


def lines(count: int, folders: int) -> Iterator[tuple[str, dict[str, Any]]]:
    with tempfile.TemporaryDirectory() as folder, Store(count, folders) as store:
        empty, finished = f"{folder}/empty", f"{folder}/finished"
        yield "first listing", store.run("plan", empty)
        write_rows(Folder(finished), count, folders)
        yield "resume before the compaction", store.run("plan", finished)
        yield "compaction", store.run("compact", finished)
        yield "resume, all done", store.run("plan", finished)
        write_rows(Folder(finished), count, folders)
        yield "compaction, all superseded", store.run("compact", finished)
        yield "resume after it", store.run("plan", finished)


class Store:
    """The synthetic store's process, and processes that use it."""

    def __init__(self, count: int, folders: int) -> None:
        command = [sys.executable, "-m", "tests.pipelines.bulk.synthetic_store"]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(command, cwd=ROOT, text=True, **pipes)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process.stdin as keys:
            keys.writelines(f"photos/{key_of(number, folders)}\n" for number in range(count))
        endpoint = self.process.stdout.readline().strip()
        names = {"AWS_ACCESS_KEY_ID": "synthetic", "AWS_SECRET_ACCESS_KEY": "synthetic", "AWS_REGION": "us-east-1"}
        self.environment = os.environ | names | {"AWS_ENDPOINT_URL": endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def run(self, what: str, target: str) -> dict[str, Any]:
        command = [sys.executable, __file__, "--measure", what, "--target", target]
        done = subprocess.run(command, env=self.environment, stdout=subprocess.PIPE, check=True)
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.process.kill()
        self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", type=int, default=1_000_000)
    parser.add_argument("--folders", type=int, default=256, help="sub-folders that the keys lie in")
    parser.add_argument("--measure", choices=["plan", "compact"], help=argparse.SUPPRESS)
    parser.add_argument("--target", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measured(options.measure, options.target)
        return 0
    print(f"{options.keys:,} keys in {options.folders} folders")
    print(
        f"{'':30}{'committed':>10}{'listing':>10}{'compact':>10}{'CPU':>10}{'peak':>10}{'limit':>10}{'bytes each':>12}"
    )
    kept = True
    for what, found in lines(options.keys, options.folders):
        seconds = "".join(
            f"{found[n]:8.1f} s" if n in found else " " * 10 for n in ("committed_s", "listing_s", "compact_s", "cpu_s")
        )
        limit = BASE + EACH * found["committed"] if "committed" in found else None
        kept = kept and (limit is None or found["peak"] <= limit)
        sizes = [f"{size / MEBIBYTE:6.0f} MiB" if size else "" for size in (found["peak"], limit)]
        each = f"{found['bytes_each']:.0f}" if found.get("bytes_each") else ""
        print(f"{what:30}{seconds}{sizes[0]:>10}{sizes[1]:>10}{each:>12}  {found['note']}", flush=True)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
