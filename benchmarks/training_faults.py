"""The failure table of `make prove-training`: processes and machines that are lost, each in a real run.

A kind is a function of a `Bench` that yields lines; a line says what was injected, what came of it, and if that was
what is claimed.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

from benchmarks.training_bench import TOLERANCE, Bench, Line, compared, group_sizes, largest_difference
from benchmarks.training_cluster import wait_for
from benchmarks.training_runs import EVERY, STEPS, TRAIN, Run


def worker_killed(bench: Bench) -> Iterator[Line]:
    bench.reference()
    cluster = bench.on(2)
    run = bench.place.run(cluster, "worker", runtime={})
    run.wait_for_step(EVERY + 2)
    os.kill(cluster.workers()[1], signal.SIGKILL)
    yield compared(bench, run.done(), "worker lost", f"SIGKILL to one of 2 after step {EVERY + 2}")


def one_of_three_killed(bench: Bench) -> Iterator[Line]:
    """Three numbers can be added in three orders: the sums must be those of the undisturbed run's."""
    runtime = {"workers": 3, "cpus_per_worker": 0.5}
    bench.reference("three", runtime=runtime)
    cluster = bench.on(2)
    run = bench.place.run(cluster, "worker-of-three", runtime=runtime)
    run.wait_for_step(EVERY + 2)
    os.kill(cluster.workers()[1], signal.SIGKILL)
    yield compared(bench, run.done(), "worker lost", f"SIGKILL to one of 3 after step {EVERY + 2}", "three")


def driver_killed(bench: Bench) -> Iterator[Line]:
    bench.reference()
    cluster = bench.on(2)
    run = bench.place.run(cluster, "driver", runtime={}, submit=True)
    run.wait_for_step(EVERY + 3)
    for pid in cluster.processes("benchmarks.training_runs " + str(run.recipe)):  # the driver and the job's shell
        os.kill(pid, signal.SIGKILL)
    first = run.wait()
    run = bench.place.run(cluster, "driver", runtime={}, submit=True).done()
    injected = f"SIGKILL after step {EVERY + 3}, `ray job submit` again (first exit code {first})"
    yield compared(bench, run, "driver lost", injected)


def node_removed(bench: Bench) -> Iterator[Line]:
    bench.reference()
    cluster = bench.on(1, 1)
    run = bench.place.run(cluster, "node-fixed", runtime={})
    run.wait_for_step(EVERY + 2)
    cluster.kill_last()
    cluster.add(1)
    yield compared(
        bench, run.done(), "node lost, 2 workers", "SIGKILL to the second raylet and all on it; a new node joins"
    )


ELASTIC: dict[str, Any] = {
    "model": TRAIN["model"] | {"drop_path": 0.0},  # its draws depend on the rank
    "bf16": False,
    "batch_size": 8,
    "steps": 300,  # Ray learns of a new node only every 20 s
    "validate_every": 30,
}


def node_removed_elastic(bench: Bench) -> Iterator[Line]:
    """2 workers, then 1, then 2 again; the losses of the undisturbed run with 2."""
    cluster = bench.on(1, 1)
    reference = bench.reference("elastic", **ELASTIC)
    run = bench.place.run(cluster, "node-elastic", **ELASTIC, runtime={"workers": [1, 2]})
    run.wait_for_step(10)
    cluster.kill_last()
    seen = run.step()
    run.wait_for_step(seen + 3)
    (alone,) = cluster.workers()
    os.kill(alone, signal.SIGSTOP)  # it must not be through before the new node is there
    cluster.add(1)
    os.kill(alone, signal.SIGCONT)
    sizes, difference = group_sizes(run.done()), largest_difference(run, reference)
    outcome = f"{' -> '.join(map(str, sizes))} workers, losses within {difference:.1e} of the undisturbed run's"
    yield Line(
        "node lost, [1, 2] workers",
        "SIGKILL to the second raylet; later a new node joins",
        outcome,
        sizes == [2, 1, 2] and difference <= TOLERANCE,
    )


def preempted(bench: Bench) -> Iterator[Line]:
    """No checkpoint is due but at the end; the notice brings one, and little is done again."""
    settings: dict[str, Any] = {"steps": 4 * STEPS, "validate_every": 4 * STEPS}
    cluster = bench.on(1, 1)
    bench.reference("long", **settings)
    run = bench.place.run(cluster, "preempted", **settings, runtime={})
    run.wait_for_step(6)
    cluster.preempt_last(30)
    wait_for(run.has_checkpoint, run.process, "the checkpoint in time", run.log)
    cluster.kill_last()
    reached = run.step()
    cluster.add(1)
    line = compared(bench, run.done(), "preemption notice", "drain with reason PREEMPTION, then SIGKILL", "long")
    again = repeated_steps(run)
    outcome = f"checkpoint on notice, {again} of {reached} steps were done again; {line.outcome}"
    yield Line(line.what, line.injected, outcome, line.held and again < reached)


def repeated_steps(run: Run) -> int:
    steps = [step for step, _ in run.history("loss")]
    return len(steps) - len(set(steps))
