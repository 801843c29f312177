"""The workflow runs again what depends on a change and nothing else, and its plan says so beforehand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from jobs.cli import repsep
from pipelines.config import Recipe
from pipelines.stage import Receipt, is_planning, latest_receipt
from pipelines.storage import Folder
from pipelines.workflow import plan_workflow, run_workflow

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
STAGES = ["prepare", "train", "evaluate", "register", "segment", "report"]


@pytest.fixture(scope="module")
def whole(recipe: Recipe, scenes: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A recipe of all stages but the sweep, in a workspace and a registry of its own."""
    folder = tmp_path_factory.mktemp("workflow")
    values = recipe.model_dump(mode="json", by_alias=True, exclude_defaults=True)
    return values | {
        "workspace": str(folder / "workspace"),
        "tracking": {"uri": f"sqlite:///{folder}/mlflow.db"},
        "segment": {"source": str(scenes / "unlabelled"), "target": str(folder / "labelled")},
    }


@pytest.fixture(scope="module")
def done(whole: dict[str, Any], ray_cluster: None) -> list[Receipt]:
    return list(run_workflow(Recipe.model_validate(whole)))


def changed(values: dict[str, Any], key: str, value: Any) -> Recipe:
    copy = json.loads(json.dumps(values))
    *sections, name = key.split(".")
    place = copy
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = value
    return Recipe.model_validate(copy)


def files(uri: str) -> dict[str, str]:
    return {entry.key: entry.etag for entry in Folder(uri).list()}


def test_all_stages_run_once_and_are_then_cached(whole: dict[str, Any], done: list[Receipt]) -> None:
    assert [receipt.stage for receipt in done] == STAGES
    assert not any(receipt.cached for receipt in done)
    again = list(run_workflow(Recipe.model_validate(whole)))
    assert all(receipt.cached for receipt in again)
    assert again == done


@pytest.mark.parametrize(
    ("key", "value", "first"),
    [
        ("prepare.seed", 7, "prepare"),
        ("prepare.shard_rows", 8, "prepare"),
        ("train.lr", 0.123, "train"),
        ("train.steps", 13, "train"),
        ("train.model.stride", 16, "train"),
        ("train.loss.patch", 0.0, "train"),
        ("train.augment.flip", 0.25, "train"),
        ("train.seed", 5, "train"),
        ("train.runtime.workers", 1, None),
        ("train.runtime.log_every", 1, None),
        ("evaluate.overlays", 1, "evaluate"),
        ("evaluate.flip", True, "evaluate"),
        ("register.bootstrap", 300, "register"),
        ("register.name", "another", "register"),
        ("segment.pixel_budget", 1_000_000, "segment"),
        ("tracking.experiment", "another", None),
    ],
)
def test_a_changed_key_runs_its_stage_and_what_depends_on_it(
    key: str, value: Any, first: str | None, whole: dict[str, Any], done: list[Receipt]
) -> None:
    workspace, target = whole["workspace"], whole["segment"]["target"]
    before = files(workspace), files(target)
    if key == "segment.pixel_budget":  # masks of other settings need another prefix
        whole = json.loads(json.dumps(whole))
        whole["segment"]["target"] += "-other"
    plan = dict(plan_workflow(changed(whole, key, value)))
    assert list(plan) == STAGES
    runs = [stage for stage, what in plan.items() if not what.startswith("cached: ")]
    assert runs == ([] if first is None else STAGES[STAGES.index(first) :])
    if key == "register.name":
        assert "the registry has no version of this model" in plan["register"]
    elif first not in (None, "segment"):
        assert f"{key.partition('.')[2]}: " in plan[first]
        assert json.dumps(value) in plan[first]
    assert (files(workspace), files(target)) == before


