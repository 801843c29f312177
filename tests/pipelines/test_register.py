"""Which model becomes champion, and that a registered one comes back as it was.

Shapes: K classes.
"""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlflow.pyfunc
import numpy as np
import pandas as pd
import pytest
from click.testing import CliRunner
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from jobs.cli import repsep
from pipelines import evaluate as evaluation_stage
from pipelines import register as register_stage
from pipelines import registry
from pipelines.config import EvaluateConfig, Recipe, RegisterConfig, SegmentConfig, TrackingConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.evaluate import COUNTS, Counts, evaluate
from pipelines.evaluation.measures import CLEAN, Measured
from pipelines.gate import Decision, absolute_checks, compare, first, gate_page, paired_bootstrap
from pipelines.models import fetch_model, load_files
from pipelines.prepare import prepare
from pipelines.register import register
from pipelines.segment import segment
from pipelines.stage import Receipt, StageRun, run_stage
from pipelines.tracking import client_for, start_run, tracking_uri
from pipelines.workflow import describe
from repsep_model.checkpoint import save_segmentor
from repsep_model.images import decode_image, decode_mask
from repsep_model.inference import segment_image
from repsep_model.metrics import CALIBRATION_BINS
from tests.model.tiny import VIT, tiny_segmentor
from tests.pipelines.layout import CLASSES, encoded, picture, write_source
from tests.ports import free_ports

NAMES = [c["name"] for c in CLASSES]
K = len(CLASSES)
GATE = RegisterConfig(bootstrap=500)


def counts_of(
    right: list[float], *, images: int = 40, pixels: tuple[int, ...] = (4000, 3000, 2000), seed: int = 0
) -> Counts:
    """Counts of a model that finds this share of each class's pixels; what it misses it calls sky, of sky road.

    The images differ in how many pixels they have and in how well they are segmented, the same for every model.
    """
    rng = np.random.default_rng(seed)
    labelled = rng.poisson(np.array(pixels) / images, (images, K))
    hardness = rng.normal(0, 0.03, (images, 1))
    found = np.rint(labelled * np.clip(np.array(right) + hardness, 0, 1)).astype(np.int64)
    sky, road, tree = (labelled - found).T
    mistaken = np.stack([road + tree, sky, 0 * tree], axis=1)
    return {"intersection": found, "predicted": found + mistaken, "labelled": labelled}


def measured_of(counts: Counts) -> Measured:
    """What an evaluation of as many images finds, as far as the registry asks for it."""
    images = len(counts["labelled"])
    matrix = np.diag(counts["intersection"].sum(axis=0))
    return Measured(
        0,
        list(range(images)),
        [f"{i}.jpg" for i in range(images)],
        np.stack([counts[name] for name in COUNTS], axis=1),
        np.ones((images, 2, K), np.int64),
        np.ones((2, CALIBRATION_BINS), np.int64),
        np.zeros(CALIBRATION_BINS),
        {CLEAN: matrix},
    )


# ---------------------------------------------------------------- the gate


def test_a_clearly_better_model_wins() -> None:
    decision = compare(counts_of([0.9, 0.9, 0.9]), counts_of([0.8, 0.8, 0.8]), NAMES, GATE)
    assert decision.promoted
    figures = decision.figures
    assert 0 < figures["low"] < figures["difference"] < figures["high"]
    assert figures["difference"] == pytest.approx(figures["miou"] - figures["champion_miou"])
    assert decision.reason.startswith(f"mIoU +{figures['difference']:.4f} against the champion, 95 % interval [+")


@pytest.mark.parametrize("right", [[0.8, 0.8, 0.8], [0.7, 0.7, 0.7]], ids=["equal", "worse"])
def test_a_model_that_is_not_better_loses(right: list[float]) -> None:
    decision = compare(counts_of(right), counts_of([0.8, 0.8, 0.8]), NAMES, GATE)
    assert not decision.promoted
    assert decision.reason.endswith("is not above zero")


def test_a_model_that_is_better_on_a_few_images_only_has_not_shown_it() -> None:
    champion, challenger = counts_of([0.8, 0.8, 0.8]), counts_of([0.8, 0.8, 0.8])
    lucky = counts_of([0.95, 0.95, 0.95])
    for name in COUNTS:
        challenger[name][:2] = lucky[name][:2]
    decision = compare(challenger, champion, NAMES, GATE)
    assert decision.figures["difference"] > 0
    assert not decision.promoted


@pytest.mark.parametrize(("images", "promoted"), [(1, False), (4, False), (5, True)])
def test_a_better_model_on_a_few_images_only_has_not_shown_it_however_much_better(images: int, promoted: bool) -> None:
    ours, theirs = (counts_of(right, images=images) for right in ([0.9, 0.9, 0.9], [0.8, 0.8, 0.8]))
    decision = compare(ours, theirs, NAMES, GATE)
    assert decision.figures["low"] > 0
    assert decision.promoted == promoted
    if not promoted:
        assert decision.reason.endswith(f"] rests on {images} images; at least 5 are needed to be champion")
        evaluation = {"dataset": "streets", "split": "val", "images": images}
        page = gate_page(decision, model="b", champion="a", evaluation=evaluation)
        assert f'<td>compared on 5 images or more</td><td>{images} images</td><td class="no">refused' in page


