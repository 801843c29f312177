"""Distributed training on a real cluster: what the stage leaves, and that a lost worker changes nothing."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from mlflow import MlflowClient
from safetensors.torch import load_file

from pipelines import cluster
from pipelines.config import Recipe, SweepConfig, TrackingConfig
from pipelines.dataset import open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.prepare import prepare
from pipelines.stage import Receipt
from pipelines.storage import Folder
from pipelines.sweep import sweep
from pipelines.train import train
from repsep_model.checkpoint import load_segmentor
from tests.ports import free_ports
from tests.processes import descendants

pytestmark = pytest.mark.ray


def changed(recipe: Recipe, **train_section: object) -> Recipe:
    return recipe.model_copy(update={"train": recipe.train.model_copy(update=train_section)})


def test_training_ends_with_all_steps_and_a_model_that_loads(trained: Receipt, recipe: Recipe) -> None:
    assert trained.results["steps"] == recipe.train.steps
    assert 0 <= trained.results["miou"] <= 1
    model = load_segmentor(trained.results["model"])
    assert model.config.num_classes == 7
    assert set(trained.outputs) == {"model/model.safetensors", "model/segmentor.json", "model/classes.json"}


def test_a_finished_training_is_cached(trained: Receipt, recipe: Recipe, workspace: str) -> None:
    again = train(workspace, recipe)
    assert again.cached
    assert again == trained


def test_the_run_in_mlflow_has_parameters_curves_and_the_dataset(
    trained: Receipt, recipe: Recipe, prepared: Receipt
) -> None:
    client = MlflowClient(tracking_uri=recipe.tracking.uri)
    run = client.get_run(trained.results["mlflow_run"])
    assert run.info.status == "FINISHED"
    assert run.data.params["train.batch_size"] == "4"
    assert [m.step for m in client.get_metric_history(run.info.run_id, "val/miou")] == [4, 8, 12]
    assert {"loss", "loss/ce", "loss/region", "grad_norm", "lr", "images_per_s", "data_wait_share"} <= set(
        run.data.metrics
    )
    (given,) = run.inputs.dataset_inputs
    assert given.dataset.digest == open_dataset(prepared.results["dataset"]).digest[:36]


def test_a_killed_worker_changes_neither_the_number_of_steps_nor_a_weight(
    trained: Receipt, recipe: Recipe, prepared: Receipt, tmp_path: Path
) -> None:
    """The undisturbed run is the reference: on the CPU the weights are the same to the bit."""
    longer = changed(recipe, dataset=prepared.results["dataset"])
    killed: list[int] = []
    finished = threading.Event()

    def kill_one_after_the_first_checkpoint() -> None:
        while not finished.is_set() and not list(tmp_path.glob("train/*/ray/run/checkpoint_*")):
            time.sleep(0.05)
        workers = [pid for pid, command in descendants(os.getpid()).items() if "RayTrainWorker" in command]
        if workers:
            os.kill(workers[0], signal.SIGKILL)
            killed.append(workers[0])

    watcher = threading.Thread(target=kill_one_after_the_first_checkpoint)
    watcher.start()
    try:
        receipt = train(str(tmp_path), longer)
    finally:
        finished.set()
        watcher.join()
    assert killed, "no worker was found to kill"
    assert receipt.results["steps"] == recipe.train.steps
    assert receipt.results["miou"] == trained.results["miou"]
    ours = load_file(f"{receipt.results['model']}/model.safetensors")
    reference = load_file(f"{trained.results['model']}/model.safetensors")
    assert all(torch.equal(ours[name], reference[name]) for name in reference)


def test_a_loss_that_is_not_finite_stops_training_with_the_step(
    recipe: Recipe, prepared: Receipt, ray_cluster: None, tmp_path: Path
) -> None:
    broken = changed(recipe, dataset=prepared.results["dataset"], lr=1e30, warmup_steps=0, clip=1e30, steps=6)
    with pytest.raises(RepsepError, match=r"at step \d+: lower the learning rate"):
        train(str(tmp_path), broken)


def test_training_reads_and_writes_object_storage_from_the_aws_variables_alone(
    s3: str, scenes: Path, recipe: Recipe, ray_cluster: None
) -> None:
    """Shards by s3fs, checkpoints by Ray through pyarrow, the model by s3fs again."""
    workspace = f"s3://{s3}/workspace"
    prepare(workspace, recipe.prepare)
    runtime = recipe.train.runtime.model_copy(update={"workers": 1})
    receipt = train(workspace, changed(recipe, steps=4, validate_every=2, runtime=runtime))
    assert receipt.results["steps"] == 4
    assert receipt.results["model"].startswith(workspace)
    assert {e.key for e in Folder(receipt.results["model"]).list()} == {
        "model.safetensors",
        "segmentor.json",
        "classes.json",
    }


def test_an_unknown_backbone_is_refused_before_a_cluster_is_asked_for(
    recipe: Recipe, prepared: Receipt, tmp_path: Path
) -> None:
    model = recipe.train.model.model_copy(update={"backbone": "vit_teeny_patch16_224"})
    with pytest.raises(UsageError, match="vit_teeny_patch16_224"):
        train(str(tmp_path), changed(recipe, model=model, dataset=prepared.results["dataset"]))


@pytest.mark.parametrize("stage", [train, sweep])
def test_where_mlflow_is_away_nothing_is_begun(
    stage: Callable[[str, Recipe], Receipt],
    recipe: Recipe,
    prepared: Receipt,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(cluster, "connect", lambda **_: pytest.fail("a cluster was asked for"))
    away = TrackingConfig(uri=f"http://127.0.0.1:{free_ports(1)[0]}")
    dataset = prepared.results["dataset"]
    asked = changed(recipe, dataset=dataset).model_copy(
        update={"tracking": away, "sweep": SweepConfig.model_validate({"dataset": dataset})}
    )
    with pytest.raises(RepsepError, match=r"MLflow at http://127.0.0.1:\d+ cannot be used"):
        stage(str(tmp_path), asked)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()], "neither a start nor a lease is left"


def test_training_without_a_dataset_says_what_to_run_first(recipe: Recipe, tmp_path: Path) -> None:
    with pytest.raises(RepsepError, match="repsep prepare"):
        train(str(tmp_path), recipe)
