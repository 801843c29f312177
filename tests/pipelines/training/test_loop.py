"""Training on a real cluster in its other ways: sharded, elastic, from a model that is there, watched by nobody."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipelines import cluster, tracking
from pipelines.config import Recipe, load_recipe
from pipelines.dataset import open_dataset
from pipelines.errors import RepsepError, StoppedError, UsageError
from pipelines.stage import Receipt
from pipelines.storage import Folder
from pipelines.train import train, trainer
from pipelines.training.worker import LoopSettings, segmentor_config
from repsep_model.checkpoint import load_segmentor, save_segmentor
from repsep_model.segmentor import build_segmentor
from repsep_model.training import validate


def changed(recipe: Recipe, prepared: Receipt, runtime: dict[str, object] | None = None, **section: object) -> Recipe:
    section["runtime"] = recipe.train.runtime.model_copy(update=runtime or {})
    section["dataset"] = prepared.results["dataset"]
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=section)})


def weights(receipt: Receipt) -> dict[str, torch.Tensor]:
    return load_file(f"{receipt.results['model']}/model.safetensors")


@pytest.mark.ray
def test_checkpoints_at_every_step_and_recomputed_activations_change_no_weight(
    trained: Receipt, recipe: Recipe, prepared: Receipt, tmp_path: Path
) -> None:
    """They are uploaded while training goes on, and it must not go on in what is being written."""
    busy = {"checkpoint_every": 1, "grad_checkpointing": True}
    receipt = train(str(tmp_path), changed(recipe, prepared, busy))
    assert receipt.results["miou"] == trained.results["miou"]
    ours, reference = weights(receipt), weights(trained)
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


@pytest.mark.ray
def test_sharded_training_has_the_losses_of_data_parallel_training_over_20_steps(
    recipe: Recipe, prepared: Receipt, ray_cluster: None, tmp_path: Path
) -> None:
    """FSDP2 sums gradients in another order: float tolerance, not bits. In fp32, or bf16's rounding would hide more."""
    client, losses = MlflowClient(tracking_uri=recipe.tracking.uri), {}
    for kind in ("ddp", "fsdp"):
        settings = {"parallel": kind, "steps": 20, "validate_every": 20, "bf16": False}
        receipt = train(str(tmp_path), changed(recipe, prepared, {"log_every": 1}, **settings))
        found = client.get_metric_history(receipt.results["mlflow_run"], "loss")
        losses[kind] = [m.value for m in sorted(found, key=lambda m: m.step)]
        assert load_segmentor(receipt.results["model"]).config.num_classes == 7
    assert len(losses["ddp"]) == 20
    assert losses["fsdp"] == pytest.approx(losses["ddp"], rel=1e-5)


@pytest.mark.ray
def test_training_starts_from_a_model_that_is_there(
    trained: Receipt, recipe: Recipe, prepared: Receipt, tmp_path: Path
) -> None:
    """With a rate at which nothing moves, what comes out is what went in."""
    settings = {"init_from": trained.results["model"], "lr": 1e-20, "steps": 1, "validate_every": 1}
    receipt = train(str(tmp_path), changed(recipe, prepared, {"workers": (1, 2)}, **settings))
    ours, reference = weights(receipt), weights(trained)
    assert all(torch.allclose(ours[name], reference[name], atol=1e-12) for name in reference)
    assert set(receipt.inputs) == {"dataset", "init"}
    assert receipt.results["miou"] == trained.results["miou"]


@pytest.mark.ray
def test_ctrl_c_and_sigterm_end_training_at_a_point_from_which_it_goes_on(
    trained: Receipt, recipe: Recipe, prepared: Receipt, tmp_path: Path
) -> None:
    after_first = threading.Thread(target=_terminate_after_the_first_checkpoint, args=(tmp_path,))
    after_first.start()
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(StoppedError, match="the same command again goes on"):
        train(str(tmp_path), changed(recipe, prepared, {"checkpoint_every": 1}))
    after_first.join()
    assert signal.getsignal(signal.SIGINT) is before
    (started,) = tmp_path.glob("train/*/_STARTED.json")
    run = MlflowClient(tracking_uri=recipe.tracking.uri).get_run(json.loads(started.read_text())["mlflow_run"])
    assert run.info.status == "KILLED"
    receipt = train(str(tmp_path), changed(recipe, prepared))
    ours, reference = weights(receipt), weights(trained)
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


