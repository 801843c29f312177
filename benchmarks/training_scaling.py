"""The scaling proofs of `make prove-training`: honest metrics on any number of workers, sharding, checkpoints' cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any

from benchmarks.training_bench import TOLERANCE, Bench, Line, largest_difference
from benchmarks.training_runs import STEPS, TRAIN, Run

STILL = 1e-30
"""A learning rate that changes no weight in float32: what is validated are the initial weights, whoever trains."""


def scaling(bench: Bench) -> Iterator[Line]:
    yield from throughput(bench)
    yield from same_miou(bench)
    yield from sharded(bench)


def throughput(bench: Bench) -> Iterator[Line]:
    """Images a second of the loop, the median over steps. On two cores it says little, so nothing is claimed."""
    rates = {}
    for workers, name in ((1, "one"), (2, "two")):
        run = bench.reference(name, runtime={"workers": workers})
        rates[workers] = statistics.median(rate for step, rate in run.history("images_per_s") if step > 4)
    said = ", ".join(f"{workers} worker(s): {rate:.1f} images/s" for workers, rate in rates.items())
    yield Line("throughput 1 -> 2 workers", "nothing", f"{said}; ratio {rates[2] / rates[1]:.2f}", True)


def same_miou(bench: Bench) -> Iterator[Line]:
    """Validation of the weights of a trained model on 1, 2 and 3 workers: equal to the last digit."""
    trained = bench.reference().folder.uri_of("model")
    found: dict[int, list[tuple[int, float]]] = {}
    for workers in (1, 2, 3):
        runtime = {"workers": workers, "cpus_per_worker": 0.5}
        settings: dict[str, Any] = {
            "steps": 1,
            "lr": STILL,
            "warmup_steps": 0,
            "validate_every": 1,
            "init_from": trained,
        }
        run = bench.place.run(bench.on(2), f"still-{workers}", **settings, runtime=runtime).done()
        found[workers] = run.history("val/miou") + run.history("val_iou/road")
    said = ", ".join(f"{workers}: {values[0][1]!r}" for workers, values in found.items())
    yield Line("validation on 1, 2, 3 workers", "nothing", f"mIoU {said}", found[1] == found[2] == found[3])


def sharded(bench: Bench) -> Iterator[Line]:
    """20 steps of FSDP2 against DDP: the losses of the same steps."""
    settings: dict[str, Any] = {"steps": 20, "validate_every": 10, "bf16": False}
    settings["model"] = TRAIN["model"] | {"drop_path": 0.0}
    plain = bench.reference("ddp", **settings)
    run = bench.place.run(bench.on(2), "fsdp", **settings, parallel="fsdp", runtime={}).done()
    difference = largest_difference(run, plain)
    yield Line("FSDP2 against DDP, 20 steps", "nothing", f"losses within {difference:.1e}", difference <= TOLERANCE)


def blocking(bench: Bench) -> Iterator[Line]:
    """Checkpoints between validations, to a store that takes its time over each file."""
    every, seconds = 8, 2.0
    bench.store.slow(seconds)
    settings: dict[str, Any] = {"steps": 5 * every, "validate_every": 5 * every}
    run = bench.place.run(bench.on(2), "slow-store", at=bench.bucket, **settings, runtime={"checkpoint_every": every})
    run.done()
    bench.store.slow(0.0)
    gaps = step_gaps(run)
    usual = statistics.median(gaps.values())
    upload = seconds * sum(1 for _ in (run.folder / run.checkpoints()[-1]).list())
    # Nothing is under way when the first checkpoint is made: what is left is the copy.
    copy = gaps[every + 1] - usual
    said = f"the step after it takes {1000 * copy:.0f} ms more than the usual {1000 * usual:.0f} ms"
    injected = f"{seconds:g} s for each PUT: an upload takes {upload:g} s or more"
    yield Line("a checkpoint keeps the loop waiting", injected, said, copy < upload / 10)


def step_gaps(run: Run) -> dict[int, float]:
    """Seconds from the end of the step before to the end of this one, from MLflow's timestamps."""
    with run._tracking() as store:
        query = "SELECT step, timestamp FROM metrics WHERE run_uuid = ? AND key = 'loss' ORDER BY step"
        times = dict(store.execute(query, (run.mlflow_run,)).fetchall())
    assert len(times) == max(times) >= STEPS, "a step is missing, or the run did not start from 0"
    return {step: (times[step] - times[step - 1]) / 1000 for step in times if step - 1 in times}
