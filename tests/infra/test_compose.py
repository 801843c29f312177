"""The local stack starts in order, listens on this machine alone, and needs its secrets from outside."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from mlflow.server.security_utils import is_allowed_host_header

from tests.infra.manifests import IMAGE, INFRA, of_kind, plain_secrets, texts

FILE = INFRA / "compose.yaml"
COMPOSE: dict[str, Any] = yaml.safe_load(FILE.read_text())
SERVICES: dict[str, Any] = COMPOSE["services"]
SECRETS = {"POSTGRES_PASSWORD", "S3_ACCESS_KEY", "S3_SECRET_KEY", "RAY_AUTH_TOKEN"}
ONCE = {name for name, service in SERVICES.items() if service["restart"] == "no"}
# Of the Compose specification, the keys of a service that are used here.
SERVICE_KEYS = {
    *("image", "build", "command", "user", "environment", "volumes", "ports", "healthcheck", "depends_on"),
    *("restart", "init", "cap_drop", "security_opt", "mem_limit", "cpus", "shm_size"),
}
HEALTH_KEYS = {"test", "interval", "timeout", "retries", "start_period"}


def test_a_misspelt_key_is_found() -> None:
    assert set(COMPOSE) == {"name", "x-guarded", "services", "volumes"}
    for name, service in SERVICES.items():
        assert set(service) <= SERVICE_KEYS, name
        assert set(service.get("healthcheck", {})) <= HEALTH_KEYS, name
    assert set(SERVICES["buckets"]["build"]) == {"context", "dockerfile", "args"}


def test_the_parts_are_a_database_a_store_mlflow_and_a_ray_head() -> None:
    assert set(SERVICES) == {"postgres", "s3", "buckets", "mlflow", "ray"}
    assert SERVICES["ray"]["command"][:3] == ["ray", "start", "--head"]
    assert {"--serve-artifacts", "--artifacts-destination=s3://mlflow"} <= set(SERVICES["mlflow"]["command"])


def test_secrets_come_from_outside_and_have_no_default() -> None:
    variables = re.findall(r"\$\{(\w+)([^}]*)\}", "\n".join(texts(COMPOSE)))
    assert {name for name, _ in variables} == SECRETS | {"TORCH_INDEX"}
    assert all(rest.startswith(":?") and len(rest) > 4 for name, rest in variables if name in SECRETS)
    assert not plain_secrets(COMPOSE)
    head = FILE.read_text().partition("\nname:")[0]
    assert all(f"#   {name}=" in head for name in SECRETS), "the head of the file says what to set"
    assert ".env" in (INFRA / ".gitignore").read_text().splitlines()


def test_ray_asks_for_a_token() -> None:
    environment = SERVICES["ray"]["environment"]
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["RAY_AUTH_TOKEN"].startswith("${RAY_AUTH_TOKEN:?")


def test_ports_are_bound_to_this_machine() -> None:
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert sorted(ports) == [f"127.0.0.1:{port}:{port}" for port in (5000, 8080, 8265, 8333)]


def test_a_service_starts_when_those_that_it_needs_are_ready() -> None:
    assert {"buckets"} == ONCE
    for name, service in SERVICES.items():
        assert name in ONCE or "healthcheck" in service, name
        for needed, how in service.get("depends_on", {}).items():
            condition = "service_completed_successfully" if needed in ONCE else "service_healthy"
            assert how == {"condition": condition}, (name, needed)


def test_every_address_inside_is_a_service_at_a_port_that_it_listens_on_and_that_is_waited_for() -> None:
    listens = {"postgres": 5432, "s3": 8333, "mlflow": 5000}
    waits = {name: set(service.get("depends_on", {})) for name, service in SERVICES.items()}
    for _ in SERVICES:
        waits = {name: needed.union(*(waits[n] for n in needed)) for name, needed in waits.items()}
    for name, service in SERVICES.items():
        for text in service["environment"].values():
            if "://" in text:
                url = urlsplit(text)
                assert listens[str(url.hostname)] == url.port, text
                assert url.hostname in waits[name], f"{name} does not wait for {url.hostname}"


def test_volumes_are_named_and_declared() -> None:
    used = {volume.partition(":")[0] for service in SERVICES.values() for volume in service.get("volumes", [])}
    assert used == set(COMPOSE["volumes"]) == {"postgres", "s3", "home"}


def test_images_are_pinned_and_ours_is_the_one_of_the_cluster() -> None:
    images = {name: service["image"] for name, service in SERVICES.items()}
    assert {images[name] for name in ("buckets", "mlflow", "ray")} == {IMAGE}
    database = of_kind("StatefulSet")["postgres"]["spec"]["template"]["spec"]["containers"][0]
    assert images["postgres"] == database["image"]
    assert re.fullmatch(r"[\w/]+:\d+\.\d+", images["s3"])
    build = SERVICES["buckets"]["build"]
    assert (INFRA / build["context"] / build["dockerfile"]).is_file()
    assert f"ARG {next(iter(build['args']))}=" in (INFRA / "docker" / "Dockerfile").read_text()


def test_nobody_is_root_or_may_become_it_and_everybody_has_limits() -> None:
    """Our image names its user itself (test_docker.py)."""
    for name, service in SERVICES.items():
        assert service["image"] == IMAGE or int(service["user"].partition(":")[0]) > 0, name
        assert service["cap_drop"] == ["ALL"], name
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["mem_limit"], name
        assert service["cpus"] >= 1, name


def mlflow_arguments() -> dict[str, list[str]]:
    container = of_kind("Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"][0]
    return {"compose": SERVICES["mlflow"]["command"], "kubernetes": container["args"]}


@pytest.mark.parametrize("where", ["compose", "kubernetes"])
def test_mlflow_answers_those_who_ask_by_its_names_and_nobody_else(where: str) -> None:
    """By MLflow's own rule: a name that is missing here is refused with 403 in the middle of a training."""
    option = next(word for word in mlflow_arguments()[where] if word.startswith("--allowed-hosts="))
    hosts = option.partition("=")[2].split(",")
    tracking = {
        "compose": SERVICES["ray"]["environment"]["MLFLOW_TRACKING_URI"],
        "kubernetes": of_kind("ConfigMap")["repsep-environment"]["data"]["MLFLOW_TRACKING_URI"],
    }[where]
    for asked in (urlsplit(tracking).netloc, "localhost:5000", "127.0.0.1:5000"):
        assert is_allowed_host_header(hosts, asked), asked
    assert not is_allowed_host_header(hosts, "mlflow.example.org")
    assert not any("*" in host for host in hosts)


def test_the_store_is_one_that_takes_the_keys_that_its_users_have() -> None:
    ours = SERVICES["s3"]["environment"]
    for name in ("buckets", "mlflow", "ray"):
        theirs = SERVICES[name]["environment"]
        assert {key: theirs[key] for key in ours} == ours, name