def _terminate_after_the_first_checkpoint(workspace: Path) -> None:
    deadline = time.monotonic() + 240
    while not list(workspace.glob("train/*/ray/run/checkpoint_*/checkpoint.json")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.ray
def test_a_loss_that_is_not_finite_names_the_images_and_the_last_good_checkpoint(
    recipe: Recipe, prepared: Receipt, ray_cluster: None, tmp_path: Path
) -> None:
    broken = {"lr": 1e30, "warmup_steps": 0, "clip": 1e30, "steps": 6, "validate_every": 1}
    with pytest.raises(RepsepError, match=r"at step 1: .*images of that step: .*train/.*checkpoint_00000001_"):
        train(str(tmp_path), changed(recipe, prepared, **broken))
    (started,) = tmp_path.glob("train/*/_STARTED.json")
    run = MlflowClient(tracking_uri=recipe.tracking.uri).get_run(json.loads(started.read_text())["mlflow_run"])
    assert run.info.status == "FAILED"
    assert run.data.tags["repsep.not_finite.step"] == "1"
    assert len(run.data.tags["repsep.not_finite.keys"].split()) == recipe.train.batch_size
    assert "checkpoint_00000001_" in run.data.tags["repsep.not_finite.last_good_checkpoint"]


@pytest.mark.ray
def test_ray_is_shown_no_password(recipe: Recipe, ray_cluster: None) -> None:
    uri = "postgresql+psycopg2://someone:secret@db/mlflow"
    settings = LoopSettings(recipe.train.model_dump(mode="json"), "dataset", uri, "run")
    fitted = trainer(settings, storage="/nowhere", name="run")
    assert "secret" not in repr(fitted.train_run_context)
    assert fitted.train_loop_config["tracking_uri"] == tracking.shown(uri)


@pytest.mark.parametrize("inherited", [signal.default_int_handler, signal.SIG_IGN], ids=["usual", "in background"])
@pytest.mark.parametrize("interrupt", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_is_a_stop_and_its_handlers_are_put_back(interrupt: signal.Signals, inherited: Any) -> None:
    usual = signal.signal(signal.SIGINT, inherited)
    try:
        before = signal.getsignal(interrupt)
        with pytest.raises(StoppedError) as stopped, cluster.stoppable("training"):
            signal.raise_signal(interrupt)
        assert stopped.value.exit_code == 130
        assert signal.getsignal(interrupt) is before
    finally:
        signal.signal(signal.SIGINT, usual)


def test_validation_scores_are_the_same_to_the_last_digit_on_1_2_and_3_ranks(prepared: Receipt, recipe: Recipe) -> None:
    dataset = open_dataset(prepared.results["dataset"])
    torch.manual_seed(0)
    model = build_segmentor(segmentor_config(recipe.train.model, dataset.num_classes, recipe.train.augment.crop)).eval()
    split, found = dataset.split("val"), []
    for ranks in (1, 2, 3):
        confusions = [
            validate(model, ((image, mask) for _, image, mask in split.share(rank, ranks)), bf16=True)
            for rank in range(ranks)
        ]
        for other in confusions[1:]:
            confusions[0].counts += other.counts
        found.append(confusions[0].scores().miou)
    assert found[0] > 0
    assert found == [found[0]] * 3


@pytest.mark.parametrize("workers", ["[2, 1]", "0", "[0, 2]", "[1, 2, 3]"])
def test_a_range_of_workers_that_cannot_be_is_refused_by_name(workers: str) -> None:
    with pytest.raises(UsageError, match=r"train\.runtime"):
        load_recipe(None, [f"train.runtime.workers={workers}"])


def test_a_range_of_workers_does_not_change_what_is_computed() -> None:
    fixed, elastic = (load_recipe(None, [f"train.runtime.workers={w}"]).train for w in ("2", "[1, 4]"))
    assert (elastic.runtime.least_workers, elastic.runtime.most_workers) == (1, 4)
    assert fixed.model_dump(exclude={"runtime"}) == elastic.model_dump(exclude={"runtime"})


def test_init_from_a_folder_without_a_model_is_refused_before_a_cluster_is_asked_for(
    recipe: Recipe, prepared: Receipt, tmp_path: Path
) -> None:
    with pytest.raises(RepsepError, match="holds no segmentor"):
        train(str(tmp_path / "workspace"), changed(recipe, prepared, init_from=str(tmp_path)))
    assert not list(Folder(str(tmp_path)).subfolders())


def test_init_from_another_architecture_is_refused_with_the_settings_that_differ(
    recipe: Recipe, prepared: Receipt, tmp_path: Path
) -> None:
    dataset, model = open_dataset(prepared.results["dataset"]), recipe.train.model
    config = segmentor_config(model.model_copy(update={"width": 24}), dataset.num_classes, recipe.train.augment.crop)
    other = build_segmentor(config)
    save_segmentor(other, tmp_path / "other", classes=dataset.classes_file)
    with pytest.raises(UsageError, match=r"train\.init_from: .*width: 24 there, 16 here"):
        train(str(tmp_path / "workspace"), changed(recipe, prepared, init_from=str(tmp_path / "other")))
