"""The figures that decide which model is used, each against a loop over pixels.

Shapes: K classes, H x W pixels.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines import evaluate as stage
from pipelines.config import EvaluateConfig, PrepareConfig, Recipe, TrackingConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import UsageError
from pipelines.evaluate import COUNTS, evaluate, prior_scores, read_counts
from pipelines.evaluation.measures import CLEAN, SEGMENTING, Judge, Measured, image_counts, together
from pipelines.models import fetch_model, load_files
from pipelines.prepare import prepare
from repsep_model.checkpoint import save_segmentor
from repsep_model.corruptions import corrupt, corruption_rng
from repsep_model.images import decode_image
from repsep_model.inference import segment_image
from repsep_model.metrics import BoundaryCounts, Calibration, ConfusionMatrix
from repsep_model.robustness import FAST_GRID
from tests.model.tiny import VIT, tiny_segmentor
from tests.pipelines.layout import CLASSES, encoded, ids, picture, write_classes, write_pair

K = len(CLASSES)
SIZES = {
    "train/a": (24, 32),
    "train/b": (24, 32),
    "train/c": (24, 32),
    "train/d": (12, 16),
    "train/e": (31, 20),
    "val/a": (24, 32),
    "val/b": (17, 40),
    "val/c": (48, 64),
    "val/d": (24, 32),
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Five training and four validation images of several sizes."""
    source = tmp_path_factory.mktemp("source")
    write_classes(source, name="sizes")
    for number, (key, size) in enumerate(SIZES.items()):
        image = encoded(picture(number, *size), "JPEG")
        write_pair(source, key, number, image=image, mask=encoded(ids(number, *size)))
    workspace = str(tmp_path_factory.mktemp("work"))
    config = PrepareConfig(source=str(source), row_group_rows=2)
    return open_dataset(prepare(workspace, config).results["dataset"])


def saved_model(folder: Path, names: list[str], seed: int = 0, **changes: Any) -> str:
    classes = [{"id": i, "name": name, "color": [i, i, i]} for i, name in enumerate(names)]
    model = tiny_segmentor(VIT, num_classes=len(names), seed=seed, **changes)
    save_segmentor(model, folder, classes={"name": "tiny", "ignore_index": 255, "classes": classes})
    return str(folder)


@pytest.fixture(scope="module")
def model_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved_model(tmp_path_factory.mktemp("model"), [c["name"] for c in CLASSES])


def counted(predicted: np.ndarray, mask: np.ndarray, classes: int) -> list[list[int]]:
    """Intersection, predicted and labelled pixels of each class, pixel by pixel."""
    found = [[0] * classes for _ in range(3)]
    for guess, label in zip(predicted.ravel().tolist(), mask.ravel().tolist(), strict=True):
        if label != 255:
            found[1][guess] += 1
            found[2][label] += 1
            if guess == label:
                found[0][label] += 1
    return found


# ---------------------------------------------------------------- counts


@pytest.mark.parametrize("classes", [1, 3, 255])
@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
def test_counts_of_an_image_are_those_of_a_loop_over_its_pixels(classes: int, ignored: float) -> None:
    rng = np.random.default_rng(classes)
    predicted = rng.integers(0, classes, (19, 23), dtype=np.uint8)
    mask = rng.integers(0, classes, (19, 23), dtype=np.uint8)
    mask[rng.random(mask.shape) < ignored] = 255
    found = image_counts(predicted, mask, classes)
    assert found.shape == (3, classes)
    assert found.tolist() == counted(predicted, mask, classes)


def test_counts_of_images_add_up_to_the_confusion_matrix() -> None:
    rng = np.random.default_rng(0)
    confusion = ConfusionMatrix(K)
    total = np.zeros((3, K), np.int64)
    for number in range(5):
        predicted, mask = rng.integers(0, K, (24, 32), dtype=np.uint8), ids(number)
        confusion.update(torch.from_numpy(mask), torch.from_numpy(predicted))
        total += image_counts(predicted, mask, K)
    counts = confusion.counts.numpy()
    assert np.array_equal(total, [np.diag(counts), counts.sum(axis=0), counts.sum(axis=1)])


def judge_of(dataset: Dataset, uri: str, **settings: Any) -> Judge:
    with fetch_model(uri, TrackingConfig()) as fetched:
        return Judge(load_files(fetched.files()), dataset, EvaluateConfig(**settings))


def measured_alone(judge: Judge) -> Measured:
    return together([judge(group) for group in range(judge.split.num_groups)])


