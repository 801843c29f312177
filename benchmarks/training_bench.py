"""What the proofs of training share: lines of the table, undisturbed runs to compare with, the cluster at hand."""

from __future__ import annotations

import os
import random
import re
import secrets
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.training_cluster import Cluster
from benchmarks.training_runs import Place, Run
from benchmarks.training_store import CheckpointProxy
from pipelines.storage import Folder

TOLERANCE = 1e-3
"""Relative, of float32 losses when the number of workers changes: sums in another order, which grows with the steps.

In bfloat16 a sum that differs in its last bit is rounded to another value now and then; measured over 60 steps: 1.0e-3.
"""
SAME = "final weights and state identical to the undisturbed run's"


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    what: str
    injected: str
    outcome: str
    held: bool


class Bench:
    """What all kinds share: the place, the cluster at hand, a store behind a proxy, and undisturbed runs."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.folder, self.chance = folder, chance
        self.references: dict[str, Run] = {}
        self.cluster: Cluster | None = None
        self.shape: tuple[float, ...] = ()

    @cached_property
    def place(self) -> Place:
        """Made when it is first asked for, after `use`: it takes the environment as it is then."""
        return Place(self.folder)

    def use(self, store: CheckpointProxy) -> None:
        """Workspaces below `self.bucket` are in this store; every process that is started reaches it by its proxy."""
        name = f"train-{secrets.token_hex(4)}"
        self.store, self.bucket = store, f"s3://{name}"
        Folder(self.bucket).fs.mkdir(name)
        os.environ["AWS_ENDPOINT_URL"] = store.endpoint

    def on(self, *cpus: float) -> Cluster:
        """A cluster of raylets with so many CPUs each; the one at hand if it is such a one and whole."""
        if self.cluster is not None and (self.shape != cpus or not self.cluster.whole(len(cpus))):
            self.close()
        if self.cluster is None:
            self.cluster, self.shape = Cluster(*cpus, environment=self.place.environment), cpus
        return self.cluster

    def reference(self, name: str = "two", **settings: Any) -> Run:
        """The undisturbed run of these settings, made once."""
        if name not in self.references:
            run = self.place.run(self.on(*(self.shape or (2,))), f"reference-{name}", **({"runtime": {}} | settings))
            self.references[name] = run.done()
        return self.references[name]

    def close(self) -> None:
        if self.cluster is not None:
            self.cluster.stop()
            self.cluster = None


def compared(bench: Bench, run: Run, what: str, injected: str, reference: str = "two", more: str = "") -> Line:
    """The line of a run that has to end with the same weights and the same final state."""
    same = run.digests() == bench.references[reference].digests()
    outcome = SAME if same else f"final weights DIFFER: {run.digests()}, {bench.references[reference].digests()}"
    return Line(what, injected, outcome + more, same)


def group_sizes(run: Run) -> list[int]:
    """Sizes of the worker groups in the order in which they started.

    NOTE a raylet that joins a cluster on the same machine tells the driver all over again what was logged before.
    """
    found = re.findall(r"worker group of size (\d+): .*?pid=(\d+)\) world_rank=0", run.text(), re.DOTALL)
    sizes: dict[str, int] = {}
    for size, first in found:
        sizes.setdefault(first, int(size))
    return list(sizes.values())


def largest_difference(run: Run, reference: Run) -> float:
    """Relative, step by step, of the losses.

    NOTE a process that is killed takes with it the few lines that MLflow has not got yet, so a step may be missing.
    """
    ours, theirs = run.losses(), reference.losses()
    both = ours.keys() & theirs.keys()
    assert len(both) >= 0.9 * len(theirs), f"only {len(both)} of {len(theirs)} losses were logged by both"
    return max(abs(ours[step] - theirs[step]) / abs(theirs[step]) for step in both)
