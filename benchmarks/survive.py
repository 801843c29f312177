"""Does bulk segmentation lose anything? Kills, bad objects and a faulty network, on a real S3 endpoint (Ceph RGW).

    python benchmarks/survive.py [--kills 20] [--images 300] [--only kills|bad|faults] [--seed 0]   (make prove-segment)

    kills    SIGKILL to the driver, a worker or the raylet at random moments, over and over, until the job is through:
             every image has one row and one mask, and each mask has the bytes of an undisturbed run's
    bad      every kind of bad object in tests/bad_images.py among good images, and one that is deleted between listing
             and reading, one that may not be read and one that kills its process: all recorded with stage and reason
    faults   a proxy between the job and the store that injects 503s, 500s, resets, cut, slow, silent and corrupted
             answers into 10 % of the requests

Prints one table: planned, injected, lost. Exit code 1 if anything is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import random
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from benchmarks.s3_endpoint import endpoint
from pipelines import segment as segment_stage
from pipelines.bulk import job
from pipelines.bulk.commits import OK, Output
from pipelines.config import Recipe, SegmentConfig
from pipelines.scenes import render_scene
from pipelines.segment import segment
from pipelines.storage import Folder
from repsep_model import SegmentorConfig, build_segmentor, save_segmentor
from tests.bad_images import BAD
from tests.fault_proxy import KINDS, FaultProxy
from tests.processes import descendants, kill_tree

CLASSES = [{"id": i, "name": f"class {i}", "color": [40 * i, 200 - 30 * i, 90]} for i in range(7)]
PATIENCE_S = 300


@dataclass(frozen=True)
class Line:
    """One line of the table; `lost` counts what has no row, no mask where there should be one, or another mask."""

    what: str
    planned: int
    injected: str
    lost: int


class Place:
    """A bucket with good images, and the model."""

    def __init__(self, images: int, folder: Path) -> None:
        self.bucket, self.folder = f"s3://survive-{secrets.token_hex(4)}", folder
        Folder(self.bucket).fs.mkdir(self.bucket.removeprefix("s3://"))
        source = Folder(f"{self.bucket}/good")
        scenes = [Image.fromarray(render_scene(3, i, (96, 128))[0]) for i in range(8)]
        for number in range(images):
            out = io.BytesIO()
            scenes[number % 8].rotate(number % 7).save(out, "JPEG", quality=70 + number % 25)
            source.write(f"{number % 5}/{number:04d}.jpg", out.getvalue())
        small = {"depth": 4, "embed_dim": 48, "num_heads": 3}
        config = SegmentorConfig(
            backbone="vit_tiny_patch16_224", backbone_args=small, width=16, num_classes=len(CLASSES)
        )
        save_segmentor(build_segmentor(config), folder / "model", classes={"classes": CLASSES, "ignore_index": 255})
        self.model = str(folder / "model")

    def command(self, source: str, target: str) -> list[str]:
        return [str(Path(sys.executable).parent / "repsep"), "segment", source, target, "--model", self.model]

    def run(self, source: str, target: str, **environment: str) -> int:
        """An undisturbed run in a process of its own; its exit code."""
        home = {"REPSEP_HOME": str(self.folder / "home")}
        done = subprocess.run(
            self.command(source, target), env=os.environ | home | environment, capture_output=True, text=True
        )
        if done.returncode not in (0, 3):
            print(done.stderr[-3000:])
        return done.returncode


def keys_of(source: str) -> list[str]:
    return sorted(entry.key for entry in Folder(source).list())


def lost(source: str, target: str, reference: str | None) -> int:
    """Images without exactly one row that is ok, or whose mask is missing or has other bytes than in `reference`."""
    output, expected = Output(Folder(target)), keys_of(source)
    table = output.results()
    rows = Counter(
        key for key, status in zip(table["key"].to_pylist(), table["status"].to_pylist(), strict=True) if status == OK
    )
    bad = {key for key in expected if rows[key] != 1} | (rows.keys() - set(expected))
    masks = {e.key: e.etag for e in output.folder.list("masks/")}  # the MD5 of what was put
    if reference is not None:
        right = {e.key: e.etag for e in Folder(reference).list("masks/")}
        bad |= {key for key in right.keys() | masks.keys() if right.get(key) != masks.get(key)}
    return len(bad)


# --- kills ------------------------------------------------------------------------------------------------------------


def kills(place: Place, count: int, chance: random.Random) -> Iterator[Line]:
    source, reference = f"{place.bucket}/good", f"{place.bucket}/reference"
    began = time.monotonic()
    assert place.run(source, reference) == 0
    whole = time.monotonic() - began
    planned, missing = len(keys_of(source)), lost(source, reference, None)
    killed: Counter[str] = Counter()
    starts = 0
    for attempt in itertools.count():
        target = f"{place.bucket}/killed-{attempt}"
        finished = False
        while not finished:
            starts += 1
            finished = _one_run(place, source, target, killed, count, whole, chance)
        missing += lost(source, target, reference)
        if killed.total() >= count:
            break
    said = ", ".join(f"{number} x {who}" for who, number in sorted(killed.items()))
    yield Line(f"kills ({attempt + 1} outputs, {starts} starts)", planned * (attempt + 1), said, missing)


def _one_run(
    place: Place, source: str, target: str, killed: Counter[str], count: int, whole: float, chance: random.Random
) -> bool:
    """Start the job and kill something at a random moment; whether the job came through."""
    environment = os.environ | {"REPSEP_HOME": str(place.folder / "home")}
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115
    process = subprocess.Popen(place.command(source, target), env=environment, stdout=log, stderr=log)
    below: dict[int, str] = {}
    try:
        while process.poll() is None and killed.total() < count:
            due = time.monotonic() + chance.uniform(0.5, whole)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(due - time.monotonic())
                break
            below |= descendants(process.pid)
            who, victim = _victim(process.pid, descendants(process.pid), chance)
            with contextlib.suppress(ProcessLookupError):
                os.kill(victim, signal.SIGKILL)
                killed[who] += 1
                print(f"  killed {who} ({killed.total()}/{count})", flush=True)
        code = process.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        log.seek(0)
        raise SystemExit(f"the job hung after a kill:\n{log.read()[-3000:]}") from None
    finally:
        below |= descendants(process.pid)
        kill_tree(process.pid)
        for pid, command in below.items():  # what a killed driver or raylet left behind, if it is still the same
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace") == command:
                    kill_tree(pid)
        log.close()
    return code in (0, 3)  # with failed images it is through as well, and has lost them


def _victim(driver: int, below: dict[int, str], chance: random.Random) -> tuple[str, int]:
    workers = [pid for pid, command in below.items() if command.startswith("ray::")]
    raylets = [pid for pid, command in below.items() if "/raylet/raylet " in command]
    there = {"driver": [driver], "worker": workers, "raylet": raylets}
    who = chance.choice([name for name, pids in there.items() if pids])
    return who, chance.choice(there[who])


# --- bad objects ------------------------------------------------------------------------------------------------------


def bad(place: Place, *_: Any) -> Iterator[Line]:
    source, target = f"{place.bucket}/mixed", f"{place.bucket}/mixed-out"
    folder, good = Folder(source), Folder(f"{place.bucket}/good")
    for key in keys_of(good.uri)[:60]:
        folder.write(f"good/{key}", good.read(key))
    for name, case in BAD.items():
        folder.write(f"bad/{name}", case.data)
    image = good.read(keys_of(good.uri)[0])
    for name in ("deleted", "forbidden", "killer"):
        folder.write(f"bad/{name}.jpg", image)
    _forbid(folder, "bad/forbidden.jpg")
    planned = keys_of(source)

    real_plan = segment_stage.make_plan

    def plan_then_delete(*arguments: Any, **options: Any) -> Any:
        plan = real_plan(*arguments, **options)
        folder.delete("bad/deleted.jpg")
        return plan

    def read_or_die(todo: Any, source: str, config: SegmentConfig) -> Any:
        from pipelines.bulk.job import _read  # the worker's own

        if "bad/killer.jpg" in todo["key"].to_pylist():
            os.kill(os.getpid(), signal.SIGKILL)
        yield from _read(todo, source, config)

    segment_stage.make_plan = plan_then_delete
    job._read = read_or_die
    section = {"source": source, "target": target, "model": place.model, "max_failure_rate": 1.0}
    section["include"] = sorted({f".{name.rpartition('.')[2].lower()}" for name in planned})
    segment(str(place.folder / "bad"), Recipe.model_validate({"segment": section}))

    rows = Output(Folder(target)).results().to_pylist()
    by_key = {row["key"]: row for row in rows}
    stages = {"bad/deleted.jpg": "read", "bad/forbidden.jpg": "read", "bad/killer.jpg": "worker"}
    wrong = [key for key in planned if key not in by_key]
    for key, row in by_key.items():
        case = BAD.get(key.removeprefix("bad/"))
        if key.startswith("good/") or (case is not None and case.shape is not None):
            right = row["status"] == "ok" and Folder(target).size_of(f"masks/{key}.png") is not None
        else:
            stage = stages.get(key, "decode")
            right = row["status"] == "failed" and row["stage"] == stage and bool(row["error"])
            right &= case is None or case.reason in row["error"]
        if not right:
            wrong.append(key)
            print(f"  {key}: {row['status']}, {row['stage']}, {row['error']}")
    kinds = len(BAD) + len(stages)
    failed = sum(row["status"] == "failed" for row in rows)
    said = f"{kinds} kinds, {failed} failed rows"
    yield Line("bad objects among good images", len(planned), said, len(wrong) + len(rows) - len(by_key))


def _forbid(folder: Folder, key: str) -> None:
    """Nobody may read this object."""
    bucket, _, prefix = folder.path.partition("/")
    arn = f"arn:aws:s3:::{bucket}/{prefix}/{key}"
    statement = {"Effect": "Deny", "Principal": "*", "Action": "s3:GetObject", "Resource": arn}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    folder.fs.call_s3("put_bucket_policy", Bucket=bucket, Policy=json.dumps(policy))


# --- faults -----------------------------------------------------------------------------------------------------------


def faults(place: Place, *_: Any) -> Iterator[Line]:
    source, target, reference = (f"{place.bucket}/{name}" for name in ("good", "faulty", "calm"))
    assert place.run(source, reference) == 0
    with FaultProxy(os.environ["AWS_ENDPOINT_URL"], rate=0.1, seed=1) as proxy:
        code = place.run(source, target, AWS_ENDPOINT_URL=proxy.endpoint)
        counts = proxy.counts()
    said = ", ".join(f"{counts[kind]} x {kind}" for kind in KINDS if counts.get(kind))
    missing = lost(source, target, reference) if code == 0 else len(keys_of(source))
    yield Line("faults in 10 % of the requests", len(keys_of(source)), said, missing)


PROOFS = {"kills": kills, "bad": bad, "faults": faults}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--only", choices=PROOFS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endpoint", help="an S3 endpoint; by default a Ceph RGW of its own")
    asked = parser.parse_args()
    lines: list[Line] = []
    with endpoint(asked.endpoint), tempfile.TemporaryDirectory() as folder:
        place = Place(asked.images, Path(folder))
        for name, proof in PROOFS.items():
            if asked.only in (None, name):
                print(f"{name} ...", flush=True)
                lines += proof(place, asked.kills, random.Random(asked.seed))
    width = max(len(line.what) for line in lines)
    print(f"\n{'':{width}s}  planned   lost   injected")
    for line in lines:
        print(f"{line.what:{width}s} {line.planned:8d} {line.lost:6d}   {line.injected}")
    sys.exit(any(line.lost for line in lines))


if __name__ == "__main__":
    main()
