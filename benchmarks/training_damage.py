"""The failure table of `make prove-training`: stores, disks, files and numbers that go bad, each in a real run."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from benchmarks.training_bench import Bench, Line, compared
from benchmarks.training_cluster import Cluster
from benchmarks.training_runs import EVERY, TRAIN, Run


def upload_fails(bench: Bench) -> Iterator[Line]:
    bench.reference()
    cluster = bench.on(2)
    run = bench.place.run(cluster, "upload-while", at=bench.bucket, runtime={})
    run.wait_for_step(EVERY + 1)  # one checkpoint is there
    bench.store.rate(1.0)
    run.wait_for_words("was not saved")  # one was given up
    refused = bench.store.counts().get("internal", 0)
    bench.store.rate(0.0)
    what = "checkpoint upload fails for a while, warned"
    yield compared(bench, run.done(), what, f"500 to {refused} PUTs of checkpoints")

    run = bench.place.run(cluster, "upload-ever", at=bench.bucket, runtime={})
    run.wait_for_step(EVERY + 1)
    bench.store.rate(1.0)
    code = run.wait()
    refused = bench.store.counts().get("internal", 0) - refused
    said, status = run.error(), run.status()
    bench.store.rate(0.0)
    told = code == 1 and status == "FAILED" and "checkpoint" in said
    injected = f"500 to each PUT of a checkpoint ({refused} of them)"
    yield Line("checkpoint upload fails for ever", injected, f"exit code {code}: {said[:400]}", told)
    run = bench.place.run(cluster, "upload-ever", at=bench.bucket, runtime={}).done()
    yield compared(bench, run, "the same, mended", "the store is well again, the same command")


def half_written(bench: Bench) -> Iterator[Line]:
    """What was saved is damaged while nobody runs: first the newest checkpoint, then all that there are."""
    bench.reference()
    cluster = bench.on(2)
    run = bench.place.run(cluster, "half", runtime={})
    run.wait_for_step(2 * EVERY + 2)
    run.kill()
    cluster.wait_until_idle()
    newest = _states(run)[-1]
    os.truncate(newest, newest.stat().st_size // 2)
    run = bench.place.run(cluster, "half", runtime={})
    run.wait_for_step(3 * EVERY + 3)
    run.kill()
    cluster.wait_until_idle()
    named = newest.parent.name in run.text()
    outcome = "named in a warning, the one before taken" if named else "taken, or left out WITHOUT A WORD"
    yield Line("newest checkpoint half-written", f"{newest.name} cut in half, run killed", outcome, named)

    states = _states(run)
    before = {file: file.read_bytes() for file in states}
    for file, data in before.items():
        middle = len(data) // 2
        file.write_bytes(data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :])
    run = bench.place.run(cluster, "half", runtime={})
    code, said = run.wait(), run.error()
    refused = code == 1 and "whole" in said and not (run.folder / "model").size_of("model.safetensors")
    injected = f"a bit flipped in {len(states)} of {len(states)} {newest.name}"
    yield Line("all checkpoints damaged", injected, f"exit code {code}: {said[:300]}", refused)
    for file, data in before.items():
        file.write_bytes(data)
    run = bench.place.run(cluster, "half", runtime={})
    yield compared(bench, run.done(), "the same, mended", "their bytes put back")


def _states(run: Run) -> list[Path]:
    """The largest file of each checkpoint, of the newest last."""
    folders = [Path(run.folder.path, name) for name in run.checkpoints()]
    return [max((f for f in each.iterdir() if f.is_file()), key=lambda f: f.stat().st_size) for each in folders]


def nan_loss(bench: Bench) -> Iterator[Line]:
    """A learning rate that ruins the weights in its first step: the second step's loss is not finite."""
    run = bench.place.run(bench.on(2), "nan", lr=1e30, warmup_steps=0, validate_every=1, runtime={})
    code, said = run.wait(), run.text()
    keys = keys_of_step(bench.place.dataset, 1, TRAIN["batch_size"])
    last = run.checkpoints()[-1].rpartition("/")[2] if run.checkpoints() else "none"
    there = {
        "exit code 1": code == 1,
        "step": re.search(r"at step 1\b", said) is not None,
        "sample keys": all(key in said for key in keys),
        "last good checkpoint": last in said,
        "FAILED in MLflow": run.status() == "FAILED",
    }
    missing = [name for name, found in there.items() if not found]
    outcome = f"MISSING {missing} in: {run.error()[:600]}" if missing else "stops, says " + ", ".join(there)
    yield Line("NaN loss", "a learning rate of 1e30", outcome, not missing)


def keys_of_step(dataset: str, step: int, batch_size: int) -> list[str]:
    """The images of a step, found row by row."""
    from pipelines.dataset import open_dataset
    from pipelines.sample_order import SampleOrder

    split = open_dataset(dataset).split("train")
    batch = SampleOrder(split, 0).samples(step * batch_size, (step + 1) * batch_size)
    return [split.read(g)["key"][row].as_py() for g, row in zip(batch.groups, batch.rows, strict=True)]


def disk_full(bench: Bench) -> Iterator[Line]:
    """Workspace and temporary folder on a small tmpfs that is filled, and later emptied again."""
    bench.reference()
    what, small = "disk full for a while", bench.place.folder / "small"
    small.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(small)], capture_output=True)
    if mount.returncode != 0:
        yield Line(what, "nothing: mounting a tmpfs takes root", "SKIPPED", True)
        return
    bench.close()
    (small / "tmp").mkdir()
    cluster = Cluster(2, environment=bench.place.environment | {"TMPDIR": str(small / "tmp")})
    try:
        run = bench.place.run(cluster, "disk", at=str(small), runtime={})
        run.wait_for_step(EVERY + 1)
        with contextlib.suppress(OSError), (small / "ballast").open("wb", buffering=0) as ballast:
            while ballast.write(bytes(4096)):
                pass
        run.wait_for_words("No space left on device")
        (small / "ballast").unlink()
        yield compared(bench, run.done(), f"{what}, warned", "tmpfs under workspace and $TMPDIR filled, later emptied")
    finally:
        cluster.stop()
        subprocess.run(["umount", "-l", str(small)], check=True)


def twice_at_once(bench: Bench) -> Iterator[Line]:
    bench.reference()
    cluster = bench.on(2)
    runs = [bench.place.run(cluster, "twice", runtime={}) for _ in range(2)]
    codes = [run.wait() for run in runs]
    refused = [run for run, code in zip(runs, codes, strict=True) if code != 0]
    said = refused[0].error() if refused else ""
    line = compared(bench, runs[0], "two identical runs at once", "two drivers started at the same moment")
    outcome = f"exit codes {sorted(codes)}, {line.outcome}; refused: {said[:300]}"
    yield Line(line.what, line.injected, outcome, line.held and sorted(codes) == [0, 1] and "another train" in said)
