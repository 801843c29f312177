"""MLflow runs: parameters, metrics, inputs and artifacts. With register.py the only module that knows MLflow.

A client with explicit URIs instead of MLflow's global state: several trials log from one process tree, and no import or
forgotten call may send a run elsewhere.
"""

from __future__ import annotations

import os
import re
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.artifacts import download_artifacts
from mlflow.data.http_dataset_source import HTTPDatasetSource
from mlflow.data.meta_dataset import MetaDataset
from mlflow.entities import DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.entities.model_registry import ModelVersion
from mlflow.exceptions import MlflowException

from pipelines.config import TrackingConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.storage import home, in_ray_job

PARAM_BATCH = 100


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
    """An MLflow client; usage telemetry and download bars are switched off for this process."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def start_run(
    config: TrackingConfig, name: str, *, tags: Mapping[str, str] | None = None, parent: str | None = None
) -> str:
    """A new run's id. Raises RepsepError where the tracking server does not answer."""
    uri = tracking_uri(config)
    client = client_for(uri)
    try:
        experiment = _experiment(client, config.experiment, uri)
        extra = {"mlflow.parentRunId": parent} if parent else {}
        run = client.create_run(experiment, run_name=name, tags=dict(tags or {}) | extra)
    except MlflowException as error:
        raise RepsepError(f"MLflow at {shown(uri)} cannot be used: {error.message}") from error
    run_id: str = run.info.run_id
    return run_id


def run_exists(config: TrackingConfig, run_id: str) -> bool:
    """Whether this tracking store has the run: it may be another store than when the run was started."""
    try:
        client_for(tracking_uri(config)).get_run(run_id)
    except MlflowException:
        return False
    return True


def shown(uri: str) -> str:
    """A URI for people: without the user and password of a database."""
    return re.sub(r"//[^/@]*@", "//", uri)


class RunLogger:
    """One run. Values that MLflow cannot hold (NaN) are left out."""

    def __init__(self, uri: str, run_id: str) -> None:
        self.client, self.run_id = client_for(uri), run_id

    def params(self, values: Mapping[str, Any]) -> None:
        """Nested settings as dotted names; those already there are left, for a resumed run has the same."""
        known = self.client.get_run(self.run_id).data.params
        flat = [Param(k, str(v)[:6000]) for k, v in flatten(values) if k not in known]
        for start in range(0, len(flat), PARAM_BATCH):
            self.client.log_batch(self.run_id, params=flat[start : start + PARAM_BATCH])

    def metrics(self, values: Mapping[str, float], step: int = 0) -> None:
        now = int(time.time() * 1000)
        found = [Metric(name, float(v), now, step) for name, v in values.items() if v == v]
        self.client.log_batch(self.run_id, metrics=found)

    def tags(self, values: Mapping[str, str]) -> None:
        self.client.log_batch(self.run_id, tags=[RunTag(k, v) for k, v in values.items()])

    def dataset(self, uri: str, name: str, digest: str) -> None:
        """The dataset as an input of the run, by digest."""
        source = MetaDataset(source=HTTPDatasetSource(uri), name=name, digest=digest[:36])  # type: ignore[abstract]
        entity = source._to_mlflow_entity()
        self.client.log_inputs(self.run_id, [DatasetInput(entity, [InputTag("mlflow.data.context", "training")])])

    def artifact(self, file: Path, folder: str | None = None) -> None:
        self.client.log_artifact(self.run_id, str(file), folder)

    def text(self, content: str, name: str) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / Path(name).name
            path.write_text(content)
            self.artifact(path, str(Path(name).parent) if "/" in name else None)

    def finish(self, status: str = "FINISHED") -> None:
        self.client.set_terminated(self.run_id, status)


def metric_history(config: TrackingConfig, run_id: str, name: str) -> list[tuple[int, float]]:
    """(step, value) pairs in order of step; of values logged twice for a step the last."""
    found = client_for(tracking_uri(config)).get_metric_history(run_id, name)
    return sorted({m.step: m.value for m in found}.items())


def child_run(config: TrackingConfig, parent: str, tag: str, value: str) -> str | None:
    """The child run of `parent` with this tag: a restored sweep continues it."""
    client = client_for(tracking_uri(config))
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
            raise RepsepError(f"MLflow at {shown(uri)} cannot be used: {broken.message}") from broken
        known = f"registered are: {', '.join(there)}" if there else "nothing is registered there yet"
        raise RepsepError(
            f"{wanted} is not in the registry at {shown(uri)}; {known}. Run `repsep register`, or give another --model"
        ) from error


def download_registered(config: TrackingConfig, name: str, *, alias: str | None, version: str | None, to: Path) -> str:
    """Download a registered model's segmentor files into `to`; returns `name/version`."""
    found = registered_version(config, name, alias=alias, version=version)
    uri = tracking_uri(config)
    client = client_for(uri)
    source = client.get_model_version_download_uri(name, found.version)
    with tempfile.TemporaryDirectory() as temporary:
        local = Path(
            download_artifacts(artifact_uri=f"{source}/artifacts/segmentor", dst_path=temporary, tracking_uri=uri)
        )
        for file in local.iterdir():
            (to / file.name).write_bytes(file.read_bytes())
    return f"{name}/{found.version}"
