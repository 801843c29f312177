"""What a training shows of itself: rates by a clock of ours, curves and pictures in MLflow, honest validation."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from mlflow import MlflowClient
from PIL import Image
from ray.experimental.tqdm_ray import RAY_TQDM_MAGIC

from pipelines.config import Recipe, TrackingConfig, TrainConfig
from pipelines.dataset import open_dataset
from pipelines.pictures import Sample, encoded, stacked, triptych
from pipelines.stage import Receipt
from pipelines.tracking import RunLogger, metric_history, start_run, tracking_uri
from pipelines.training.telemetry import SAMPLES, Clock, Telemetry, learning_rates
from repsep_model.config import SegmentorConfig
from repsep_model.images import overlay
from repsep_model.metrics import Scores, scores_from_counts
from repsep_model.optim import parameter_groups
from repsep_model.segmentor import Segmentor, build_segmentor
from repsep_model.training import validate
from tests.pipelines.conftest import TINY_MODEL

CLASSES: list[dict[str, Any]] = [
    {"id": 0, "name": "sky", "color": [0, 0, 255]},
    {"id": 1, "name": "door;double door, left/right", "color": [255, 0, 0]},
    {"id": 2, "name": "never seen", "color": [0, 255, 0]},
]
METRICS = {"loss": 1.5, "loss/ce": 1.0, "grad_norm": 0.7, "lr": 1e-3}


class Watch:
    """A clock that stands until it is told."""

    def __init__(self) -> None:
        self.seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


@pytest.fixture(scope="module")
def tracking(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db", experiment="telemetry")


def config(log_every: int = 2) -> TrainConfig:
    return TrainConfig.model_validate({"batch_size": 8, "runtime": {"log_every": log_every}})


def telemetry(tracking: TrackingConfig, run: str, **changes: Any) -> Telemetry:
    logger = RunLogger(tracking_uri(tracking), run)
    arguments: dict[str, Any] = {"rank": 0, "world_size": 1, "classes": CLASSES, "done": 0, "total": 100}
    return Telemetry(logger, config(), **(arguments | changes))


def some_scores() -> Scores:
    return scores_from_counts(np.array([30, 10, 0]), np.array([40, 20, 0]), np.array([40, 20, 0]))


def test_rates_leave_out_what_is_paused_and_count_what_is_waited_for() -> None:
    watch = Watch()
    clock = Clock(8, watch)
    for wait, work in ((3.0, 1.0), (1.0, 3.0)):
        with clock.waiting():
            watch.seconds += wait
        watch.seconds += work
        clock.step()
    with clock.paused():
        watch.seconds += 1000.0
    assert clock.rates() == {"images_per_s": 2 * 8 / 8.0, "data_wait_share": 4 / 8.0}


def test_a_lap_shows_only_what_came_since_the_lap_before() -> None:
    watch = Watch()
    clock = Clock(8, watch)
    for seconds, wait in ((1.0, 0.0), (4.0, 2.0)):
        with clock.waiting():
            watch.seconds += wait
        watch.seconds += seconds - wait
        clock.step()
        with clock.paused():
            watch.seconds += 7.0
        assert clock.lap() == {"images_per_s": 8 / seconds, "data_wait_share": wait / seconds}
    assert clock.rates() == {"images_per_s": 16 / 5.0, "data_wait_share": 2 / 5.0}


def test_rates_are_finite_before_the_first_step() -> None:
    assert Clock(8, Watch()).rates() == {"images_per_s": 0.0, "data_wait_share": 0.0}


def test_every_few_steps_the_curves_and_the_machine_are_logged(tracking: TrackingConfig) -> None:
    run = start_run(tracking, "train")
    view = telemetry(tracking, run)
    for step in range(1, 6):
        view.step(METRICS | {"loss": float(step)}, step)
    view.close()
    assert metric_history(tracking, run, "loss") == [(2, 2.0), (4, 4.0)]
    found = MlflowClient(tracking_uri=tracking.uri).get_run(run).data.metrics
    expected = {"loss/ce", "grad_norm", "lr", "images_per_s", "data_wait_share", "memory_gib"}
    expected |= {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"}
    assert expected <= found.keys()
    assert 0.01 < found["memory_gib"] < 1000


def test_validation_logs_each_class_that_has_a_score_whatever_its_name(tracking: TrackingConfig) -> None:
    run = start_run(tracking, "train")
    view = telemetry(tracking, run)
    view.validated(some_scores(), 400, [])
    view.close()
    found = MlflowClient(tracking_uri=tracking.uri).get_run(run).data.metrics
    assert found["val/miou"] == pytest.approx((30 / 50 + 10 / 30) / 2)
    assert found["val/classes_scored"] == 2
    per_class = {name: value for name, value in found.items() if name.startswith("val_iou/")}
    assert per_class == {
        "val_iou/sky": pytest.approx(30 / 50),
        "val_iou/door_double door_ left/right": pytest.approx(10 / 30),
    }


def test_validation_leaves_a_picture_of_image_labels_and_prediction(tracking: TrackingConfig, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    samples: list[Sample] = [
        (
            rng.integers(0, 256, (height, width, 3), np.uint8),
            rng.integers(0, 2, (height, width), np.uint8),
            rng.integers(0, 2, (height, width), np.uint8),
        )
        for height, width in ((40, 60), (50, 30))
    ]
    run = start_run(tracking, "train")
    view = telemetry(tracking, run)
    view.validated(some_scores(), 400, samples)
    view.close()
    client = MlflowClient(tracking_uri=tracking.uri)
    path = client.download_artifacts(run, "overlays/step-000400.png", str(tmp_path))
    found = np.asarray(Image.open(path))
    assert found.shape == (40 + 4 + 50, 3 * 60, 3)
    colours = [c["color"] for c in CLASSES]
    image, *ids = samples[0]
    assert np.array_equal(found[:40], np.hstack([image, *(overlay(image, hw, colours) for hw in ids)]))
    assert np.array_equal(found[44:, 60:90], overlay(samples[1][0], samples[1][2], colours))


def test_a_large_sample_is_drawn_small_with_its_labels_in_place() -> None:
    """The left half is class 0 on black, the right half class 1 on white: so it stays."""
    image = np.zeros((300, 800, 3), np.uint8)
    image[:, 400:] = 255
    mask = (image[..., 0] > 0).astype(np.uint8)
    picture = triptych((image, mask, 1 - mask), [[200, 0, 0], [0, 0, 200]], side=200)
    assert picture.shape == (75, 600, 3)
    assert tuple(picture[40, 200 + 90]) == tuple(overlay(image[:1, :1], mask[:1, :1], [[200, 0, 0]])[0, 0])
    assert picture[40, 200 + 110, 2] > 200 > picture[40, 400 + 110, 2], "label and prediction differ there"


def test_pictures_of_other_ranks_and_without_mlflow_are_not_kept(tracking: TrackingConfig) -> None:
    run = start_run(tracking, "train")
    second = telemetry(tracking, run, rank=1, world_size=2)
    second.step(METRICS, 2)
    second.validated(some_scores(), 2, [])
    second.close()
    without = Telemetry(None, config(), rank=0, world_size=1, classes=CLASSES, done=0, total=4)
    without.step(METRICS, 2)
    without.validated(some_scores(), 2, [])
    without.close()
    assert (second.keep, without.keep) == (0, 0)
    assert MlflowClient(tracking_uri=tracking.uri).get_run(run).data.metrics == {}


def test_the_drivers_bar_counts_what_is_left_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    """A part that was done before would count as done in no time: the time that is left would be wrong."""
    view = Telemetry(None, config(), rank=0, world_size=1, classes=CLASSES, done=98, total=100, driver_bar=True)
    view.step(METRICS, 99)
    view.step(METRICS, 100)
    view.close()
    out, err = capsys.readouterr()
    states = [json.loads(line) for line in out.splitlines()]
    assert all(state["__magic_token__"] == RAY_TQDM_MAGIC for state in states)
    last = states[-1]
    assert (last["x"], last["total"], last["closed"]) == (2, 2, True)
    assert last["desc"] == "train: from step 98 (loss 1.500)"
    assert err == ""


def test_the_rates_of_the_backbone_are_those_of_its_first_and_last_layers() -> None:
    model = tiny(3)
    groups = parameter_groups(model, lr=1e-3, weight_decay=0.05, layer_decay=0.5, head_lr_scale=10.0)
    optimizer = torch.optim.AdamW(groups)
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * 0.1
    by_parameter = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    backbone = model.backbone.model
    assert learning_rates(optimizer) == {
        "lr/backbone_first": by_parameter[id(backbone.patch_embed.proj.weight)],
        "lr/backbone_last": max(by_parameter[id(p)] for p in backbone.parameters()),
    }
    assert learning_rates(optimizer)["lr/backbone_first"] < learning_rates(optimizer)["lr/backbone_last"] < 1e-3


def test_validation_is_the_same_to_the_last_digit_whatever_the_number_of_shares(
    prepared: Receipt, recipe: Recipe
) -> None:
    dataset = open_dataset(prepared.results["dataset"])
    split = dataset.split("val")
    model = tiny(dataset.num_classes).eval()
    keys = [key for key, _, _ in split.share(0, 1)]
    found = []
    for shares in (1, 2, 3):
        seen: list[str] = []
        counts = torch.zeros(dataset.num_classes, dataset.num_classes, dtype=torch.int64)
        for rank in range(shares):
            images = [(key, image, mask) for key, image, mask in split.share(rank, shares)]
            seen += [key for key, _, _ in images]
            confusion = validate(model, [(image, mask) for _, image, mask in images], bf16=True)
            assert confusion.counts.dtype == torch.int64
            counts += confusion.counts
        confusion.counts = counts
        assert sorted(seen) == sorted(keys), "each image is in one share, and once"
        found.append((counts, confusion.scores().miou))
    (one, miou), *others = found
    assert int(one.sum()) == sum(int((mask != 255).sum()) for mask in split.masks(10**9))
    assert all(torch.equal(counts, one) and other == miou for counts, other in others)


def test_validation_keeps_the_first_predictions_of_a_share(prepared: Receipt) -> None:
    dataset = open_dataset(prepared.results["dataset"])
    images = [(image, mask) for _, image, mask in dataset.split("val").share(1, 2)]
    kept: list[Sample] = []
    validate(tiny(dataset.num_classes), images, bf16=False, keep=SAMPLES, kept=kept)
    assert len(kept) == min(SAMPLES, len(images))
    assert all(np.array_equal(image, given[0]) for (image, _, _), given in zip(kept, images, strict=False))
    picture = encoded(stacked([triptych(sample, dataset.colours) for sample in kept]), "PNG")
    assert Image.open(io.BytesIO(picture)).width == 3 * images[0][0].shape[1]


def tiny(num_classes: int) -> Segmentor:
    torch.manual_seed(0)
    return build_segmentor(SegmentorConfig(num_classes=num_classes, **TINY_MODEL))
