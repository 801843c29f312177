"""Does training survive? Kills, lost machines, stores and disks that fail, changes of size; on real Ray clusters.

    python benchmarks/training.py [--kills 3] [--only kills,faults,...] [--seed 0]   (make prove-training)

    kills     SIGKILL to driver, worker and head at random moments: weights and state have the undisturbed run's bytes
    faults    the failure table (benchmarks/training_faults.py, training_damage.py): what was injected, what came of it
    scaling   the same metrics on 1, 2 and 3 workers, throughput, DDP against FSDP2 (benchmarks/training_scaling.py)
    blocking  for how long a checkpoint keeps the loop waiting, against how long its upload takes
    ratios    the share of the time that the loop waits for data, and the tables of benchmarks/loader.py and step.py

Prints a table; exit code 1 if anything is not as claimed. Tiny models on two CPU cores: the proof is of the machinery.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import textwrap
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks import training_damage, training_faults
from benchmarks.s3_endpoint import endpoint
from benchmarks.training_bench import Bench, Line, compared
from benchmarks.training_cluster import ROOT, wait_for
from benchmarks.training_runs import STEPS
from benchmarks.training_scaling import blocking, scaling
from benchmarks.training_store import CheckpointProxy

FAULTS: dict[str, Callable[[Bench], Iterator[Line]]] = {
    "worker": training_faults.worker_killed,
    "three": training_faults.one_of_three_killed,
    "driver": training_faults.driver_killed,
    "half": training_damage.half_written,
    "nan": training_damage.nan_loss,
    "twice": training_damage.twice_at_once,
    "upload": training_damage.upload_fails,
    "disk": training_damage.disk_full,
    "node": training_faults.node_removed,
    "elastic": training_faults.node_removed_elastic,
    "preempted": training_faults.preempted,
}


def kills(bench: Bench, count: int) -> Iterator[Line]:
    """`count` kills of each run, every kind in turn."""
    for workers, name in ((1, "one"), (2, "two")):
        bench.reference(name, runtime={"workers": workers})
        moments = sorted(bench.chance.sample(range(1, STEPS - 4), count))
        kinds = [("worker", "driver", "head")[(number + workers) % 3] for number in range(count)]
        cluster = bench.on(2)
        run = bench.place.run(cluster, f"killed-{name}", runtime={"workers": workers})
        for kind, moment in zip(kinds, moments, strict=True):
            run.wait_for_step(moment)
            time.sleep(bench.chance.uniform(0, 0.3))  # anywhere in a step, a validation, a checkpoint
            if kind == "worker":
                wait_for(lambda: bool(cluster.workers()), run.process, "a worker", run.log)  # noqa: B023
                os.kill(bench.chance.choice(cluster.workers()), signal.SIGKILL)
                continue
            if kind == "head":
                os.kill(cluster.raylet(), signal.SIGKILL)
                bench.close()
            run.kill()
            cluster = bench.on(2)
            run = bench.place.run(cluster, f"killed-{name}", runtime={"workers": workers})
        injected = ", ".join(f"{kind} after step {moment}" for kind, moment in zip(kinds, moments, strict=True))
        model, state = bench.references[name].digests()
        more = f" (model {model[:16]}, state {state[:16]})"
        yield compared(bench, run.done(), f"{count} kills, {workers} worker(s)", injected, name, more)


def ratios(bench: Bench) -> Iterator[Line]:
    """What the loop waited for data, and the tables of the benchmarks of loader and step."""
    for name in ("one", "two"):
        run = bench.reference(name, runtime={"workers": 1 if name == "one" else 2})
        share = statistics.mean(share for step, share in run.history("data_wait_share") if step > 4)
        yield Line(f"data-wait share, {name} worker(s)", "nothing", f"{share:.3f} of the loop's time", True)
    for script in ("loader.py", "step.py --side 256 --steps 3"):
        command = [sys.executable, *f"{ROOT}/benchmarks/{script}".split()]
        done = subprocess.run(command, env=bench.place.environment, stdout=subprocess.PIPE, text=True)
        print(textwrap.indent(done.stdout, "  "))
        outcome = "its table is above" if done.returncode == 0 else f"exit code {done.returncode}"
        yield Line(f"benchmarks/{script}", "nothing", outcome, done.returncode == 0)


def guarded(name: str, proof: Callable[[], Iterator[Line]]) -> Iterator[Line]:
    """Its lines; what it raises becomes one, for the others have to run too."""
    began = time.monotonic()
    print(f"{name} ...", flush=True)
    try:
        for line in proof():
            print(f"  {'ok' if line.held else 'NOT'}: {line.what}: {line.outcome}", flush=True)
            yield line
    except Exception as error:
        traceback.print_exc()
        yield Line(name, "", f"{type(error).__name__}: {str(error)[:500]}", False)
    print(f"  {time.monotonic() - began:.0f} s", flush=True)


def table(lines: list[Line]) -> None:
    widths = (36, 44, 64)
    print("\n" + "  ".join(f"{name:{w}s}" for name, w in zip(("kind", "injected", "outcome"), widths, strict=True)))
    for line in lines:
        outcome = line.outcome if line.held else f"NOT AS CLAIMED: {line.outcome}"
        cells = [textwrap.wrap(text, w) for text, w in zip((line.what, line.injected, outcome), widths, strict=True)]
        for row in range(max(map(len, cells))):
            parts = (f"{cell[row] if row < len(cell) else '':{w}s}" for cell, w in zip(cells, widths, strict=True))
            print("  ".join(parts).rstrip())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=3, help="of each of the two runs")
    parser.add_argument("--only", help=f"some of the above, or kinds of faults ({', '.join(FAULTS)}), by commas")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endpoint", help="an S3 endpoint; by default a Ceph RGW of its own")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that clusters and store end too
    proofs: dict[str, Callable[[Bench], Iterator[Line]]] = {
        "kills": lambda bench: kills(bench, asked.kills),
        **FAULTS,
        "scaling": scaling,
        "blocking": blocking,
        "ratios": ratios,
    }
    chosen = asked.only.replace("faults", ",".join(FAULTS)).split(",") if asked.only else list(proofs)
    lines: list[Line] = []
    began = time.monotonic()
    with contextlib.ExitStack() as stack:
        bench = Bench(Path(stack.enter_context(tempfile.TemporaryDirectory())), random.Random(asked.seed))
        if {"upload", "blocking"} & set(chosen):
            stack.enter_context(endpoint(asked.endpoint))
            bench.use(stack.enter_context(CheckpointProxy(os.environ["AWS_ENDPOINT_URL"])))
        try:
            for name in chosen:
                lines += guarded(name, lambda name=name: proofs[name](bench))  # type: ignore[misc]
        finally:
            bench.close()
    table(lines)
    print(f"\n{sum(line.held for line in lines)} of {len(lines)} as claimed, {time.monotonic() - began:.0f} s")
    sys.exit(not all(line.held for line in lines))


if __name__ == "__main__":
    main()
