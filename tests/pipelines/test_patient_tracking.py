"""An MLflow that is away, slow or stubborn never stops a training: what is due is written when it is back."""

from __future__ import annotations

import contextlib
import http.client
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from pipelines.config import TrackingConfig
from pipelines.errors import RepsepError
from pipelines.patient_tracking import FILES_KEPT, LONGEST_PAUSE_S, PatientLogger, patiently
from pipelines.tracking import RefusedError, RunLogger, metric_history, start_run
from tests.ports import free_ports
from tests.processes import kill_tree

RUN = "0" * 32


class Store:
    """In place of a RunLogger: written to by the thread, and away or stubborn as the test says."""

    run_id = RUN

    def __init__(self) -> None:
        self.away = threading.Event()
        self.refuses: set[str] = set()
        self.stuck: threading.Event | None = None
        self.attempts, self.back_at = 0, -1
        self.found: list[Any] = []
        self.files: dict[str, bytes] = {}

    def write(self, metrics: list[Any]) -> None:
        self.attempts += 1
        if self.attempts == self.back_at:
            self.away.clear()
        if self.stuck is not None:
            self.stuck.wait(60)
        if self.away.is_set():
            raise ConnectionError("no answer from http://user:hunter2@host")
        if self.refuses & {m.key for m in metrics}:
            raise RefusedError("there is no such run")
        self.found += metrics

    def content(self, data: bytes, name: str) -> None:
        if self.away.is_set():
            raise ConnectionError("no answer")
        self.files[name] = data


def wait_for(what: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


@pytest.fixture(autouse=True)
def patience_ends_with_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a PatientLogger would set for its whole process."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")


@pytest.fixture
def store() -> Store:
    return Store()


def patient(store: Any, **changes: Any) -> PatientLogger:
    return PatientLogger(store, **({"pause_s": 0.01} | changes))


def test_what_is_due_while_mlflow_is_away_is_written_in_order_when_it_is_back(
    store: Store, capsys: pytest.CaptureFixture[str]
) -> None:
    store.away.set()
    logger = patient(store)
    for step in range(20):
        logger.metrics({"loss": step}, step)
    logger.file(b"picture", "overlays/step-000001.png")
    wait_for(lambda: store.attempts >= 3)
    measured_before = time.time() * 1000
    store.away.clear()
    wait_for(lambda: len(store.found) == 20 and store.files)
    logger.close()
    assert [m.step for m in store.found] == list(range(20))
    assert all(m.timestamp <= measured_before for m in store.found), "their time is that of the measurement"
    assert store.files == {"overlays/step-000001.png": b"picture"}
    said = capsys.readouterr().err
    assert said.count("training goes on") == 1, "however many attempts failed"
    assert said.count("can be written to again") == 1
    assert "hunter2" not in said
    assert "not written" not in said


def test_the_last_attempt_is_made_when_it_is_closed(store: Store) -> None:
    store.away.set()
    logger = patient(store, pause_s=3600.0)
    logger.metrics({"loss": 1}, 1)
    wait_for(lambda: store.attempts == 1)
    store.away.clear()
    logger.close()
    assert [m.step for m in store.found] == [1]


