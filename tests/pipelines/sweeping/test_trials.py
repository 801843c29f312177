"""Sweeps on a real Ray cluster: they find, stop, retry, survive and leave nothing behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from mlflow import MlflowClient
from ray.util.placement_group import placement_group_table

from pipelines.config import Recipe, load_recipe
from pipelines.stage import Receipt
from pipelines.storage import Folder
from pipelines.sweep import BEST, PAGE, sweep
from pipelines.sweeping.placement import orphans, orphans_removed
from tests.pipelines.conftest import TINY_MODEL
from tests.processes import kill_tree

ROOT = Path(__file__).parents[3]
DEADLINE_S = 300.0
pytestmark = [pytest.mark.ray, pytest.mark.slow]


def until(what: Callable[[], Any], deadline_s: float = DEADLINE_S) -> Any:
    """What `what` gives once it gives something."""
    end = time.monotonic() + deadline_s
    while not (found := what()):
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)
    return found


def small(tmp_path: Path, scenes: Path, **sweep_section: Any) -> dict[str, Any]:
    """A sweep over the learning rate of a tiny model, one trial at a time so that ASHA has somebody to compare with."""
    return {
        "workspace": str(tmp_path / "ws"),
        "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
        "prepare": {"source": str(scenes)},
        "train": {
            "model": TINY_MODEL,
            "batch_size": 4,
            "warmup_steps": 2,
            "augment": {"crop": 64},
            "runtime": {"log_every": 2, "loader_threads": 1},
        },
        "sweep": {
            "trials": 3,
            "steps": 8,
            "validate_every": 2,
            "confirm_seeds": 0,
            "search": {"backbones": [TINY_MODEL], "loss": {"patch": [0.1, 0.2]}},
            "runtime": {"max_concurrent_trials": 1},
        }
        | sweep_section,
    }


def run(values: dict[str, Any]) -> Receipt:
    from pipelines.prepare import prepare

    recipe = Recipe.model_validate(values)
    prepare(values["workspace"], recipe.prepare)
    return sweep(values["workspace"], recipe)


def records(receipt: Receipt, search: str = "search") -> dict[str, Any]:
    folder = Folder(f"{receipt.uri}/trials/{search}")
    found = [json.loads(folder.read(e.key)) for e in folder.list() if e.key.count(".") == 1 and e.key.endswith(".json")]
    return {each["name"]: each for each in found}


def children(values: dict[str, Any], receipt: Receipt) -> dict[str, Any]:
    client = MlflowClient(tracking_uri=values["tracking"]["uri"])
    (experiment,) = [e.experiment_id for e in client.search_experiments() if e.name == "repsep"]
    found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{receipt.results['mlflow_run']}'")
    return {r.info.run_name: r for r in found}


@pytest.fixture
def stopped(ray_cluster: None, scenes: Path, tmp_path: Path) -> tuple[dict[str, Any], Receipt]:
    """A sweep whose later trials cannot keep up: their rates are next to nothing."""
    values = small(tmp_path, scenes, trials=4)
    values["train"] |= {"lr": 0.003}
    values["sweep"]["search"] |= {"lr": [1e-7, 1e-6]}
    return values, run(values)


def test_a_trial_that_asha_stops_leaves_no_placement_group_and_says_why_it_ended(
    stopped: tuple[dict[str, Any], Receipt],
) -> None:
    values, receipt = stopped
    assert receipt.results["stopped_early"] >= 1
    assert orphans() == []
    until(lambda: all(g["state"] == "REMOVED" for g in placement_group_table().values()), 30)
    until(lambda: ray.available_resources().get("CPU") == ray.cluster_resources()["CPU"], 30)
    runs = children(values, receipt)
    for name, record in records(receipt).items():
        ended, data = record["ended"], runs[name].data
        assert ended == "finished" or ended == f"stopped early at step {record['curve'][-1][0]} by ASHA"
        assert data.tags["repsep.ended"] == ended
        assert runs[name].info.status == "FINISHED"
        assert float(data.params["train.lr"]) == (0.003 if name == "default" else pytest.approx(5e-7, abs=5e-7))
        history = MlflowClient(tracking_uri=values["tracking"]["uri"]).get_metric_history(
            runs[name].info.run_id, "sweep/miou"
        )
        assert [[m.step, pytest.approx(m.value)] for m in history] == record["curve"]


def test_a_group_whose_maker_is_killed_is_removed_by_us_alone(ray_cluster: None) -> None:
    @ray.remote(num_cpus=0)
    class Maker:
        def make(self) -> None:
            ray.get(ray.util.placement_group([{"CPU": 1}]).ready())

    maker = Maker.remote()
    ray.get(maker.make.remote())
    assert orphans() == []
    ray.kill(maker)
    (group,) = until(orphans, 30)
    assert placement_group_table(group)["state"] == "CREATED", "Ray removes it by now: this module may go"
    with orphans_removed():
        pass
    until(lambda: placement_group_table(group)["state"] == "REMOVED", 30)


def test_a_trial_that_fails_is_tried_once_more_then_recorded_and_the_sweep_goes_on(
    ray_cluster: None, scenes: Path, tmp_path: Path
) -> None:
    values = small(tmp_path, scenes, trials=2)
    values["train"] |= {"lr": 1e30, "bf16": False, "clip": 1e30}
    receipt = run(values)
    found = records(receipt)
    assert found["default"]["ended"].startswith("failed: training stopped: ")
    assert found["trial-001"]["ended"] == "finished"
    assert (receipt.results["failed"], receipt.results["best"]) == (1, "trial-001")
    child = children(values, receipt)["default"]
    assert child.info.status == "FAILED"
    assert child.data.tags["repsep.ended"] == found["default"]["ended"]
    assert "failed: training stopped" in (Path(receipt.uri) / PAGE).read_text()


def test_a_sweep_whose_driver_is_killed_goes_on_and_runs_nothing_finished_again(scenes: Path, tmp_path: Path) -> None:
    values = small(tmp_path, scenes, trials=3, validate_every=10, steps=60)
    values["train"] |= {"lr": 1e-7, "ema": 0.5}  # the default, which runs first, is soon beaten
    values["sweep"]["search"] |= {"lr": [1e-3, 3e-3]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    command = [sys.executable, str(ROOT / "jobs/sweep.py"), "--config", str(tmp_path / "recipe.yaml"), "--json"]
    environment = os.environ | {"RAY_ADDRESS": "local", "REPSEP_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}

    def trial_files() -> dict[str, dict[str, Any]]:
        found = [json.loads(p.read_text()) for p in tmp_path.glob("ws/sweep/*/trials/search/*[!n].json")]
        return {each["name"]: each for each in found if "curve" in each}

    def one_is_done_and_one_has_begun() -> bool:
        found = trial_files()
        # At its third validation the checkpoint of the first is whole: uploads run behind the steps, one at a time.
        has_begun = any(len(t["curve"]) > 2 and not t["ended"] for t in found.values())
        return has_begun and any(t["ended"] for t in found.values())

    with (tmp_path / "first.log").open("wb") as log:
        first = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
    try:
        until(lambda: one_is_done_and_one_has_begun() or first.poll() is not None)
        assert first.poll() is None, (tmp_path / "first.log").read_text()[-3000:]
    finally:
        kill_tree(first.pid)
        first.wait()
    before = trial_files()
    done = {name for name, trial in before.items() if trial["ended"]}
    begun = {name: trial for name, trial in before.items() if trial["curve"] and not trial["ended"]}
    written = {path: path.stat().st_mtime_ns for path in tmp_path.glob("ws/sweep/*/ray/search-trials/**/*")}

    second = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False)
    assert second.returncode == 0, second.stderr[-3000:]
    after = trial_files()
    assert {name: after[name] for name in done} == {name: before[name] for name in done}
    for path, at in written.items():
        if any(name in str(path) for name in done) and path.exists() and path.is_file():
            assert path.stat().st_mtime_ns == at, f"{path} was written again"
    for name, trial in begun.items():
        assert after[name]["curve"][: len(trial["curve"])] == trial["curve"]
        steps = [int(line.split("step ")[1].split(",")[0]) for line in second.stderr.splitlines()
                 if line.startswith(f"search: {name} ") and ": step " in line]  # fmt: skip
        assert steps
        assert min(steps) > trial["curve"][0][0], "it began again at step 0"
    results = json.loads(second.stdout.splitlines()[-1])["results"]
    assert (results["trials"], results["failed"]) == (3, 0)
    assert load_recipe(Path(results["best_yaml"])).train.steps == 400


def test_tpe_proposes_the_trials_after_the_default(ray_cluster: None, scenes: Path, tmp_path: Path) -> None:
    values = small(tmp_path, scenes, trials=3, steps=4)
    values["sweep"]["search"] |= {"method": "tpe"}
    receipt = run(values)
    assert (receipt.results["trials"], receipt.results["failed"]) == (3, 0)
    assert set(records(receipt)) == {"default", "trial-001", "trial-002"}


def test_the_confirmation_counts_the_pairs_that_came_to_their_end(
    ray_cluster: None, scenes: Path, tmp_path: Path
) -> None:
    values = small(tmp_path, scenes, trials=2, confirm_seeds=2, steps=4)
    values["train"] |= {"lr": 1e30, "bf16": False, "clip": 1e30}
    receipt = run(values)
    assert receipt.results["confirmed"]["difference"] is None
    assert len(receipt.results["confirmed"]["errors"]) == 2
    assert receipt.results["winner"] == "trial-001", "a default that cannot be trained loses to a best that can"
    assert receipt.folder.read_if_present(BEST) is not None
