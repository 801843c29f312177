"""MLflow runs: parameters, metrics, inputs and artifacts, and the model registry.

A client with explicit URIs instead of MLflow's global state: several trials log from one process tree, and no import or
forgotten call may send a run elsewhere.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.metrics.base_metrics_monitor import BaseMetricsMonitor
from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
from mlflow.utils.credentials import get_default_host_creds
from mlflow.utils.rest_utils import http_request

from pipelines.config import TrackingConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.progress import say
from pipelines.storage import home, in_ray_job

PARAM_BATCH, METRIC_BATCH = 100, 1000
DESCRIPTION_LIMIT = 5000
NOT_THERE = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
"""How MLflow says that there is no such model, and no such alias. A server that is down is another matter."""
REFUSALS = (400, 404)
"""HTTP statuses of those errors that stay the same however often one asks: a wrong value, a run that is not there."""


RETRIES, TIMEOUT = "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT"
CONTACT_S, ATTEMPT_S, SILENT_S = 10.0, 5, 3.0
"""How long a server that does not answer is waited for, each attempt of that, and the time before a person is told."""
DIGEST_TAG = "repsep.model_digest"
"""Of a registered version: the digest of its files, by which damage is found."""
REPLACE = "Put them back, or make another version champion: `repsep models rollback`, `repsep models promote`"


class RefusedError(RepsepError):
    """MLflow answered and will not have it: trying again is of no use."""


def tracking_uri(config: TrackingConfig) -> str:
    """The recipe's URI, else $MLFLOW_TRACKING_URI, else a sqlite file in `home()`. A file store is refused."""
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home() / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not uri.startswith("sqlite:////"):
        base = home() if in_ray_job() else Path.cwd()
        uri = f"sqlite:///{base / uri.removeprefix('sqlite:///')}"
    if uri.startswith("sqlite:"):
        Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
    elif not uri.startswith(("http://", "https://", "postgresql", "mysql", "mssql", "databricks")):
        raise UsageError(
            f"tracking.uri {shown(uri)!r}: MLflow's file store is not supported; use sqlite:///... or a server"
        )
    return uri