def test_what_could_not_be_written_is_counted_at_the_end(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.away.set()
    logger = patient(store)
    logger.metrics({"loss": 1, "lr": 2}, 1)
    logger.file(b"picture", "a.png")
    logger.close(within_s=0.2)
    assert "3 metrics and pictures" in capsys.readouterr().err


def test_when_it_is_closed_it_goes_on_trying(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.away.set()
    logger = patient(store)
    logger.metrics({"loss": 1}, 1)
    wait_for(lambda: store.attempts >= 1)
    store.back_at = store.attempts + 20
    logger.close(within_s=60)
    assert [m.step for m in store.found] == [1]
    assert "not written" not in capsys.readouterr().err


def test_memory_is_bounded_and_the_newest_are_kept(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.away.set()
    logger = patient(store, metrics_kept=10, pause_s=3600.0)
    for step in range(25):
        logger.metrics({"loss": step}, step)
        logger.file(b"", f"{step}.png")
    wait_for(lambda: store.attempts >= 1)
    store.away.clear()
    logger.close()
    assert [m.step for m in store.found] == list(range(15, 25))
    assert len(store.files) == FILES_KEPT
    assert f"{15 + 25 - FILES_KEPT} metrics and pictures" in capsys.readouterr().err


def test_a_server_that_does_not_answer_holds_up_neither_a_step_nor_the_end(store: Store) -> None:
    store.stuck = threading.Event()
    logger = patient(store)
    began = time.monotonic()
    for step in range(1000):
        logger.metrics({"loss": step}, step)
    logger.close(within_s=0.2)
    assert time.monotonic() - began < 10
    store.stuck.set()


def test_what_mlflow_refuses_is_dropped_and_the_rest_goes_on(store: Store, capsys: pytest.CaptureFixture[str]) -> None:
    store.refuses = {"bad"}
    logger = patient(store)
    logger.metrics({"bad": 1}, 1)
    wait_for(lambda: logger.lost == 1)
    logger.metrics({"bad": 2}, 2)
    wait_for(lambda: logger.lost == 2)
    logger.metrics({"loss": 3}, 3)
    logger.close()
    assert [m.key for m in store.found] == ["loss"]
    said = capsys.readouterr().err
    assert said.count("there is no such run") == 1
    assert "2 metrics and pictures" in said


class Api(BaseHTTPRequestHandler):
    """The one call of MLflow's REST API that metrics need."""

    taken: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path.endswith("/runs/log-batch")
        self.taken += body["metrics"]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def api() -> Iterator[Callable[[int], HTTPServer]]:
    """Starts servers on a port; all are closed at the end."""
    Api.taken = []
    servers: list[tuple[HTTPServer, threading.Thread]] = []

    def start(port: int) -> HTTPServer:
        server = HTTPServer(("127.0.0.1", port), Api)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        servers.append((server, thread))
        return server

    yield start
    for server, thread in servers:
        server.shutdown()
        server.server_close()
        thread.join()


def test_a_server_restarted_in_the_middle_misses_nothing(
    api: Callable[[int], HTTPServer], capsys: pytest.CaptureFixture[str]
) -> None:
    """Through MLflow's own client: a server, none, and one again on the same port."""
    (port,) = free_ports(1)
    logger = patient(RunLogger(f"http://somebody:hunter2@127.0.0.1:{port}", RUN))
    first = api(port)
    logger.metrics({"loss": 1}, 1)
    wait_for(lambda: len(Api.taken) == 1)
    first.shutdown()
    first.server_close()
    logger.metrics({"loss": 2}, 2)
    said = ""

    def warned() -> bool:
        nonlocal said
        said += capsys.readouterr().err
        return "training goes on" in said

    wait_for(warned)
    logger.metrics({"loss": 3}, 3)
    api(port)
    wait_for(lambda: len(Api.taken) == 3)
    logger.close()
    assert [m["step"] for m in Api.taken] == [1, 2, 3]
    assert "hunter2" not in said + capsys.readouterr().err


@contextlib.contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """A real server over the sqlite file and the artifacts in `folder`; killed at the end."""
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder}/mlflow.db"]
    command += ["--artifacts-destination", str(folder / "files")]
    with (folder / "log").open("ab") as log:
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
    try:
        wait_for(lambda: server.poll() is not None or health(port), 120)
        assert server.poll() is None, (folder / "log").read_text()[-2000:]
        yield f"http://127.0.0.1:{port}"
    finally:
        kill_tree(server.pid)
        server.wait()


def health(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/health")
        return connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


@pytest.mark.slow
def test_a_real_server_killed_and_started_again_has_all_metrics_and_pictures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (port,) = free_ports(1)
    with mlflow_server(tmp_path, port) as uri:
        config = TrackingConfig(uri=uri, experiment="restart")
        run = start_run(config, "train")
        logger = patient(RunLogger(uri, run))
        logger.metrics({"loss": 1}, 1)
        wait_for(lambda: metric_history(config, run, "loss") == [(1, 1.0)])
    for step in range(2, 50):
        logger.metrics({"loss": step}, step)
        logger.file(b"picture %d" % step, f"overlays/step-{step:06d}.png")
        time.sleep(0.02)  # a step of training
    wait_for(lambda: "training goes on" in capsys.readouterr().err, 60)
    with mlflow_server(tmp_path, port) as uri:
        logger.close(within_s=60)
        assert metric_history(config, run, "loss") == [(step, float(step)) for step in range(1, 50)]
        client = MlflowClient(tracking_uri=uri)
        pictures = [a.path for a in client.list_artifacts(run, "overlays")]
        assert pictures == [f"overlays/step-{step:06d}.png" for step in range(50 - FILES_KEPT, 50)]


def test_what_needs_an_answer_waits_for_an_mlflow_that_comes_back(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")
    answers: list[Any] = [RepsepError("no answer")] * 7 + ["run"]
    waited: list[float] = []

    def call() -> str:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return str(answer)

    assert patiently(call, sleep=waited.append) == "run"
    assert waited == [1, 2, 4, 8, 16, LONGEST_PAUSE_S, LONGEST_PAUSE_S]
    assert capsys.readouterr().err.count("waiting") == 1


@pytest.mark.parametrize("error", [RefusedError("no such run"), RepsepError("no answer")])
def test_a_refusal_is_not_waited_out_and_an_outage_not_for_ever(
    error: RepsepError, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"):
        monkeypatch.setenv(name, "1")

    def call() -> str:
        raise error

    waited: list[float] = []
    within = 900.0 if isinstance(error, RefusedError) else 0.5
    with pytest.raises(type(error)):
        patiently(call, within_s=within, sleep=waited.append)
    assert not waited
