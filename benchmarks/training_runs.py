"""Training as it is started by people, in processes that can be killed: a Ray cluster of raylets, runs, their results.

python -m benchmarks.training_runs RECIPE     one `repsep train` in which several raylets of one machine are nodes
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from benchmarks.training_cluster import BIN, PATIENCE_S, ROOT, SETUP, Cluster, wait_for
from pipelines.config import PrepareConfig
from pipelines.errors import StorageError
from pipelines.prepare import prepare
from pipelines.scenes import write_scenes
from pipelines.storage import Folder
from tests.pipelines.conftest import TINY_MODEL

STEPS, EVERY = 24, 4
TRAIN: dict[str, Any] = {
    "model": TINY_MODEL,
    "steps": STEPS,
    "batch_size": 4,
    "validate_every": EVERY,
    "warmup_steps": 2,
    "augment": {"crop": 64},
    "runtime": {"workers": 2, "log_every": 1},
}


@dataclass
class Place:
    """A folder with a prepared dataset, the tracking store and the environment that all processes get."""

    folder: Path
    environment: dict[str, str] = field(init=False)
    dataset: str = field(init=False)

    def __post_init__(self) -> None:
        os.environ.update(SETUP)  # the token, for this process asks the clusters too
        self.environment = os.environ | {"REPSEP_HOME": str(self.folder / "home")}
        self.environment.pop("RAY_ADDRESS", None)
        write_scenes(self.folder / "scenes", train=24, val=8, unlabelled=0, size=(96, 128))
        prepared = prepare(str(self.folder / "data"), PrepareConfig(source=str(self.folder / "scenes")))
        self.dataset = prepared.results["dataset"]

    def run(self, cluster: Cluster, name: str, *, at: str | None = None, submit: bool = False, **settings: Any) -> Run:
        """Start a training in the workspace of this name (below `at`), or submit it as a Ray job.

        `settings` are keys of `train`.
        """
        settings = TRAIN | {"dataset": self.dataset} | settings
        settings["runtime"] = TRAIN["runtime"] | settings["runtime"]
        workspace = f"{at or self.folder}/{name}"
        recipe = self.folder / f"{name}-{len(list(self.folder.glob('*.yaml')))}.yaml"
        tracking = {"uri": f"sqlite:///{self.folder}/mlflow.db"}
        recipe.write_text(yaml.safe_dump({"workspace": workspace, "tracking": tracking, "train": settings}))
        return Run(self, cluster, workspace, recipe, submit)


class Run:
    """One start of a training. Started again with the same name it goes on."""

    def __init__(self, place: Place, cluster: Cluster, workspace: str, recipe: Path, submit: bool) -> None:
        self.place, self.workspace, self.log, self.recipe = place, workspace, recipe.with_suffix(".log"), recipe
        environment = place.environment | ({} if submit else {"RAY_ADDRESS": cluster.address}) | cluster.jobs
        command = [sys.executable, "-m", "benchmarks.training_runs", str(recipe)]
        if submit:
            command = [str(BIN / "ray"), "job", "submit", "--", *command]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env=environment, cwd=ROOT, stdout=log, stderr=log)
        self.began = time.monotonic()

    @cached_property
    def folder(self) -> Folder:
        """`<workspace>/train/<fingerprint>`."""
        root = Folder(f"{self.workspace}/train")
        (found,) = {entry.key.partition("/")[0] for entry in root.list() if entry.key.endswith("_STARTED.json")}
        return root / found

    @cached_property
    def mlflow_run(self) -> str:
        found: str = json.loads(self.folder.read("_STARTED.json"))["mlflow_run"]
        return found

    def text(self) -> str:
        return self.log.read_text(errors="replace")

    def step(self) -> int:
        """The last step that was logged, over all starts."""
        return max((step for step, _ in self.history("loss")), default=0)

    def history(self, metric: str) -> list[tuple[int, float]]:
        """(step, value) in the order in which they were logged; a step that was done again comes again."""
        absent = (ValueError, StorageError, sqlite3.OperationalError)  # nothing is written yet
        with contextlib.suppress(*absent), self._tracking() as store:
            query = "SELECT step, value FROM metrics WHERE run_uuid = ? AND key = ? ORDER BY timestamp, step"
            return store.execute(query, (self.mlflow_run, metric)).fetchall()
        return []

    def status(self) -> str:
        """What MLflow says of the run."""
        with self._tracking() as store:
            return str(store.execute("SELECT status FROM runs WHERE run_uuid = ?", (self.mlflow_run,)).fetchone()[0])

    @contextmanager
    def _tracking(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(
            sqlite3.connect(f"file:{self.place.folder}/mlflow.db?mode=ro", uri=True, timeout=30)
        ) as store:
            yield store

    def wait_for_step(self, step: int) -> None:
        wait_for(lambda: self.step() >= step, self.process, f"step {step}", self.log)

    def wait_for_words(self, words: str) -> None:
        wait_for(lambda: words in self.text(), self.process, repr(words), self.log)

    def wait(self) -> int:
        """The exit code; a run that hangs is an error of the proof."""
        try:
            return self.process.wait(PATIENCE_S)
        except subprocess.TimeoutExpired:
            self.kill()
            raise RuntimeError(f"hung:\n{self.text()[-3000:]}") from None

    def done(self) -> Run:
        """Wait for its good end."""
        if (code := self.wait()) != 0:
            raise RuntimeError(f"exit code {code}:\n{self.text()[-3000:]}")
        return self

    def kill(self) -> None:
        """SIGKILL the driver."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def error(self) -> str:
        """What the command said at its end."""
        return self.text().rpartition("Error: ")[2].strip()

    def losses(self) -> dict[int, float]:
        """Loss by step; of steps that were done again the last."""
        return dict(self.history("loss"))

    def checkpoints(self) -> list[str]:
        """The checkpoints' folders, the newest last."""
        found = (re.match(r"(.*\bcheckpoint_\d[^/]*)/", entry.key) for entry in self.folder.list())
        return sorted({each[1] for each in found if each})

    def has_checkpoint(self) -> bool:
        """Whether one is whole."""
        return any(self.folder.size_of(f"{each}/checkpoint.json") is not None for each in self.checkpoints())

    def digests(self) -> tuple[str, str]:
        """SHA-256 of model.safetensors and of the tensors in the last checkpoint."""
        return self.folder.sha256("model/model.safetensors"), state_digest(self.folder / self.checkpoints()[-1])