def client_for(uri: str) -> MlflowClient:
    """An MLflow client; usage telemetry and download bars are switched off for this process.

    Raises RepsepError within 15 s where no server answers.
    """
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    if uri.startswith("http") and RETRIES not in os.environ:
        _wait_for_server(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def _wait_for_server(uri: str) -> None:
    """MLflow's own retries take minutes without a word; whoever has set them has chosen how long to wait."""
    began, said = time.monotonic(), False
    while True:
        try:
            with answering(uri):
                timeout = None if TIMEOUT in os.environ else ATTEMPT_S
                # Raises also for what a proxy answers whose server is away; whatever else is said, it is there.
                http_request(get_default_host_creds(uri), "/health", "GET", max_retries=0, timeout=timeout)
            return
        except RepsepError:
            waited = time.monotonic() - began
            if waited > CONTACT_S:
                raise
            if waited > SILENT_S and not said:
                say(f"waiting for MLflow at {shown(uri)}")
                said = True
        time.sleep(1)


def fail_soon() -> None:
    """Requests of this process fail within seconds instead of minutes: for who tries again anyway.

    One retry of MLflow's own would also be a warning of urllib3's each time.
    """
    os.environ.setdefault(RETRIES, "0")
    os.environ.setdefault(TIMEOUT, "10")


def start_run(
    config: TrackingConfig, name: str, *, tags: Mapping[str, str] | None = None, parent: str | None = None
) -> str:
    """A new run's id. Raises RepsepError where the tracking server does not answer."""
    uri = tracking_uri(config)
    with answering(uri):
        client = client_for(uri)
        experiment = _experiment(client, config.experiment, uri)
        extra = {"mlflow.parentRunId": parent} if parent else {}
        run = client.create_run(experiment, run_name=name, tags=dict(tags or {}) | extra)
    run_id: str = run.info.run_id
    return run_id


def run_exists(config: TrackingConfig, run_id: str) -> bool:
    """Whether this tracking store has the run: it may be another store than when the run was started.

    Raises RepsepError where MLflow does not answer: that says nothing of the run.
    """
    uri = tracking_uri(config)
    try:
        with answering(uri):
            client_for(uri).get_run(run_id)
    except RefusedError:
        return False
    return True


def shown(text: str) -> str:
    """A URI, or a message that holds some, for people: without what stands for users and passwords."""
    text = re.sub(r"://\S*@", "://", text)
    return re.sub(r"(?i)\b(\w*(?:password|passwd|token|secret))=[^&\s]*", r"\1=***", text)


@contextlib.contextmanager
def answering(uri: str) -> Iterator[None]:
    """What MLflow raises becomes a RepsepError. Its own text, and so the traceback, would hold the URI's password."""
    try:
        yield
    except MlflowException as error:
        kind = RefusedError if error.get_http_status_code() in REFUSALS else RepsepError
        raise kind(f"MLflow at {shown(uri)} cannot be used: {shown(str(error.message))}") from None


class RunLogger:
    """One run. Values that MLflow cannot hold (NaN) are left out, names get what it has instead of other characters.

    Connects at the first call. Raises RepsepError where MLflow does not answer or refuses.
    """

    def __init__(self, uri: str, run_id: str) -> None:
        self.uri, self.run_id = uri, run_id

    @cached_property
    def client(self) -> MlflowClient:
        return client_for(self.uri)

    def params(self, values: Mapping[str, Any]) -> None:
        """Nested settings as dotted names; those already there are left, for a resumed run has the same."""
        with answering(self.uri):
            known = self.client.get_run(self.run_id).data.params
            flat = [Param(k, str(v)[:6000]) for k, v in flatten(values) if k not in known]
            for start in range(0, len(flat), PARAM_BATCH):
                self.client.log_batch(self.run_id, params=flat[start : start + PARAM_BATCH])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        self.write(measured(values, step))

    def write(self, metrics: Sequence[Metric]) -> None:
        """Metrics that were `measured` before, maybe long ago. The same ones twice are there once."""
        with answering(self.uri):
            for start in range(0, len(metrics), METRIC_BATCH):
                self.client.log_batch(self.run_id, metrics=metrics[start : start + METRIC_BATCH])

    def tags(self, values: Mapping[str, str]) -> None:
        with answering(self.uri):
            self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in values.items()])

    def dataset(self, uri: str, name: str, digest: str) -> None:
        """The dataset as an input of the run, by digest."""
        source = MetaDataset(source=HTTPDatasetSource(uri), name=name, digest=digest[:36])  # type: ignore[abstract]
        given = DatasetInput(source._to_mlflow_entity(), [InputTag("mlflow.data.context", "training")])
        with answering(self.uri):
            self.client.log_inputs(self.run_id, [given])

    def artifact(self, file: Path, folder: str | None = None) -> None:
        with answering(self.uri):
            try:
                self.client.log_artifact(self.run_id, str(file), folder)
            except (MlflowException, RepsepError):
                raise
            except Exception as error:  # of the client of whatever store holds the artifacts
                raise RepsepError(f"MLflow's artifact {file.name} cannot be written: {shown(str(error))}") from None

    def content(self, data: bytes, name: str) -> None:
        """An artifact from memory; `name` may hold folders."""
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / Path(name).name
            path.write_bytes(data)
            self.artifact(path, str(Path(name).parent) if "/" in name else None)

    def text(self, content: str, name: str) -> None:
        self.content(content.encode(), name)

    def finish_if_running(self) -> None:
        """End a run of which `finish` could not tell MLflow."""
        with answering(self.uri):
            if self.client.get_run(self.run_id).info.status == "RUNNING":
                self.client.set_terminated(self.run_id)

    def finish(self, status: str = "FINISHED") -> None:
        """End the run. That MLflow is away is only said: what was computed is not lost for it."""
        try:
            with answering(self.uri):  # a client of now: hours after the first it is not known whether MLflow is there
                client_for(self.uri).set_terminated(self.run_id, status)
        except RepsepError as error:
            say(f"warning: the run {self.run_id} could not be marked {status}: {error}")