def test_a_better_model_that_loses_one_large_class_is_kept_back_and_the_class_named() -> None:
    decision = compare(counts_of([0.95, 0.95, 0.7]), counts_of([0.8, 0.8, 0.8]), NAMES, GATE)
    assert decision.figures["low"] > 0
    assert not decision.promoted
    assert decision.reason.startswith("class tree loses 0.")
    assert decision.reason.endswith("more than 0.02")


def test_a_loss_within_the_limit_is_allowed() -> None:
    ours, theirs = counts_of([0.95, 0.95, 0.7]), counts_of([0.8, 0.8, 0.8])
    assert compare(ours, theirs, NAMES, GATE.model_copy(update={"max_class_drop": 0.3})).promoted


@pytest.mark.parametrize(("trees", "promoted"), [(999, True), (1000, False)])
def test_a_class_of_few_pixels_may_lose(trees: int, promoted: bool) -> None:
    ours, theirs = (counts_of(right, pixels=(4000, 3000, 0)) for right in ([0.95, 0.95, 0], [0.8, 0.8, 0]))
    for counts, found in ((ours, trees * 7 // 10), (theirs, trees * 8 // 10)):
        for image in range(40):  # spread evenly: the total is exact
            counts["labelled"][image, 2] = trees // 40 + (image < trees % 40)
            counts["intersection"][image, 2] = counts["predicted"][image, 2] = found // 40 + (image < found % 40)
    assert ours["labelled"][:, 2].sum() == trees
    assert compare(ours, theirs, NAMES, GATE).promoted == promoted


def test_a_class_that_never_occurs_takes_no_part() -> None:
    ours, theirs = (counts_of(right, pixels=(4000, 3000, 0)) for right in ([0.9, 0.95, 0], [0.8, 0.8, 0]))
    assert ours["labelled"][:, 2].sum() == ours["predicted"][:, 2].sum() == 0
    assert compare(ours, theirs, NAMES, GATE).promoted


RESULTS: dict[str, Any] = {"miou": 0.6, "iou": {"sky": 0.9, "road": 0.3, "tree": None}, "retention": 0.7}


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        ({}, "first"),
        ({"class_floors": {"sky": 0.9}, "min_retention": 0.7}, "first"),
        ({"class_floors": {"sky": 0.5, "road": 0.31}}, "class road has an IoU of 0.31 or more: IoU 0.3000"),
        ({"class_floors": {"tree": 0.0}}, "class tree has an IoU of 0.0 or more: it is in no image and no prediction"),
        ({"min_retention": 0.71}, "0.71 or more of the mIoU is kept on corrupted images: 0.7000"),
    ],
)
def test_the_first_model_must_have_what_the_recipe_asks_for(asked: dict[str, Any], reason: str) -> None:
    decision = first(RESULTS, GATE.model_copy(update=asked))
    assert (decision.promoted, decision.reason) == (reason == "first", reason)