def test_each_image_is_measured_as_a_loop_over_the_split_would(dataset: Dataset, model_uri: str) -> None:
    judge = judge_of(dataset, model_uri, overlays=2)
    found = measured_alone(judge)
    whole, edges, calibration = ConfusionMatrix(K), BoundaryCounts(K), Calibration()
    for number, (key, image, mask) in enumerate(dataset.split("val").share(0, 1)):
        labelled = segment_image(judge.model, image)
        labels, predicted = torch.from_numpy(mask), torch.from_numpy(labelled.labels)
        assert found.keys[number] == key
        assert found.counts[number].tolist() == counted(labelled.labels, mask, K)
        whole.update(labels, predicted)
        edges.update(labels, predicted)
        calibration.update(labels, predicted, torch.from_numpy(labelled.confidence))
    assert found.keys == ["val/a.jpg", "val/b.jpg", "val/c.jpg", "val/d.jpg"]
    assert np.array_equal(found.confusion[CLEAN], whole.counts)
    assert np.array_equal(found.boundary.sum(axis=0), edges.counts)
    assert np.array_equal(found.calibration, calibration.counts)
    assert np.allclose(found.confidence, calibration.confidence, rtol=1e-12)
    assert sorted(found.pictures) == [0, 2], "as many overlays as were asked for, spread over the images"
    assert decode_image(found.pictures[0]).shape == (24, 3 * 32, 3), "image, labels and prediction side by side"
    assert len(found.diagnostics) == 4


def test_measurements_survive_their_way_as_bytes_and_add_up_in_any_order(dataset: Dataset, model_uri: str) -> None:
    judge = judge_of(dataset, model_uri, overlays=2, corruptions="fast")
    parts = [judge(group) for group in range(judge.split.num_groups)]
    assert len(parts) > 1
    straight = together(parts)
    for order in (parts, parts[::-1]):
        again = together([Measured.from_bytes(part.to_bytes()) for part in order])
        assert again.keys == straight.keys
        assert again.pictures == straight.pictures
        assert json.dumps(again.diagnostics) == json.dumps(straight.diagnostics)  # NaN is not equal to itself
        for name in ("counts", "boundary", "calibration", "confidence"):
            assert np.array_equal(getattr(again, name), getattr(straight, name))
        assert again.confusion.keys() == straight.confusion.keys()
        assert all(np.array_equal(again.confusion[point], straight.confusion[point]) for point in again.confusion)


def test_there_is_one_confusion_matrix_for_each_corruption_and_severity(dataset: Dataset, model_uri: str) -> None:
    judge = judge_of(dataset, model_uri, corruptions="fast")
    found = measured_alone(judge)
    assert list(found.confusion) == [CLEAN, *FAST_GRID]
    for name, severity in FAST_GRID[::5]:
        expected = ConfusionMatrix(K)
        for key, image, mask in dataset.split("val").share(0, 1):
            spoilt = corrupt(image, name, severity, corruption_rng(key, name, severity))
            expected.update(torch.from_numpy(mask), torch.from_numpy(segment_image(judge.model, spoilt).labels))
        assert np.array_equal(found.confusion[name, severity], expected.counts)


@pytest.mark.parametrize(
    "setting", [{"pixel_budget": 10**6}, {"scales": (0.5, 1.5)}, {"flip": True}], ids=["whole", "scales", "flip"]
)
def test_images_are_judged_by_the_windows_scales_and_flips_that_the_recipe_says(
    dataset: Dataset, tmp_path: Path, setting: dict[str, Any]
) -> None:
    uri = saved_model(tmp_path / "model", [c["name"] for c in CLASSES], window=32)
    plain = measured_alone(judge_of(dataset, uri))
    judge = judge_of(dataset, uri, **setting)
    found = measured_alone(judge)
    assert found.counts.tolist() == [
        counted(segment_image(judge.model, image, **setting).labels, mask, K)
        for _, image, mask in dataset.split("val").share(0, 1)
    ]
    assert found.counts[2].tolist() != plain.counts[2].tolist(), "a setting that changes nothing would prove nothing"


# ---------------------------------------------------------------- the blind prior


