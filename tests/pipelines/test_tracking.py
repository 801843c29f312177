"""MLflow's edges: what it takes, what it says, and what never appears in a message."""

from __future__ import annotations

import json
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlflow.utils.validation import _validate_metric_name

from pipelines import tracking
from pipelines.config import TrackingConfig
from pipelines.errors import RepsepError
from tests.ports import free_ports


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TrackingConfig:
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db", experiment="tests")


@pytest.fixture
def nobody(monkeypatch: pytest.MonkeyPatch) -> TrackingConfig:
    """A server that is away, with a password in its URI."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    return TrackingConfig(uri=f"http://somebody:hunter2@127.0.0.1:{free_ports(1)[0]}", experiment="tests")


@pytest.mark.parametrize(
    ("text", "seen"),
    [
        ("postgresql://user:hunter2@host/db", "postgresql://host/db"),
        ("postgresql://user:hunter2/@x@host:5432/db", "postgresql://host:5432/db"),
        ("https://host/path?password=hunter2&x=1", "https://host/path?password=***&x=1"),
        ("request to http://u:hunter2@host/api failed, ask http://v:hunter2@other", None),
        ("sqlite:////home/a/mlflow.db", "sqlite:////home/a/mlflow.db"),
    ],
)
def test_no_password_is_shown(text: str, seen: str | None) -> None:
    assert "hunter2" not in tracking.shown(text)
    assert seen is None or tracking.shown(text) == seen


@pytest.mark.parametrize(
    "call",
    [
        lambda config: tracking.start_run(config, "train"),
        lambda config: tracking.run_exists(config, "0" * 32),
        lambda config: tracking.RunLogger(config.uri, "0" * 32).params({"a": 1}),
        lambda config: tracking.RunLogger(config.uri, "0" * 32).metrics({"a": 1}),
    ],
)
def test_a_server_that_is_away_is_an_error_whose_traceback_holds_no_password(
    call: Callable[[TrackingConfig], object], nobody: TrackingConfig
) -> None:
    with pytest.raises(RepsepError, match="cannot be used") as caught:
        call(nobody)
    assert not isinstance(caught.value, tracking.RefusedError)
    assert "hunter2" not in "".join(traceback.format_exception(caught.value))


class Registry(BaseHTTPRequestHandler):
    """Has no run; before it is up a proxy answers for it."""

    up: threading.Event

    def do_GET(self) -> None:
        self.send_response(404 if self.up.is_set() else 503)
        self.end_headers()
        self.wfile.write(json.dumps({"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such run"}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[HTTPServer]:
    Registry.up = threading.Event()
    with HTTPServer(("127.0.0.1", 0), Registry) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def unset(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Nobody has said how long MLflow is to be waited for."""
    for name in (tracking.RETRIES, tracking.TIMEOUT):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(tracking, "SILENT_S", 0.0)
    return monkeypatch


def test_a_server_that_never_answers_is_reported_within_seconds_and_waiting_for_it_is_said(
    nobody: TrackingConfig, unset: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tracking.CONTACT_S + tracking.ATTEMPT_S <= 15
    unset.setattr(tracking, "CONTACT_S", 1.5)
    began = time.monotonic()
    with pytest.raises(RepsepError, match=r"MLflow at http://127.* cannot be used: API request to"):
        tracking.start_run(nobody, "train")
    assert time.monotonic() - began < 60, "MLflow's own retries take four minutes"
    said = capsys.readouterr().err
    assert said.count("waiting for MLflow at http://127.0.0.1") == 1
    assert "hunter2" not in said


def test_a_server_that_comes_up_meanwhile_is_used(server: HTTPServer, unset: pytest.MonkeyPatch) -> None:
    unset.setattr(tracking, "say", lambda message: Registry.up.set())
    assert not tracking.run_exists(TrackingConfig(uri=f"http://127.0.0.1:{server.server_port}"), "0" * 32)
    assert Registry.up.is_set()


def test_a_proxy_whose_server_is_away_is_no_server(server: HTTPServer, unset: pytest.MonkeyPatch) -> None:
    unset.setattr(tracking, "CONTACT_S", 0.0)
    with pytest.raises(RepsepError, match=r"cannot be used: .*503"):
        tracking.run_exists(TrackingConfig(uri=f"http://127.0.0.1:{server.server_port}"), "0" * 32)


def test_whoever_has_set_mlflows_retries_has_chosen_how_long_to_wait(
    nobody: TrackingConfig, unset: pytest.MonkeyPatch
) -> None:
    unset.setenv(tracking.RETRIES, "1")
    unset.setattr(tracking, "say", lambda message: pytest.fail("it was waited for otherwise"))
    with pytest.raises(RepsepError, match="cannot be used") as caught:
        tracking.start_run(nobody, "train")
    assert "/health" not in str(caught.value)


def test_to_end_a_run_on_a_server_that_is_away_is_only_a_warning(
    nobody: TrackingConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    tracking.RunLogger(str(nobody.uri), "0" * 32).finish()
    said = capsys.readouterr().err
    assert "could not be marked FINISHED" in said
    assert "hunter2" not in said


def test_a_run_that_is_not_there_is_refused_not_unavailable(store: TrackingConfig) -> None:
    run = tracking.start_run(store, "train")
    assert tracking.run_exists(store, run)
    assert not tracking.run_exists(store, "0" * 32)
    with pytest.raises(tracking.RefusedError):
        tracking.RunLogger(tracking.tracking_uri(store), "0" * 32).metrics({"a": 1})


def test_a_step_that_was_repeated_after_a_resume_has_its_latest_value(
    store: TrackingConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the order in which a store lists them."""
    values = [(5, 40, 9.0), (5, 20, 1.0), (4, 10, 2.0)]  # step, timestamp, value
    listed = [SimpleNamespace(step=step, timestamp=at, value=value) for step, at, value in values]
    client = SimpleNamespace(get_metric_history=lambda run, name: listed)
    monkeypatch.setattr(tracking, "client_for", lambda uri: client)
    assert tracking.metric_history(store, "run", "loss") == [(4, 2.0), (5, 9.0)]


def test_metrics_written_twice_are_there_once_and_keep_the_time_they_were_measured(store: TrackingConfig) -> None:
    run = tracking.start_run(store, "train")
    logger = tracking.RunLogger(tracking.tracking_uri(store), run)
    metrics = tracking.measured({"loss": 1.0, "undefined": float("nan")}, 3)
    logger.write(metrics)
    logger.write(metrics)
    (found,) = logger.client.get_metric_history(run, "loss")
    assert (found.step, found.value, found.timestamp) == (3, 1.0, metrics[0].timestamp)
    assert "undefined" not in logger.client.get_run(run).data.metrics


@given(st.text(min_size=1, max_size=300))
def test_mlflow_takes_every_class_name(name: str) -> None:
    _validate_metric_name(tracking.metric_name(f"val_iou/{name}"))


def test_ordinary_names_stay_as_they_are() -> None:
    names = ["loss/ce", "val_iou/traffic light", "lr", "system/gpu_0_memory_usage_percentage"]
    assert [tracking.metric_name(name) for name in names] == names


def test_the_machine_is_measured_without_a_gpu_too() -> None:
    sample = tracking.MachineMonitor().sample()
    assert {"system/cpu_utilization_percentage", "system/disk_usage_percentage"} <= sample.keys()
    assert all(isinstance(value, int | float) for value in sample.values())