def measured(values: Mapping[str, float], step: int) -> list[Metric]:
    """Metrics as of now: when they are written does not matter."""
    now = int(time.time() * 1000)
    return [Metric(metric_name(name), float(v), now, step) for name, v in values.items() if v == v]


def metric_of(key: str, value: float, timestamp: int, step: int) -> Metric:
    """One that was `measured` before."""
    return Metric(key, value, timestamp, step)


def metric_name(name: str) -> str:
    """A name that MLflow takes: ADE20K's classes hold `;` and `,`, others may start with a slash or be `..`."""
    parts = [re.sub(r"[^\w\-. :]", "_", part, flags=re.ASCII) for part in name.split("/")]
    return "/".join("_" if part in ("", ".", "..") else part for part in parts)[:250]


class MachineMonitor:
    """This machine by MLflow's own monitors (CPU, memory, disk, network, GPUs where there are any), named as it does.

    Not by its SystemMetricsMonitor: that one gives up for good when the server is away once, and its warnings hold the
    tracking URI with the password.
    """

    def __init__(self) -> None:
        self.monitors: list[BaseMetricsMonitor] = []
        for kind in (CPUMonitor, DiskMonitor, NetworkMonitor, GPUMonitor):
            with contextlib.suppress(Exception):  # no GPU, no driver, no network: each has an error of its own
                self.monitors.append(kind())
        self.sample()  # the first CPU share would be since the beginning of time

    def sample(self) -> dict[str, float]:
        """As it is now; the CPU's share since the sample before, the network's traffic since the first."""
        found: dict[str, float] = {}
        for monitor in self.monitors:
            monitor.collect_metrics()
            found |= monitor.aggregate_metrics()
            monitor.clear_metrics()
        return {f"system/{name}": value for name, value in found.items()}


def metric_history(config: TrackingConfig, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) pairs in order of step; a step that was repeated after a resume has its latest value."""
    uri = tracking_uri(config)
    with answering(uri):
        return _history(client_for(uri), run_id, name)


def metric_histories(config: TrackingConfig, run_id: str, wanted: Sequence[str]) -> dict[str, list[tuple[int, float]]]:
    """The histories of those metrics that the run has; a name that ends with a slash stands for all below it."""
    uri = tracking_uri(config)
    with answering(uri):
        client = client_for(uri)
        known = sorted(client.get_run(run_id).data.metrics)
        names = [name for name in known if any(name == w or (w.endswith("/") and name.startswith(w)) for w in wanted)]
        return {name: _history(client, run_id, name) for name in names}


def _history(client: MlflowClient, run_id: str, name: str) -> list[tuple[int, float]]:
    found = client.get_metric_history(run_id, name)
    return sorted({m.step: m.value for m in sorted(found, key=lambda m: m.timestamp)}.items())


def describe_version(config: TrackingConfig, name: str, version: str, text: str) -> None:
    """Set what the registry shows of a model version. Databases take `DESCRIPTION_LIMIT` characters and no more."""
    assert len(text) <= DESCRIPTION_LIMIT
    uri = tracking_uri(config)
    with answering(uri):
        client_for(uri).update_model_version(name, version, description=text)


def aliased_version(config: TrackingConfig, name: str, alias: str) -> ModelVersion | None:
    """The version that the alias points to, None where there is no such alias or model."""
    uri = tracking_uri(config)
    try:
        return client_for(uri).get_model_version_by_alias(name, alias)
    except MlflowException as error:
        if error.error_code in NOT_THERE:
            return None
        raise RepsepError(f"MLflow at {shown(uri)} cannot be used: {shown(str(error.message))}") from None


def model_versions(config: TrackingConfig, name: str) -> list[ModelVersion]:
    """All versions of a registered model, newest first; none where there is no such model."""
    uri = tracking_uri(config)
    with answering(uri):
        found = client_for(uri).search_model_versions(f"name = '{name}'")
    return sorted(found, key=lambda version: int(version.version), reverse=True)


def point_alias(config: TrackingConfig, name: str, alias: str, version: str, *, instead_of: str | None = None) -> None:
    """Set an alias to a version, which loses the alias `instead_of` if it has that one."""
    uri = tracking_uri(config)
    with answering(uri):
        client = client_for(uri)
        client.set_registered_model_alias(name, alias, version)
        if instead_of is not None and str(client.get_registered_model(name).aliases.get(instead_of)) == version:
            client.delete_registered_model_alias(name, instead_of)


def read_artifact(config: TrackingConfig, run_id: str, path: str) -> bytes:
    """An artifact of a run. Raises RepsepError where it is not there or cannot be read."""
    uri = tracking_uri(config)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            return Path(client_for(uri).download_artifacts(run_id, path, temporary)).read_bytes()
        except Exception as error:  # of MLflow, or of the client of whatever store holds the artifacts
            raise RepsepError(f"{path} of the run {run_id} in MLflow cannot be read: {shown(str(error))}") from None


def child_run(config: TrackingConfig, parent: str, tag: str, value: str) -> str | None:
    """The child run of `parent` with this tag: a restored sweep continues it."""
    uri = tracking_uri(config)
    with answering(uri):
        client = client_for(uri)
        experiment = client.get_run(parent).info.experiment_id
        found = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}' and tags.`{tag}` = '{value}'")
    return found[0].info.run_id if found else None


def flatten(values: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """Dotted names and leaves of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _experiment(client: MlflowClient, name: str, uri: str) -> str:
    found = client.get_experiment_by_name(name)
    if found is not None:
        experiment: str = found.experiment_id
        return experiment
    # Without a server artifacts go beside the database; MLflow's default is the current folder.
    beside = (
        Path(uri.removeprefix("sqlite:///")).parent / "mlartifacts"
        if uri.startswith("sqlite:")
        else home() / "mlartifacts"
    )
    location = None if uri.startswith(("http", "databricks")) else (beside / name).as_uri()
    try:
        created: str = client.create_experiment(name, artifact_location=location)
    except MlflowException:  # another process was faster
        found = client.get_experiment_by_name(name)
        if found is None:
            raise
        return str(found.experiment_id)
    return created