def nearest(mask: np.ndarray, height: int, width: int) -> np.ndarray:
    out = np.zeros((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            out[y, x] = mask[int((y + 0.5) / height * mask.shape[0]), int((x + 0.5) / width * mask.shape[1])]
    return out


def brute_force_prior(dataset: Dataset, split: str, keep: slice = slice(None)) -> tuple[list[float], float]:
    """IoU of each class and the accuracy of the commonest class at each position."""
    masks = [mask for _, _, mask in dataset.split("train").share(0, 1)][keep]
    (height, width), _ = Counter(m.shape for m in masks).most_common(1)[0]
    same_size = [nearest(m, height, width) for m in masks]
    guess = np.zeros((height, width), np.uint8)
    for y in range(height):
        for x in range(width):
            votes = [sum(int(m[y, x]) == k for m in same_size) for k in range(K)]
            guess[y, x] = votes.index(max(votes))
    total = np.zeros((3, K), np.int64)
    for _, _, mask in dataset.split(split).share(0, 1):
        total += counted(nearest(guess, *mask.shape), mask, K)
    right, predicted, labelled = total
    return (right / (predicted + labelled - right)).tolist(), right.sum() / labelled.sum()


@pytest.mark.parametrize("split", ["val", "train"])
def test_the_prior_is_the_commonest_class_at_each_position(dataset: Dataset, split: str) -> None:
    found = prior_scores(dataset, split)
    iou, accuracy = brute_force_prior(dataset, split)
    assert found.iou.tolist() == pytest.approx(iou)
    assert found.miou == pytest.approx(np.mean(iou))
    assert found.aacc == pytest.approx(accuracy)


def test_of_many_masks_the_prior_takes_an_even_sample(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "PRIOR_MASKS", 3)
    iou, _ = brute_force_prior(dataset, "val", slice(None, None, 2))
    assert prior_scores(dataset, "val").iou.tolist() == pytest.approx(iou)
    assert iou != brute_force_prior(dataset, "val")[0], "a sample that changes nothing would prove nothing"


# ---------------------------------------------------------------- the stage


@pytest.fixture
def recipe(tmp_path: Path, dataset: Dataset) -> Recipe:
    return Recipe.model_validate(
        {
            "tracking": {"uri": f"sqlite:///{tmp_path}/mlflow.db"},
            "evaluate": {"dataset": dataset.folder.uri, "overlays": 0},
        }
    )


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process instead of Ray Data's actors."""

    def judge(config: EvaluateConfig, dataset: Dataset, model: Any) -> Judge:
        return Judge(load_files(model.files()), dataset, config)

    monkeypatch.setattr(stage, "measure", lambda *arguments: measured_alone(judge(*arguments)))
    monkeypatch.setattr(
        stage, "drawn", lambda *arguments: {k: judge(*arguments[:3]).picture(k, g) for k, g in arguments[3].items()}
    )


def test_an_evaluation_keeps_the_counts_of_every_image(
    dataset: Dataset, model_uri: str, recipe: Recipe, tmp_path: Path, alone: None
) -> None:
    config = recipe.evaluate.model_copy(update={"model": model_uri})
    receipt = evaluate(str(tmp_path / "work"), recipe, config)
    keys, counts = read_counts(receipt)
    assert keys == ["val/a.jpg", "val/b.jpg", "val/c.jpg", "val/d.jpg"]
    with fetch_model(model_uri, TrackingConfig()) as fetched:
        model = load_files(fetched.files())
    confusion = ConfusionMatrix(K)
    for i, (_, image, mask) in enumerate(dataset.split("val").share(0, 1)):
        predicted = segment_image(model, image).labels
        confusion.update(torch.from_numpy(mask), torch.from_numpy(predicted))
        assert [counts[name][i].tolist() for name in COUNTS] == counted(predicted, mask, K)
    scores = confusion.scores()
    assert receipt.results["miou"] == pytest.approx(scores.miou, abs=1e-6)
    assert list(receipt.results["iou"].values()) == pytest.approx(scores.iou.tolist(), abs=1e-6)
    assert list(receipt.results["iou"]) == dataset.class_names
    assert receipt.results["prior_miou"] == pytest.approx(prior_scores(dataset, "val").miou, abs=1e-6)
    assert receipt.results["images"] == 4


def test_the_same_model_and_images_at_other_places_are_not_judged_again(
    dataset: Dataset, model_uri: str, recipe: Recipe, tmp_path: Path, alone: None
) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in Path(model_uri).iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    other = saved_model(tmp_path / "other", [c["name"] for c in CLASSES], seed=1)
    found = [
        evaluate(str(tmp_path / "work"), recipe, recipe.evaluate.model_copy(update={"model": uri, "split": split}))
        for uri, split in ((model_uri, "val"), (str(copy), "val"), (model_uri, "train"), (other, "val"))
    ]
    assert [receipt.cached for receipt in found] == [False, True, False, False]


def test_an_evaluation_with_other_windows_scales_or_flips_is_another_one(
    model_uri: str, recipe: Recipe, tmp_path: Path, alone: None
) -> None:
    settings: list[dict[str, Any]] = [{}, {"pixel_budget": 409_600}, {"scales": (0.5, 1.0)}, {"flip": True}]
    receipts = [
        evaluate(str(tmp_path / "work"), recipe, recipe.evaluate.model_copy(update={"model": model_uri} | changed))
        for changed in settings
    ]
    assert len({receipt.fingerprint for receipt in receipts}) == 4
    said = [{name: receipt.results[name] for name in SEGMENTING} for receipt in receipts]
    assert said[0] == {"pixel_budget": None, "scales": [1.0], "flip": False}
    assert said[2] == said[0] | {"scales": [0.5, 1.0]}


@pytest.mark.parametrize("names", [["sky", "road"], ["road", "sky", "tree"], ["sky", "road", "shrub"]])
def test_a_model_with_other_classes_is_refused(
    dataset: Dataset, recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]
) -> None:
    monkeypatch.setattr(stage, "measure", lambda *_: pytest.fail("it was judged all the same"))
    config = recipe.evaluate.model_copy(update={"model": saved_model(tmp_path / "model", names)})
    with pytest.raises(UsageError) as caught:
        evaluate(str(tmp_path / "work"), recipe, config)
    assert f"the model knows the classes {names}" in str(caught.value)
    assert f"{dataset.folder.uri} has ['sky', 'road', 'tree']; they must be the same" in str(caught.value)


def test_a_split_that_is_not_there_is_refused(model_uri: str, recipe: Recipe, tmp_path: Path) -> None:
    config = recipe.evaluate.model_copy(update={"model": model_uri, "split": "test"})
    with pytest.raises(UsageError, match="has no split 'test'; it has train, val"):
        evaluate(str(tmp_path / "work"), recipe, config)
