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
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.checkout import ROOT, checkout
from tests.pipelines.conftest import TINY_MODEL

BIN = Path(sys.executable).parent
PATIENCE_S = 900

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ceph,
    pytest.mark.skipif(
        not (list(Path("/usr/lib/postgresql").glob("*/bin/initdb")) and shutil.which("radosgw")),
        reason="PostgreSQL or Ceph is not installed: infra/dev/stack.sh install",
    ),
]


def ten_free_ports(least: int) -> int:
    """The first of ten in a row that nobody listens on, below those that the system gives out to anybody."""
    for first in range(least, 30000, 10):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + 10):
                held.enter_context(socket.create_server(("127.0.0.1", port)))
            return first
    raise AssertionError("no ten free ports in a row")


class Stack:
    """The running services, and commands as a person at the terminal gives them."""

    def __init__(self, folder: Path) -> None:
        self.checkout = checkout(folder)
        self.own = os.environ | {
            "RAY_CPUS": "2",
            "START_SECONDS": "600",
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
        }
        self.environment: dict[str, str] = {}

    def up(self) -> None:
        """Start it on free ports, not those from before; only this verb is told which."""
        least = 10 + int(self.environment.get("STACK_FIRST_PORT", "20000"))
        self.call("make", "stack-up", FIRST_PORT=str(ten_free_ports(least)))
        listed = subprocess.run(
            ["bash", "-c", ". .repsep/stack/env.sh && env -0"], cwd=self.checkout, env=self.own, capture_output=True
        )
        self.environment = dict(line.split("=", 1) for line in listed.stdout.decode().split("\0") if "=" in line)
        self.environment["REPSEP_HOME"] = str(self.checkout / "home")

    def restart(self, service: str) -> None:
        self.call("bash", "infra/dev/stack.sh", "restart", service)

    def down(self) -> None:
        self.call("make", "stack-down")

    def call(self, *arguments: str, **more: str) -> None:
        done = subprocess.run(
            arguments, cwd=self.checkout, env=self.own | more, capture_output=True, text=True, timeout=PATIENCE_S
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
def stack(request: pytest.FixtureRequest) -> Iterator[Stack]:
    # PostgreSQL runs as its own user, who must get there; and pytest's own folder is closed by the next pytest.
    folder = Path(tempfile.mkdtemp(prefix="stack-"))
    folder.chmod(0o755)
    started = Stack(folder)
    try:
        started.up()
        yield started
    finally:
        started.down()
    if not request.session.testsfailed:  # the logs are there
        shutil.rmtree(folder)


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


def test_mlflow_and_its_database_are_restarted_in_the_middle_and_all_stages_go_on_and_are_whole(
    stack: Stack, recipe: Path, tmp_path: Path
) -> None:
    values = yaml.safe_load(recipe.read_text())
    values["train"] |= {"steps": 150, "validate_every": 50}
    values["register"] = {"name": "restarted"}
    values["segment"]["target"] = "s3://team/labelled-restarted"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(values))
    config = ("--config", str(recipe), "--json")
    stack.run("repsep", "prepare", *config)
    command = stack.submitted("jobs/train.py", recipe, "--json")
    log = tmp_path / "log"
    with log.open("wb") as output:
        job = subprocess.Popen(
            [str(BIN / command[0]), *command[1:]], env=stack.environment, cwd=ROOT, stdout=output, stderr=output
        )
    wait_for(lambda: "step 1" in log.read_text(), job, log)
    stack.restart("mlflow")
    assert job.wait(PATIENCE_S) == 0, log.read_text()[-3000:]
    trained = receipts(log.read_text())["train"]
    stack.restart("postgres")  # MLflow stays up, and finds all its connections closed
    stack.run("repsep", "evaluate", *config)  # also sends what training could not, if the server came back too late
    count = (
        "import sys, mlflow; c = mlflow.MlflowClient(); "
        "print(len({m.step for m in c.get_metric_history(sys.argv[1], 'loss')}))"
    )
    assert stack.run("python", "-c", count, trained["results"]["mlflow_run"]).strip() == "150"
    registered = receipts(stack.run("repsep", "register", *config))["register"]
    assert (registered["results"]["alias"], registered["results"]["version"]) == ("champion", "1")
    labelled = receipts(stack.run(*stack.submitted("jobs/segment.py", recipe, "--json")))["segment"]
    assert (labelled["results"]["rows"], labelled["results"]["failed_rows"]) == (6, 0)
    again = [json.loads(line) for line in stack.run("repsep", "workflow", *config).splitlines()]
    assert {receipt["stage"]: receipt["cached"] for receipt in again} == {
        **dict.fromkeys(("prepare", "train", "evaluate", "register", "segment"), True),
        "report": False,
    }


def test_a_stranger_without_the_token_gets_nothing_from_ray(stack: Stack) -> None:
    stranger = {k: v for k, v in stack.environment.items() if not k.startswith("RAY_AUTH")}
    done = subprocess.run(
        [str(BIN / "ray"), "job", "list"],
        env=stranger | {"HOME": str(stack.checkout / "nobody"), "RAY_AUTH_MODE": "token"},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode != 0
    assert "token" in (done.stdout + done.stderr).lower()


def test_services_that_are_started_on_other_ports_are_named_there_and_kept_what_they_held(stack: Stack) -> None:
    """The last: objects are gone, the database and the secrets are not."""
    before = stack.environment
    client = "import sys, mlflow; c = mlflow.MlflowClient(); "
    stack.run("python", "-c", client + "c.create_registered_model('kept')")
    refused = subprocess.run(["make", "stack-up"], cwd=stack.checkout, env=stack.own, capture_output=True, text=True)
    assert refused.returncode != 0
    assert "are up; first: infra/dev/stack.sh down" in refused.stderr
    stack.down()
    stack.up()
    changed = {name for name, value in before.items() if stack.environment[name] != value}
    assert changed == {
        "STACK_FIRST_PORT",
        "STACK_BACKEND",
        "MLFLOW_TRACKING_URI",
        "AWS_ENDPOINT_URL",
        "RAY_ADDRESS",
        "RAY_API_SERVER_ADDRESS",
    }
    assert stack.run("python", "-c", client + "print(c.get_registered_model('kept').name)").strip() == "kept"
