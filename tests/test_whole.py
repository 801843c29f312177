"""The ways in, as a user types them, against real processes. Minutes: run with -m slow."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from pipelines.bulk.commits import Output
from pipelines.storage import Folder
from repsep_model import SegmentorConfig, build_segmentor, save_segmentor
from tests.pipelines.conftest import TINY_MODEL
from tests.processes import descendants, kill_tree

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
DEADLINE_S = 540


def run(arguments: list[str], environment: dict[str, str], cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, env=environment, cwd=cwd, capture_output=True, text=True, timeout=DEADLINE_S)


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    paths = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return os.environ | {"REPSEP_HOME": str(tmp_path / "home"), "RAY_ADDRESS": "local", "PATH": paths}


@pytest.fixture
def model(tmp_path: Path, scenes: Path) -> Path:
    built = build_segmentor(SegmentorConfig(num_classes=7, **TINY_MODEL))
    save_segmentor(built, tmp_path / "segmentor", classes=json.loads((scenes / "classes.json").read_text()))
    return tmp_path / "segmentor"


def wait_for(condition: object, process: subprocess.Popen[bytes]) -> None:
    """Poll until the condition holds; fails if the process ends before, or after nine minutes."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():  # type: ignore[operator]
        assert process.poll() is None, "it ended before the condition held"
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_segmentation_killed_half_way_ends_with_one_row_and_the_same_masks(
    scenes: Path, model: Path, environment: dict[str, str], tmp_path: Path
) -> None:
    source = tmp_path / "in"
    source.mkdir()
    whole = sorted((scenes / "images").rglob("*.jpg"))
    for number in range(96):
        (source / f"{number:03d}.jpg").write_bytes(whole[number % len(whole)].read_bytes())
    command = [
        str(BIN / "repsep"),
        "segment",
        str(source),
        "OUT",
        "--model",
        str(model),
    ]
    reference, target = tmp_path / "reference", tmp_path / "out"
    done = run([str(reference) if a == "OUT" else a for a in command], environment)
    assert done.returncode == 0, done.stderr[-3000:]

    killed = subprocess.Popen([str(target) if a == "OUT" else a for a in command], env=environment, cwd=ROOT)
    wait_for(lambda: len(list(target.glob("masks/*.png"))) >= 48, killed)
    kill_tree(killed.pid)
    killed.wait()
    left = len(list(target.glob("masks/*.png")))
    assert 48 <= left < 96, "it was to be killed half-way"

    done = run([str(target) if a == "OUT" else a for a in command], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    keys = Output(Folder(str(target))).results()["key"].to_pylist()
    assert sorted(keys) == sorted(set(keys)) == [f"{number:03d}.jpg" for number in range(96)]
    assert int(re.search(r"(\d+) done before", done.stderr)[1]) > 0  # type: ignore[index]
    for mask in reference.glob("masks/*.png"):
        assert (target / "masks" / mask.name).read_bytes() == mask.read_bytes()


@pytest.fixture
def head(environment: dict[str, str], tmp_path: Path) -> Iterator[dict[str, str]]:
    """`ray start --head` on free ports; yields the environment for `ray job submit`. Ended by its processes' ids."""
    at = environment | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0123456789abcdef" * 4}
    del at["RAY_ADDRESS"]
    folder = tempfile.mkdtemp(prefix="ray-")  # tmp_path is too long for a socket's name
    arguments = [
        "start",
        "--head",
        "--block",
        "--port=26379",
        "--dashboard-port=28265",
        "--num-cpus=2",
        f"--temp-dir={folder}",
    ]
    log = (tmp_path / "head.log").open("wb")
    process = subprocess.Popen([str(BIN / "ray"), *arguments], env=at, stdout=log, stderr=log)
    at["RAY_API_SERVER_ADDRESS"] = "http://127.0.0.1:28265"
    wait_for(lambda: run([str(BIN / "ray"), "job", "list"], at).returncode == 0, process)
    yield at
    kill_tree(process.pid)
    process.wait()
    log.close()
    shutil.rmtree(folder)


def test_training_is_submitted_as_a_ray_job_both_ways(head: dict[str, str], scenes: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    section = {"model": TINY_MODEL, "steps": 6, "validate_every": 3, "batch_size": 4, "augment": {"crop": 64}}
    recipe.write_text(
        yaml.safe_dump({"workspace": str(tmp_path / "ws"), "prepare": {"source": str(scenes)}, "train": section})
    )
    prepared = run([str(BIN / "repsep"), "prepare", "--config", str(recipe)], head)
    assert prepared.returncode == 0, prepared.stderr
    submit = [str(BIN / "ray"), "job", "submit", "--working-dir", "."]
    done = run([*submit, "--", "python", "jobs/train.py", "--config", str(recipe)], head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "6 steps, mIoU" in done.stdout
    assert list((tmp_path / "ws").glob("train/*/model/model.safetensors"))

    # Without a config it trains on generated scenes; what it writes is not lost with the job's throw-away folder.
    done = run([*submit, "jobs/train.py"], head)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "400 steps, mIoU" in done.stdout
    assert list((Path(head["REPSEP_HOME"]) / "workspace").glob("train/*/model/model.safetensors"))


def test_a_sweep_leaves_a_table_a_plot_and_a_recipe_that_train_takes(
    environment: dict[str, str], scenes: Path, tmp_path: Path
) -> None:
    other = TINY_MODEL | {"separation": "local"}
    recipe = {
        "workspace": str(tmp_path / "ws"),
        "prepare": {"source": str(scenes)},
        "train": {"model": TINY_MODEL, "batch_size": 4, "steps": 8, "augment": {"crop": 64}},
        "sweep": {"trials": 3, "steps": 8, "validate_every": 4, "confirm_seeds": 0, "search": {"backbones": [other]}},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    done = run([str(BIN / "repsep"), "sweep", "--config", str(tmp_path / "recipe.yaml"), "--json"], environment)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])["results"]
    assert results["trials"] == 3
    assert results["failed"] == 0
    assert Path(results["table"]).read_text().count("\n") == 4
    done = run([str(BIN / "repsep"), "train", "--config", results["best_yaml"]], environment)
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_demo_runs_and_the_second_time_every_stage_is_cached(
    environment: dict[str, str], scenes: Path, tmp_path: Path
) -> None:
    steps = [
        "--set",
        "train.steps=8",
        "--set",
        "train.validate_every=4",
        "--set",
        f"train.model={json.dumps(TINY_MODEL)}",
    ]
    command = [str(BIN / "repsep"), "demo", "--data", str(scenes), "--folder", str(tmp_path / "demo"), *steps]
    first = run(command, environment)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "report page:" in first.stdout
    page = Path(first.stdout.split("report page:")[1].strip())
    assert page.read_text().count("data:image/") >= 7
    assert "http" not in re.sub(r"data:image[^\"]*", "", page.read_text()).replace("http-equiv", "")
    second = run(command, environment)
    assert second.returncode == 0, second.stderr[-3000:]
    assert second.stdout.count(" cached: ") == 6


def test_no_process_is_left_behind() -> None:
    assert not {pid: c for pid, c in descendants(os.getpid()).items() if "gcs_server" in c or "moto.server" in c}