def registered_version(
    config: TrackingConfig, name: str, *, alias: str | None = None, version: str | None = None
) -> ModelVersion:
    """A version from the registry by alias or number. Raises RepsepError saying what there is instead."""
    uri = tracking_uri(config)
    client = client_for(uri)
    try:
        if alias is not None:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, str(version))
    except MlflowException as error:
        wanted = f"models:/{name}@{alias}" if alias else f"models:/{name}/{version}"
        try:
            there = [m.name for m in client.search_registered_models(max_results=20)]
        except MlflowException as broken:
            raise RepsepError(f"MLflow at {shown(uri)} cannot be used: {shown(str(broken.message))}") from None
        known = f"registered are: {', '.join(there)}" if there else "nothing is registered there yet"
        raise RepsepError(
            f"{wanted} is not in the registry at {shown(uri)}; {known}. Run `repsep register`, or give another --model"
        ) from error


def download_registered(
    config: TrackingConfig, name: str, *, alias: str | None, version: str | None, to: Path
) -> tuple[str, str | None]:
    """Download a registered model's segmentor files into `to`; returns `name/version` and the digest it should have.

    Raises RepsepError where the version's files are gone or cannot be read.
    """
    found = registered_version(config, name, alias=alias, version=version)
    uri = tracking_uri(config)
    client = client_for(uri)
    source = client.get_model_version_download_uri(name, found.version)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            local = Path(
                download_artifacts(artifact_uri=f"{source}/artifacts/segmentor", dst_path=temporary, tracking_uri=uri)
            )
        except Exception as error:  # of MLflow, or of the client of whatever store holds the artifacts
            raise RepsepError(
                f"models:/{name}/{found.version} is registered at {shown(uri)}, but its files cannot be read: "
                f"{shown(str(error))}. {REPLACE}"
            ) from None
        for file in local.iterdir():
            (to / file.name).write_bytes(file.read_bytes())
    return f"{name}/{found.version}", found.tags.get(DIGEST_TAG)