def test_a_better_model_below_a_floor_is_kept_back() -> None:
    others = absolute_checks(RESULTS, GATE.model_copy(update={"class_floors": {"road": 0.5}}))
    decision = compare(counts_of([0.9, 0.9, 0.9]), counts_of([0.8, 0.8, 0.8]), NAMES, GATE, others)
    assert not decision.promoted
    assert decision.reason == "class road has an IoU of 0.5 or more: IoU 0.3000"
    assert [check.passed for check in decision.checks] == [True, True, True, False]


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ({"class_floors": {"lane": 0.5}}, "there is no class 'lane'; there are sky, road, tree"),
        ({"min_retention": 0.5}, "evaluate.corruptions=fast or full"),
    ],
)
def test_what_the_evaluation_cannot_answer_is_refused(asked: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        absolute_checks(RESULTS | {"retention": None}, GATE.model_copy(update=asked))


def brute_force_bootstrap(ours: Counts, theirs: Counts, resamples: int) -> tuple[float, float]:
    rng = np.random.default_rng(123)
    images = len(ours["labelled"])

    def miou(counts: Counts, chosen: list[int]) -> float:
        ious = []
        for k in range(K):
            right, predicted, labelled = (sum(int(counts[name][i][k]) for i in chosen) for name in COUNTS)
            if predicted + labelled - right:
                ious.append(right / (predicted + labelled - right))
        return sum(ious) / len(ious)

    differences = []
    for _ in range(resamples):
        chosen = rng.integers(0, images, images).tolist()
        differences.append(miou(ours, chosen) - miou(theirs, chosen))
    low, high = np.percentile(differences, (2.5, 97.5))
    return float(low), float(high)


def test_the_interval_is_that_of_a_bootstrap_in_plain_loops() -> None:
    ours, theirs = counts_of([0.86, 0.8, 0.8], images=25, seed=1), counts_of([0.8, 0.8, 0.8], images=25, seed=1)
    noise = np.random.default_rng(2).integers(0, 12, ours["intersection"].shape)
    ours["intersection"] = np.maximum(ours["intersection"] - noise, 0)
    found = paired_bootstrap(ours, theirs, 4000)
    expected = brute_force_bootstrap(ours, theirs, 1500)
    width = expected[1] - expected[0]
    assert width > 0.005
    assert found == pytest.approx(expected, abs=0.1 * width)


def test_the_interval_is_the_same_every_time_and_zero_wide_for_equal_models() -> None:
    ours, theirs = counts_of([0.9, 0.7, 0.8]), counts_of([0.8, 0.8, 0.8])
    assert paired_bootstrap(ours, theirs, 300) == paired_bootstrap(ours, theirs, 300)
    assert paired_bootstrap(ours, theirs, 300) != paired_bootstrap(ours, theirs, 300, seed=1)
    assert paired_bootstrap(ours, ours, 300) == (0.0, 0.0)


# ---------------------------------------------------------------- the registry


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A database with MLflow's tables: creating them takes seconds, so tests copy them."""
    path = tmp_path_factory.mktemp("database") / "mlflow.db"
    client_for(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    source = write_source(tmp_path_factory.mktemp("source"), ["train/0", "val/0", "val/1", "val/2"])
    workspace = str(tmp_path_factory.mktemp("prepared"))
    return open_dataset(
        prepare(workspace, Recipe().prepare.model_copy(update={"source": str(source)})).results["dataset"]
    )


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Four segmentors that differ in their weights, and one that knows other classes."""
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("first", "worse", "better", "foreign", "good")):
        classes = [c | {"name": c["name"].upper() if name == "foreign" else c["name"]} for c in CLASSES]
        model = tiny_segmentor(VIT, num_classes=K, seed=seed)
        save_segmentor(model, root / name, classes={"name": "drawn", "ignore_index": 255, "classes": classes})
    return {path.name: path for path in root.iterdir()}


@pytest.fixture
def recipe(tmp_path: Path, empty_database: Path, dataset: Dataset) -> Recipe:
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    return Recipe.model_validate(
        {
            "workspace": str(tmp_path / "work"),
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            "evaluate": {"dataset": dataset.folder.uri, "overlays": 0},
            "register": {"name": "streets", "bootstrap": 200},
        }
    )


@pytest.fixture
def judged(models: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """In place of a real evaluation: counts that are known for each model. Which models were judged, in order."""
    known = {"first": [0.8, 0.8, 0.8], "worse": [0.7, 0.7, 0.7], "better": [0.95, 0.95, 0.95], "foreign": [1.0] * 3}
    known["good"] = [0.9, 0.9, 0.9]
    seen: list[str] = []

    def count(config: object, dataset: Dataset, model: Any) -> Measured:
        for name, path in models.items():
            if (path / "model.safetensors").read_bytes() == (model.directory / "model.safetensors").read_bytes():
                seen.append(name)
                return measured_of(counts_of(known[name]))
        pytest.fail("an unknown model was judged")

    monkeypatch.setattr(evaluation_stage, "measure", count)
    monkeypatch.setattr(evaluation_stage, "_check_classes", lambda *_: None)
    return seen


@pytest.fixture
def evaluated(recipe: Recipe, models: dict[str, Path], judged: list[str]) -> Callable[[str], Receipt]:
    def run(name: str) -> Receipt:
        config = recipe.evaluate.model_copy(update={"model": str(models[name])})
        return evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": config}))

    return run


@pytest.fixture
def registered(recipe: Recipe, evaluated: Callable[[str], Receipt]) -> Callable[[str], Receipt]:
    """Evaluates and registers a model."""

    def run(name: str) -> Receipt:
        evaluated(name)
        return register(str(recipe.workspace), recipe)

    return run


@pytest.fixture
def client(recipe: Recipe) -> MlflowClient:
    return client_for(tracking_uri(recipe.tracking))


def version_of(client: MlflowClient, alias: str) -> str:
    return str(client.get_model_version_by_alias("streets", alias).version)


def aliases(client: MlflowClient) -> dict[str, str]:
    return {alias: str(version) for alias, version in client.get_registered_model("streets").aliases.items()}


def digest(uri: str, recipe: Recipe) -> str:
    with fetch_model(uri, recipe.tracking) as model:
        return model.digest


def test_the_first_model_is_champion_and_registering_it_again_does_nothing(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient, models: dict[str, Path]
) -> None:
    receipt = registered("first")
    assert (receipt.results["alias"], receipt.results["reason"]) == ("champion", "first")
    assert (receipt.results["model"], receipt.results["version"]) == ("models:/streets@champion", "1")
    champion = client.get_model_version_by_alias("streets", "champion")
    assert champion.tags["repsep.reason"] == "first"
    assert champion.tags["repsep.model_digest"] == digest(str(models["first"]), recipe)
    again = register(str(recipe.workspace), recipe)
    assert again.cached
    assert again == receipt
    assert len(client.search_model_versions("name = 'streets'")) == 1


def test_a_registered_model_comes_back_as_it_was(
    registered: Callable[[str], Receipt], recipe: Recipe, models: dict[str, Path]
) -> None:
    registered("first")
    for uri in ("models:/streets@champion", "models:/streets/1"):
        with fetch_model(uri, recipe.tracking) as model:
            assert model.digest == digest(str(models["first"]), recipe)
            assert model.version == "streets/1", "an alias is resolved once"
            for file, data in model.files().items():
                assert data == (models["first"] / file).read_bytes()


def test_a_worse_second_model_becomes_challenger_and_the_champion_stays(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient, judged: list[str]
) -> None:
    registered("first")
    receipt = registered("worse")
    assert (receipt.results["version"], receipt.results["alias"]) == ("2", "challenger")
    assert "is not above zero" in receipt.results["reason"]
    assert version_of(client, "champion") == "1"
    challenger = client.get_model_version_by_alias("streets", "challenger")
    assert str(challenger.version) == "2"
    assert challenger.tags["repsep.reason"] == receipt.results["reason"]
    assert challenger.tags["repsep.replaced"] == "1"
    assert register(str(recipe.workspace), recipe).cached
    assert judged == ["first", "worse"], "the champion's counts are known: it is not judged again"


def test_the_champion_is_judged_again_in_the_way_its_challenger_was(
    registered: Callable[[str], Receipt], recipe: Recipe, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("first")
    seen: list[tuple[str, EvaluateConfig]] = []
    count = evaluation_stage.measure

    def count_and_note(config: EvaluateConfig, dataset: Dataset, model: Any) -> Measured:
        seen.append((model.digest, config))
        return count(config, dataset, model)

    monkeypatch.setattr(evaluation_stage, "measure", count_and_note)
    way = {"pixel_budget": 409_600, "scales": (0.5, 1.0), "flip": True}
    config = recipe.evaluate.model_copy(update={"model": str(models["worse"])} | way)
    evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": config}))
    register(str(recipe.workspace), recipe)  # the evaluation counts, not what the recipe says by now
    assert [model for model, _ in seen] == [digest(str(models[name]), recipe) for name in ("worse", "first")]
    assert seen[0][1].model_dump(include=set(way)) == seen[1][1].model_dump(include=set(way)) == way


def test_a_better_second_model_becomes_champion(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient, models: dict[str, Path]
) -> None:
    registered("first")
    receipt = registered("better")
    assert (receipt.results["version"], receipt.results["alias"]) == ("2", "champion")
    figures = receipt.results["figures"]
    assert figures["low"] > 0
    assert version_of(client, "champion") == "2"
    tags = client.get_model_version("streets", "2").tags
    assert {name: float(tags[f"repsep.gate.{name}"]) for name in figures} == figures
    page = receipt.folder.read("gate.html").decode()
    assert "streets version 2 is" in page
    assert "against streets version 1" in page
    kept = [file.path for file in client.list_artifacts(receipt.results["mlflow_run"], "gate")]
    assert kept == ["gate/streets-2.html"]
    assert client.get_model_version("streets", "1").aliases == []
    assert digest("models:/streets@champion", recipe) == digest(str(models["better"]), recipe)
    assert register(str(recipe.workspace), recipe) == receipt, "it must not be compared with itself"
    assert len(client.search_model_versions("name = 'streets'")) == 2


def test_a_model_that_lost_is_judged_again_when_the_champion_has_changed(
    registered: Callable[[str], Receipt], client: MlflowClient
) -> None:
    for name in ("first", "worse", "better"):
        registered(name)
    client.set_registered_model_alias("streets", "champion", "2")  # somebody went back to the worse one
    assert registered("better").results["alias"] == "champion"


def test_a_new_decision_says_which_champion_was_compared_and_rollback_goes_there(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient
) -> None:
    for name in ("first", "worse", "better"):
        registered(name)
    client.set_registered_model_alias("streets", "champion", "2")
    receipt = registered("better")
    assert (receipt.results["alias"], receipt.results["champion"]) == ("champion", "2")
    assert client.get_model_version("streets", "3").tags["repsep.replaced"] == "2"
    assert registered("better").cached
    assert registry.roll_back(recipe) == "2"


def test_a_model_that_is_evaluated_again_stays_the_version_that_it_is(
    registered: Callable[[str], Receipt], recipe: Recipe, models: dict[str, Path], client: MlflowClient
) -> None:
    reasons = [registered(name).results["reason"] for name in ("first", "worse", "better")]
    for name, version, alias in (("better", "3", "champion"), ("worse", "2", "challenger")):
        config = recipe.evaluate.model_copy(update={"model": str(models[name]), "flip": True})
        again = evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": config}))
        receipt = register(str(recipe.workspace), recipe)
        assert not receipt.cached
        assert (receipt.results["version"], receipt.results["alias"]) == (version, alias)
        assert client.get_model_version("streets", version).tags["repsep.evaluation_uri"] == again.uri
    assert client.get_model_version("streets", "3").tags["repsep.reason"] == reasons[2]
    assert len(client.search_model_versions("name = 'streets'")) == 3


def test_a_cached_receipt_tells_which_version_is_champion_now(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient
) -> None:
    for name in ("first", "better"):
        registered(name)
    registry.roll_back(recipe)
    receipt = register(str(recipe.workspace), recipe)
    assert receipt.cached
    said = "register  cached: streets version 2 is registered: the champion is now version 1"
    assert describe(receipt) == [said, f"{'':9} -> models:/streets/2"]
    assert version_of(client, "champion") == "1", "who went back had a reason"
    registry.promote(recipe, "2", "it was the lens")
    assert register(str(recipe.workspace), recipe).results["alias"] == "champion"


def test_a_promoted_challenger_is_no_challenger_any_more(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient
) -> None:
    for name in ("first", "worse"):
        registered(name)
    registry.promote(recipe, "2", "the cameras were moved")
    assert aliases(client) == {"champion": "2"}
    receipt = register(str(recipe.workspace), recipe)
    assert receipt.cached
    assert (receipt.results["alias"], receipt.results["reason"]) == ("champion", "by hand: the cameras were moved")
    registered("first")
    assert aliases(client) == {"champion": "1"}


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], object]]:
    """What others do while two models are compared, a comparison each."""
    todo: list[Callable[[], object]] = []
    compared = register_stage.compare

    def compare_slowly(*given: Any) -> Decision:
        if todo:
            todo.pop(0)()
        return compared(*given)

    monkeypatch.setattr(register_stage, "compare", compare_slowly)
    return todo


def test_a_champion_that_changes_during_the_comparison_is_the_one_to_beat(
    registered: Callable[[str], Receipt],
    recipe: Recipe,
    client: MlflowClient,
    meanwhile: list[Callable[[], object]],
) -> None:
    for name in ("first", "better"):
        registered(name)
    registry.roll_back(recipe)
    meanwhile.append(lambda: client.set_registered_model_alias("streets", "champion", "2"))
    receipt = registered("good")  # better than 1, which is champion at first, and not than 2
    assert (receipt.results["alias"], receipt.results["champion"]) == ("challenger", "2")
    assert version_of(client, "champion") == "2"
    assert client.get_model_version("streets", "3").tags["repsep.replaced"] == "2"
    assert registered("good").cached
    assert len(client.search_model_versions("name = 'streets'")) == 3


def test_a_champion_that_never_stays_the_same_is_left_alone(
    registered: Callable[[str], Receipt],
    recipe: Recipe,
    client: MlflowClient,
    meanwhile: list[Callable[[], object]],
) -> None:
    for name in ("first", "worse"):
        registered(name)
    for version in ("2", "1", "2"):
        meanwhile.append(lambda to=version: client.set_registered_model_alias("streets", "champion", to))
    with pytest.raises(RepsepError, match="the champion of 'streets' was replaced 3 times while this model was comp"):
        registered("better")
    assert version_of(client, "champion") == "2"


def test_on_an_empty_registry_only_one_of_two_is_the_first(
    registered: Callable[[str], Receipt],
    recipe: Recipe,
    client: MlflowClient,
    judged: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another workspace registers after this one has seen that there is no champion."""
    crowned = register_stage.first
    other = recipe.model_copy(update={"workspace": f"{recipe.workspace}-2"})

    def first_slowly(*given: Any) -> Decision:
        monkeypatch.setattr(register_stage, "first", crowned)
        shutil.copytree(str(recipe.workspace), str(other.workspace))
        shutil.rmtree(f"{other.workspace}/register")
        register(str(other.workspace), other)
        return crowned(*given)

    monkeypatch.setattr(register_stage, "first", first_slowly)
    registered("first")
    assert judged == ["first"]
    assert len(client.search_model_versions("name = 'streets'")) == 1


def test_registers_of_one_name_in_a_workspace_exclude_each_other(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient, meanwhile: list[Callable[[], object]]
) -> None:
    for name in ("first", "worse"):
        registered(name)
    refused: list[str] = []

    def another() -> None:
        with pytest.raises(RepsepError, match=r"another register of streets .* is at work in") as caught:
            registered("good")
        refused.append(str(caught.value))

    meanwhile.append(another)
    assert registered("better").results["alias"] == "champion"
    assert refused
    assert registered("good").results["champion"] == "3"


def test_a_model_with_other_classes_than_the_champions_is_refused(
    registered: Callable[[str], Receipt], client: MlflowClient
) -> None:
    registered("first")
    with pytest.raises(UsageError) as caught:
        registered("foreign")
    said = str(caught.value)
    assert (
        "the champion models:/streets/1 has other classes (sky, road, tree) than this model (SKY, ROAD, TREE)" in said
    )
    assert "--set register.name=" in said
    assert version_of(client, "champion") == "1"


def test_a_registration_that_was_killed_is_finished_with_the_version_it_had_made(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("first")

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for step in ("set_model_version_tag", "set_registered_model_alias"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, step, killed)
            with pytest.raises(KeyboardInterrupt):
                registered("better")
    receipt = register(str(recipe.workspace), recipe)
    assert (receipt.results["alias"], receipt.results["version"]) == ("champion", "2")
    assert receipt.results["figures"]["low"] > 0
    assert client.get_model_version_by_alias("streets", "champion").tags["repsep.replaced"] == "1"
    assert len(client.search_model_versions("name = 'streets'")) == 2


def test_a_model_is_registered_again_where_the_registry_is_another(
    registered: Callable[[str], Receipt], recipe: Recipe, empty_database: Path, tmp_path: Path
) -> None:
    registered("first")
    shutil.copy(empty_database, tmp_path / "moved.db")
    moved = recipe.model_copy(update={"tracking": TrackingConfig(uri=f"sqlite:///{tmp_path}/moved.db")})
    receipt = register(str(recipe.workspace), moved)
    assert (receipt.results["alias"], receipt.results["reason"]) == ("champion", "first")
    assert digest("models:/streets@champion", moved) == digest("models:/streets@champion", recipe)


def test_scores_that_mlflow_could_not_take_are_sent_when_the_evaluation_is_called_again(
    recipe: Recipe, models: dict[str, Path], judged: list[str], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_id, work = start_run(recipe.tracking, "train"), str(recipe.workspace)

    def trained(run: StageRun) -> None:
        run.results = {"model": str(models["first"]), "mlflow_run": run_id}

    run_stage("train", workspace=work, config=GATE, inputs={}, packages=("jobs",), body=trained)
    away = recipe.model_copy(update={"tracking": TrackingConfig(uri=f"http://127.0.0.1:{free_ports(1)[0]}")})
    done = evaluate(work, away)
    assert "eval/miou" not in client.get_run(run_id).data.metrics
    assert evaluate(work, recipe).cached
    assert client.get_run(run_id).data.metrics["eval/miou"] == pytest.approx(done.results["miou"])
    assert [file.path for file in client.list_artifacts(run_id)] == ["evaluation.html"]
    assert client.get_run(run_id).info.status == "FINISHED"
    assert judged == ["first"]


def test_a_model_that_changed_since_it_was_evaluated_is_refused(
    recipe: Recipe, models: dict[str, Path], judged: list[str], tmp_path: Path
) -> None:
    shutil.copytree(models["first"], tmp_path / "mine")
    config = recipe.evaluate.model_copy(update={"model": str(tmp_path / "mine")})
    evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": config}))
    shutil.copy(models["better"] / "model.safetensors", tmp_path / "mine" / "model.safetensors")
    with pytest.raises(RepsepError, match="mine has changed since it was evaluated; run `repsep evaluate` again"):
        register(str(recipe.workspace), recipe)


def test_a_challenger_is_not_compared_on_images_that_have_changed_since(
    registered: Callable[[str], Receipt],
    evaluated: Callable[[str], Receipt],
    recipe: Recipe,
    dataset: Dataset,
    client: MlflowClient,
    judged: list[str],
    tmp_path: Path,
) -> None:
    copy = tmp_path / "dataset"
    shutil.copytree(dataset.folder.path, copy)
    registered("first")
    moved = recipe.evaluate.model_copy(update={"dataset": str(copy), "model": evaluated("better").results["model"]})
    evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": moved.model_copy(update={"flip": True})}))
    judged.clear()
    manifest = json.loads((copy / "dataset.json").read_text())
    manifest["splits"]["val"]["digest"] = "another"
    (copy / "dataset.json").write_text(json.dumps(manifest))
    with pytest.raises(UsageError, match=r"the split val of .*dataset has changed since this model was evaluated"):
        register(str(recipe.workspace), recipe)
    assert judged == []
    assert version_of(client, "champion") == "1"


def files_of(client: MlflowClient, version: str) -> Path:
    """Where the version's segmentor lies on this disk."""
    source = client.get_model_version("streets", version).source
    return Path(source.removeprefix("file://")) / "artifacts" / "segmentor"


def gone(directory: Path) -> None:
    shutil.rmtree(directory)


def cut(directory: Path) -> None:
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])


def flipped(directory: Path) -> None:
    weights = directory / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def half_gone(directory: Path) -> None:
    (directory / "classes.json").unlink()


@pytest.mark.parametrize("damage", [gone, cut, flipped, half_gone])
def test_a_champion_whose_files_are_damaged_is_refused_before_any_work_and_can_be_rolled_back(
    damage: Callable[[Path], None],
    registered: Callable[[str], Receipt],
    evaluated: Callable[[str], Receipt],
    recipe: Recipe,
    client: MlflowClient,
    judged: list[str],
    tmp_path: Path,
) -> None:
    for name in ("first", "better"):
        registered(name)
    evaluated("worse")
    damage(files_of(client, "2"))
    judged.clear()
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.png").write_bytes(encoded(picture(0)))
    section = SegmentConfig(source=str(tmp_path / "photos"), target=str(tmp_path / "out"))
    todo = (
        lambda: register(str(recipe.workspace), recipe),
        lambda: segment(str(recipe.workspace), recipe.model_copy(update={"segment": section})),
        lambda: registry.promote(recipe, "2", "a slip"),
    )
    for work in todo:
        with pytest.raises(RepsepError, match="repsep models rollback") as caught:
            work()
        assert "models:/streets/2" in str(caught.value)
    assert judged == []
    assert not (tmp_path / "out").exists()
    assert len(client.search_model_versions("name = 'streets'")) == 2
    assert registry.roll_back(recipe) == "1"
    assert register(str(recipe.workspace), recipe).results["alias"] == "challenger"


def test_a_registry_that_does_not_answer_crowns_nobody(
    registered: Callable[[str], Receipt], client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    registered("first")

    def down(*_: object) -> None:
        raise MlflowException("the database is locked")

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_model_version_by_alias", down)
        with pytest.raises(RepsepError, match=r"MLflow at sqlite:.* cannot be used: the database is locked"):
            registered("worse")
    assert version_of(client, "champion") == "1"
    assert len(client.search_model_versions("name = 'streets'")) == 1


def test_the_registered_model_answers_as_a_service_does(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient
) -> None:
    registered("first")
    version = client.get_model_version_by_alias("streets", "champion")
    photo = encoded(picture(0, 40, 60))
    with pytest.warns(UserWarning, match="type hints"):
        served = mlflow.pyfunc.load_model(version.source)
    (answer,) = served.predict(pd.DataFrame({"image": [photo]}))
    with fetch_model("models:/streets@champion", recipe.tracking) as model:
        expected = segment_image(load_files(model.files()), decode_image(photo))
    assert np.array_equal(decode_mask(base64.b64decode(answer["mask"])), expected.labels)
    assert (answer["height"], answer["width"]) == (40, 60)
    assert answer["confidence"] == pytest.approx(float(expected.confidence.mean()))


# ---------------------------------------------------------------- asking for a model


@pytest.mark.parametrize("uri", ["models:/streets@nobody", "models:/streets/9", "models:/roads@champion"])
def test_a_model_that_is_not_registered_is_answered_with_those_that_are(
    registered: Callable[[str], Receipt], recipe: Recipe, uri: str
) -> None:
    registered("first")
    with pytest.raises(RepsepError) as caught, fetch_model(uri, recipe.tracking):
        pytest.fail("it was fetched")
    said = str(caught.value)
    assert said.startswith(f"{uri} is not in the registry at sqlite:///")
    assert "registered are: streets" in said


def test_an_empty_registry_says_what_to_run(recipe: Recipe) -> None:
    with (
        pytest.raises(RepsepError, match=r"nothing is registered there yet\. Run `repsep register`"),
        fetch_model("models:/streets@champion", recipe.tracking),
    ):
        pytest.fail("it was fetched")


@pytest.mark.parametrize(
    "uri",
    [
        "models:",
        "models:/",
        "models:/streets",
        "models:/streets@",
        "models:/streets/latest",
        "models:/a/b@c",
        "models:a/1",
    ],
)
def test_a_model_uri_that_cannot_be_understood_is_told_the_forms(recipe: Recipe, uri: str) -> None:
    with pytest.raises(UsageError) as caught, fetch_model(uri, recipe.tracking):
        pytest.fail("it was fetched")
    assert str(caught.value) == f"{uri}: write models:/name@alias or models:/name/version"


@pytest.mark.parametrize("uri", ["file:///tmp/mlruns", "./mlruns", "mlruns", "/data/mlruns", "s3://bucket/mlruns"])
def test_a_file_store_is_refused(uri: str) -> None:
    with pytest.raises(UsageError) as caught:
        tracking_uri(TrackingConfig(uri=uri))
    assert f"tracking.uri {uri!r}: MLflow's file store is not supported; use sqlite:///" in str(caught.value)


def test_the_tracking_uri_is_the_recipes_then_the_environments_then_sqlite_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REPSEP_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(TrackingConfig()) == f"sqlite:///{tmp_path}/home/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://tracking:5000")
    assert tracking_uri(TrackingConfig()) == "http://tracking:5000"
    assert tracking_uri(TrackingConfig(uri="sqlite:///runs/mlflow.db")) == f"sqlite:///{tmp_path}/runs/mlflow.db"
    assert (tmp_path / "runs").is_dir(), "sqlite makes no folder by itself"


# ---------------------------------------------------------------- by hand


def test_versions_are_listed_newest_first_with_what_the_gate_said(
    registered: Callable[[str], Receipt], recipe: Recipe
) -> None:
    for name in ("first", "worse", "better"):
        registered(name)
    found = registry.versions(recipe)
    assert [(v.version, v.aliases) for v in found] == [("3", ("champion",)), ("2", ("challenger",)), ("1", ())]
    assert found[2].reason == "first"
    assert "is not above zero" in found[1].reason
    assert [v.replaced for v in found] == ["1", "1", ""]
    assert found[0].miou is not None
    assert found[2].miou is not None
    assert found[0].miou > found[2].miou


def test_a_comparison_by_hand_says_what_the_gate_said_and_moves_nothing(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient
) -> None:
    registered("first")
    judged_then = registered("better").results["figures"]
    decision = registry.compare_versions(recipe, "2", "1")
    assert {name: round(value, 6) for name, value in decision.figures.items()} == judged_then
    assert not registry.compare_versions(recipe, "1", "2").promoted
    assert version_of(client, "champion") == "2"


def test_versions_are_compared_as_before_when_the_workspace_was_cleared(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient
) -> None:
    for name in ("first", "better"):
        registered(name)
    before = registry.compare_versions(recipe, "2", "1")
    shutil.rmtree(str(recipe.workspace))
    assert registry.compare_versions(recipe, "2", "1") == before
    run = client.get_model_version("streets", "1").run_id
    shutil.rmtree(Path(client.get_run(run).info.artifact_uri.removeprefix("file://")) / "evaluation")
    with pytest.raises(
        RepsepError, match=r"version 1 is gone .*evaluate it again: --set evaluate.model=models:/streets/1"
    ):
        registry.compare_versions(recipe, "2", "1")


def test_evaluations_of_another_kind_are_not_compared(
    registered: Callable[[str], Receipt], recipe: Recipe, models: dict[str, Path]
) -> None:
    registered("first")
    config = recipe.evaluate.model_copy(update={"model": str(models["better"]), "flip": True})
    evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": config}))
    register(str(recipe.workspace), recipe)
    with pytest.raises(UsageError, match=r"versions 2 and 1 were evaluated differently \(flip: True, False\)"):
        registry.compare_versions(recipe, "2", "1")


def test_evaluations_on_other_images_are_not_compared(
    registered: Callable[[str], Receipt], recipe: Recipe, models: dict[str, Path]
) -> None:
    registered("first")
    config = recipe.evaluate.model_copy(update={"model": str(models["better"]), "split": "train"})
    evaluate(str(recipe.workspace), recipe.model_copy(update={"evaluate": config}))
    register(str(recipe.workspace), recipe)
    with pytest.raises(UsageError, match=r"versions 2 and 1 were evaluated differently \(evaluation: "):
        registry.compare_versions(recipe, "2", "1")


def test_a_version_is_promoted_by_hand_and_rolled_back_step_by_step(
    registered: Callable[[str], Receipt], recipe: Recipe, client: MlflowClient
) -> None:
    for name in ("first", "worse"):
        registered(name)
    registry.promote(recipe, "2", "the cameras were moved")
    assert version_of(client, "champion") == "2"
    assert client.get_model_version("streets", "2").tags["repsep.reason"] == "by hand: the cameras were moved"
    assert registry.roll_back(recipe) == "1"
    assert version_of(client, "champion") == "1"
    assert client.get_model_version("streets", "1").tags["repsep.reason"] == "rolled back from 2"
    with pytest.raises(UsageError, match="version 1, replaced no other"):
        registry.roll_back(recipe)
    with pytest.raises(UsageError, match="there is no version 7 of 'streets'; there are 2, 1"):
        registry.promote(recipe, "7", "a slip")


def test_the_commands_list_compare_promote_and_roll_back(
    registered: Callable[[str], Receipt], recipe: Recipe, tmp_path: Path
) -> None:
    for name in ("first", "worse"):
        registered(name)
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.model_dump_json(by_alias=True, exclude_defaults=True))

    def said(*arguments: str) -> str:
        done = CliRunner().invoke(repsep, ["models", *arguments, "--config", str(file)])
        assert done.exit_code == 0, done.output
        return done.stdout

    listed = [line.split()[:3] for line in said("list").splitlines()]
    assert listed == [[v.version, "mIoU", f"{v.miou:.4f}"] for v in registry.versions(recipe)]
    assert [version for version, *_ in listed] == ["2", "1"]
    assert "refused  better than the champion on the same images: mIoU -" in said("compare", "2", "1")
    assert said("promote", "2", "--reason", "a trial") == "streets version 2 is champion\n"
    assert said("rollback") == "streets version 1 is champion\n"
