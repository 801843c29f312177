"""The services of a production set-up, live: PostgreSQL, MLflow over it and over S3, Ray with token authentication.

Minutes: `make test-stack`. Skipped where the services are not installed (infra/dev/stack.sh install).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.pipelines.conftest import TINY_MODEL

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
STACK = ROOT / "infra/dev/stack.sh"
PATIENCE_S = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ceph,
    pytest.mark.skipif(
        not (list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and shutil.which("radosgw")),
        reason="PostgreSQL or Ceph is not installed: infra/dev/stack.sh install",
    ),
]


def ten_free_ports() -> int:
    """The first of ten in a row that nobody listens on, below those that the system gives out to anybody."""
    for first in range(20000, 30000, 10):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + 10):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no ten free ports in a row")


class Stack:
    """The running services, and commands as a person at the terminal gives them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.own = os.environ | {
            "BIN": str(BIN),
            "FIRST_PORT": str(ten_free_ports()),
            "RAY_CPUS": "2",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        self.call("up", str(folder))
        listed = subprocess.run(["bash", "-c", f". {folder}/env.sh && env -0"], env=self.own, capture_output=True)
        self.environment = dict(line.split("=", 1) for line in listed.stdout.decode().split("\0") if "=" in line)
        self.environment["REPSEP_HOME"] = str(folder / "home")

    def call(self, *arguments: str) -> None:
        done = subprocess.run(
            ["bash", str(STACK), *arguments], env=self.own, capture_output=True, text=True, timeout=PATIENCE_S
        )
        assert done.returncode == 0, done.stdout + done.stderr

    def run(self, *arguments: str) -> str:
        done = subprocess.run(
            [str(BIN / arguments[0]), *arguments[1:]],
            env=self.environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, f"{arguments}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return done.stdout

    def submitted(self, job: str, recipe: Path, *more: str) -> list[str]:
        return ["ray", "job", "submit", "--working-dir", ".", "--", "python", job, "--config", str(recipe), *more]


@pytest.fixture(scope="module")
def stack(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    for place in (folder, *folder.parents):  # PostgreSQL runs as its own user, who must get there
        if place.stat().st_uid == os.getuid() and place != Path("/"):
            place.chmod(place.stat().st_mode | 0o011)
    running = None
    try:
        running = Stack(folder)
        yield running
    finally:
        ports = running.own if running else os.environ
        subprocess.run(["bash", str(STACK), "down", str(folder)], env=ports, check=True, timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def recipe(stack: Stack, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it in buckets; the images are uploaded."""
    upload = "import sys, s3fs; s3fs.S3FileSystem().put(sys.argv[1] + '/', 'team/scenes/', recursive=True)"
    stack.run("python", "-c", upload, str(scenes))
    values: dict[str, Any] = {
        "workspace": "s3://team/workspace",
        "prepare": {"source": "s3://team/scenes"},
        "train": {
            "model": TINY_MODEL,
            "steps": 12,
            "batch_size": 4,
            "validate_every": 6,
            "warmup_steps": 2,
            "augment": {"crop": 64},
            "runtime": {"workers": 2, "log_every": 1},
        },
        "evaluate": {"overlays": 2},
        "register": {"name": "streets"},
        "segment": {"source": "s3://team/scenes/unlabelled", "target": "s3://team/labelled"},
    }
    file = tmp_path_factory.mktemp("recipe") / "recipe.yaml"
    file.write_text(yaml.safe_dump(values))
    return file


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], log: Path) -> None:
    """Poll until it holds; fails if the process ends before, or after 15 minutes."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert process.poll() is None, log.read_text()[-3000:]
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def receipts(text: str) -> dict[str, dict[str, Any]]:
    found = [json.loads(line) for line in text.splitlines() if line.startswith('{"stage"')]
    return {receipt["stage"]: receipt for receipt in found}


def test_train_register_and_segment_through_jobs_and_the_command_line(stack: Stack, recipe: Path) -> None:
    stack.run("repsep", "prepare", "--config", str(recipe))
    trained = receipts(stack.run(*stack.submitted("jobs/train.py", recipe, "--json")))["train"]
    assert trained["results"]["model"].startswith("s3://team/workspace/train/")
    stack.run(*stack.submitted("jobs/evaluate.py", recipe))
    registered = receipts(stack.run("repsep", "register", "--config", str(recipe), "--json"))["register"]
    assert (registered["results"]["alias"], registered["results"]["version"]) == ("champion", "1")
    assert "champion" in stack.run("repsep", "models", "list", "--config", str(recipe))
    labelled = receipts(stack.run(*stack.submitted("jobs/segment.py", recipe, "--json")))["segment"]
    assert (labelled["results"]["rows"], labelled["results"]["failed_rows"]) == (6, 0)
    again = receipts(stack.run("repsep", "segment", "--config", str(recipe), "--json"))["segment"]
    assert again["cached"]


def test_a_training_goes_on_while_mlflow_is_restarted_and_nothing_is_missing(
    stack: Stack, recipe: Path, tmp_path: Path
) -> None:
    stack.run("repsep", "prepare", "--config", str(recipe))
    more = ("--set", "train.steps=150", "--set", "train.validate_every=50", "--json")
    command = stack.submitted("jobs/train.py", recipe, *more)
    log = tmp_path / "log"
    with log.open("wb") as output:
        job = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], env=stack.environment, cwd=ROOT, stdout=output, stderr=output
        )
    wait_for(lambda: "step 1" in log.read_text(), job, log)
    stack.call("restart", "mlflow", str(stack.folder))
    assert job.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    trained = receipts(log.read_text())["train"]
    count = (
        "import sys, mlflow; c = mlflow.MlflowClient(); "
        "print(len({m.step for m in c.get_metric_history(sys.argv[1], 'loss')}))"
    )
    assert stack.run("python", "-c", count, trained["results"]["mlflow_run"]).strip() == "150"


def test_a_stranger_without_the_token_gets_nothing_from_ray(stack: Stack) -> None:
    stranger = {k: v for k, v in stack.environment.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [str(BIN / "ray"), "job", "list"],
        env=stranger | {"HOME": str(stack.folder / "nobody"), "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()