def test_a_plan_names_what_changed_in_later_stages_too(whole: dict[str, Any], done: list[Receipt]) -> None:
    recipe = changed(whole, "prepare.seed", 7)
    sections = {"train": recipe.train.model_copy(update={"lr": 0.123, "steps": 13})}
    sections["evaluate"] = recipe.evaluate.model_copy(update={"overlays": 1, "dataset": None})
    plan = dict(plan_workflow(recipe.model_copy(update=sections)))
    conditional = "runs if what comes out of prepare is new"
    assert plan["prepare"] == "runs: seed: 0 -> 7"
    assert plan["train"] == f"{conditional}; changed since its latest run: lr: 0.001 -> 0.123; steps: 12 -> 13"
    assert plan["evaluate"] == f"{conditional}; changed since its latest run: overlays: 2 -> 1"
    assert [plan[stage] for stage in ("register", "segment", "report")] == [conditional] * 3


def test_a_bulk_run_that_fails_is_raised_after_the_report_of_the_others(
    whole: dict[str, Any], done: list[Receipt], tmp_path: Path
) -> None:
    """As after a promotion: the target holds the masks of the champion before."""
    target = str(tmp_path / "labelled")
    run_json = json.loads(Folder(whole["segment"]["target"]).read("run.json"))
    Folder(target).write("run.json", json.dumps(run_json | {"model": "the one before"}).encode())
    (tmp_path / "recipe.yaml").write_text(changed(whole, "segment.target", target).model_dump_json(by_alias=True))
    found = subprocess.run(
        [sys.executable, str(ROOT / "jobs/workflow.py"), "--config", str(tmp_path / "recipe.yaml")],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        timeout=300,
    )
    assert found.returncode == 2, found.stderr
    assert [line.split()[:2] for line in found.stdout.splitlines()[::2]] == [
        *([stage, "cached:"] for stage in STAGES[:4]),
        ["report", "done"],
    ]
    assert "the bulk run failed; the report is of what was done before it" in found.stderr
    assert f"Error: {target} was written with model 'the one before' instead of" in found.stderr
    page = Folder(found.stdout.split("-> ")[-1].strip().rpartition("/")[0]).read("index.html").decode()
    assert "Absent: nothing was segmented in bulk" in page


def test_what_runs_again_is_no_more_than_was_planned(whole: dict[str, Any], done: list[Receipt]) -> None:
    recipe = changed(whole, "evaluate.overlays", 1)
    receipts = {receipt.stage: receipt.cached for receipt in run_workflow(recipe)}
    assert receipts["prepare"]
    assert receipts["train"]
    assert not receipts["evaluate"]
    assert receipts["segment"]  # the champion is still the same


def test_two_workflows_in_one_workspace_keep_to_their_own_data(whole: dict[str, Any], done: list[Receipt]) -> None:
    ours, other = (
        run_workflow(each) for each in (Recipe.model_validate(whole), changed(whole, "prepare.shard_rows", 8))
    )
    first, between = next(ours), next(other)
    assert (first.uri, first.uri != between.uri) == (done[0].uri, True)
    assert list(ours) == done[1:], "what was done with our data, and not with the other's"
    assert latest_receipt(whole["workspace"], "prepare").uri == between.uri, "nothing of ours holds for the caller"


def test_between_the_lines_of_a_plan_its_caller_is_not_planning(whole: dict[str, Any], done: list[Receipt]) -> None:
    for _ in plan_workflow(Recipe.model_validate(whole)):
        assert not is_planning()


def test_the_command_prints_the_plan_and_verifies(
    whole: dict[str, Any], done: list[Receipt], tmp_path: Path, settings_file: Path
) -> None:
    planned = CliRunner().invoke(repsep, ["workflow", "--config", str(settings_file), "--plan"])
    assert planned.exit_code == 0, planned.output
    assert [line.split()[:2] for line in planned.stdout.splitlines()] == [[stage, "cached:"] for stage in STAGES]
    model = Folder(done[1].results["model"])
    weights = model.read("model.safetensors")
    try:
        model.write("model.safetensors", weights[:-1] + bytes([weights[-1] ^ 1]))
        verified = CliRunner().invoke(repsep, ["workflow", "--config", str(settings_file), "--plan", "--verify"])
    finally:
        model.write("model.safetensors", weights)
    assert "train     runs: changed or missing: model/model.safetensors" in verified.stdout


@pytest.fixture
def settings_file(whole: dict[str, Any], tmp_path: Path) -> Path:
    file = tmp_path / "recipe.yaml"
    file.write_text(json.dumps(whole))
    return file
