"""What MLflow missed while it was away is there after the stage was called again."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipelines import tracking, unsent
from pipelines.config import Section, TrackingConfig
from pipelines.patient_tracking import PatientLogger
from pipelines.stage import Receipt, planning, run_stage
from tests.ports import free_ports

AWAY = TrackingConfig(uri=f"http://somebody:hunter2@127.0.0.1:{free_ports(1)[0]}")


class Nothing(Section):
    """A stage without settings."""


@pytest.fixture(autouse=True)
def requests_fail_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(tracking.RETRIES, "0")
    monkeypatch.setenv(tracking.TIMEOUT, "10")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db")


@pytest.fixture
def run(store: TrackingConfig) -> str:
    return tracking.start_run(store, "train")


@pytest.fixture
def receipt(tmp_path: Path) -> Receipt:
    work = str(tmp_path / "work")
    return run_stage("train", workspace=work, config=Nothing(), inputs={}, packages=("jobs",), body=lambda _: None)


def kept(receipt: Receipt) -> list[str]:
    return [entry.key for entry in receipt.folder.list() if entry.key.startswith("_UNSENT")]


def test_curves_and_pictures_of_a_training_that_ended_without_mlflow_are_sent_later(
    store: TrackingConfig, run: str, receipt: Receipt, capsys: pytest.CaptureFixture[str]
) -> None:
    for attempt in (1, 2):  # a training that was resumed
        logger = PatientLogger(tracking.RunLogger(str(AWAY.uri), run), receipt.folder, pause_s=0.01)
        logger.metrics({"loss": attempt / 2, "val/miou": 0.25}, attempt)
        logger.file(b"picture %d" % attempt, f"overlays/step-{attempt}.png")
        logger.close(within_s=0.5)
    assert f"3 are kept in {receipt.uri}" in capsys.readouterr().err
    with planning():
        unsent.send(store, receipt)
    assert kept(receipt) == [f"_UNSENT-{run}.jsonl"]
    unsent.send(store, receipt)
    assert kept(receipt) == []
    client = tracking.client_for(tracking.tracking_uri(store))
    assert tracking.metric_history(store, run, "loss") == [(1, 0.5), (2, 1.0)]
    assert tracking.metric_history(store, run, "val/miou") == [(1, 0.25), (2, 0.25)]
    assert tracking.read_artifact(store, run, "overlays/step-2.png") == b"picture 2"
    assert [file.path for file in client.list_artifacts(run, "overlays")] == [f"overlays/step-{n}.png" for n in (1, 2)]
    assert client.get_run(run).info.status == "FINISHED", "it could not be marked so when it ended"


def test_what_was_measured_keeps_its_time(store: TrackingConfig, run: str, receipt: Receipt) -> None:
    (metric,) = tracking.measured({"loss": 1.0}, 3)
    unsent.keep(receipt.folder, run, metrics=[metric])
    unsent.send(store, receipt)
    (found,) = tracking.client_for(tracking.tracking_uri(store)).get_metric_history(run, "loss")
    assert (found.step, found.value, found.timestamp) == (3, 1.0, metric.timestamp)


@pytest.mark.parametrize(
    ("config", "said"),
    [(AWAY, "is still not in MLflow"), (None, "if it is of no use, delete it")],
    ids=["away", "other"],
)
def test_what_mlflow_does_not_take_stays(
    config: TrackingConfig | None,
    said: str,
    store: TrackingConfig,
    receipt: Receipt,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It is away, or it is another store, which has no such run."""
    unsent.keep(receipt.folder, "0" * 32, metrics=tracking.measured({"loss": 1.0}, 3))
    unsent.send(config or store, receipt)
    assert kept(receipt) == [f"_UNSENT-{'0' * 32}.jsonl"]
    told = capsys.readouterr().err
    assert said in told
    assert "hunter2" not in told