def state_digest(checkpoint: Folder) -> str:
    """SHA-256 over names, types and bytes of what a checkpoint holds: model, average, optimizer, step."""
    import torch

    digest = hashlib.sha256()

    def take(value: Any, name: str) -> None:
        if isinstance(value, torch.Tensor):
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode() + flat.numpy().tobytes())
        elif isinstance(value, dict):
            for key in sorted(value, key=str):
                take(value[key], f"{name}/{key}")
        elif isinstance(value, (list, tuple)):
            for number, each in enumerate(value):
                take(each, f"{name}/{number}")
        else:
            digest.update(f"{name}={value!r}".encode())

    files = sorted(e.key for e in checkpoint.list() if e.key.endswith((".pt", ".safetensors")) and "/" not in e.key)
    assert files, f"{checkpoint.uri} holds no state"
    for key in files:
        data = checkpoint.read(key)
        take(torch.load(io.BytesIO(data), weights_only=True) if key.endswith(".pt") else data, key)
    return digest.hexdigest()


def main() -> None:
    import ray.train

    from jobs.options import main as as_program
    from jobs.train import command
    from pipelines import cluster

    cluster.refuse_local = lambda *_: None  # the "nodes" share this machine's disk
    # A group that may grow looks for it every 2 s, not once a minute.
    config: Any = ray.train.ScalingConfig
    ray.train.ScalingConfig = partial(config, elastic_resize_monitor_interval_s=2.0)  # type: ignore[misc, assignment]
    sys.argv = ["train", "--config", sys.argv[1], "--json"]
    as_program(command)


if __name__ == "__main__":
    main()
