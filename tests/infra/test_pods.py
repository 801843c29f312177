"""What runs may do no more than it has to, says what it needs, and holds no secret in plain text."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from tests.infra.manifests import INFRA, Pod, documents, of_kind, plain_secrets, pods, ray_clusters

PODS = pods()
YAML = sorted(file for file in INFRA.rglob("*.y*ml"))


def test_all_pods_are_looked_at() -> None:
    """Two services; 3 + 1 jobs with a submitter, a head and their workers; 6 submitters of Argo's; the cluster."""
    assert len(PODS) == 2 + (2 * 3 + 2 * 4) + 6 + 3


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.name)
def test_a_pod_is_not_root_and_cannot_become_it(pod: Pod) -> None:
    security = pod.spec["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["runAsUser"] > 0
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in pod.containers:
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod.spec)
    assert not any("hostPath" in volume for volume in pod.spec.get("volumes", []))


def test_what_kuberay_adds_to_a_head_is_held_to_the_same() -> None:
    for cluster in ray_clusters().values():
        sidecar = cluster["autoscalerOptions"]
        assert sidecar["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert set(sidecar["resources"]["limits"]) == {"cpu", "memory"}


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.name)
def test_a_container_asks_for_what_it_needs_and_has_limits(pod: Pod) -> None:
    for container in pod.containers:
        requests, limits = container["resources"]["requests"], container["resources"]["limits"]
        assert {"cpu", "memory"} <= set(requests)
        assert {"cpu", "memory"} <= set(limits)
        assert requests["memory"] == limits["memory"], "memory that is not kept is what pods are killed for"
        for extended in set(limits) - {"cpu", "memory"}:
            assert requests[extended] == limits[extended], "Kubernetes asks for the same of both"


@pytest.mark.parametrize("pod", PODS, ids=lambda pod: pod.name)
def test_a_pod_gets_no_variables_of_services_and_only_a_head_talks_to_kubernetes(pod: Pod) -> None:
    """A Service `mlflow` would set MLFLOW_PORT=tcp://..., which MLflow takes for its port."""
    assert pod.spec["enableServiceLinks"] is False
    assert pod.is_head or pod.spec["automountServiceAccountToken"] is False


def test_a_service_that_stays_is_watched_by_three_probes() -> None:
    for name, doc in of_kind("Deployment", "StatefulSet").items():
        for container in doc["spec"]["template"]["spec"]["containers"]:
            assert {"startupProbe", "readinessProbe", "livenessProbe"} <= set(container), name


@pytest.mark.parametrize("file", YAML, ids=lambda file: str(file.relative_to(INFRA)))
def test_no_file_holds_a_secret(file: Path) -> None:
    assert not [name for _, doc in documents(file) for name in plain_secrets(doc)]


@pytest.mark.parametrize(
    "text",
    [
        "env: [{name: PGPASSWORD, value: hunter2}]",
        "environment: {AWS_SECRET_ACCESS_KEY: abc}",
        "environment: {POSTGRES_PASSWORD: '${POSTGRES_PASSWORD:-postgres}'}",
        "stringData: {auth_token: abc}",
        "stringData: {password: 1234}",
    ],
)
def test_a_secret_in_plain_text_is_found(text: str) -> None:
    assert len(plain_secrets(yaml.safe_load(text))) == 1


def test_the_example_of_secrets_names_them_without_values() -> None:
    for doc in of_kind("Secret").values():
        assert set(doc["stringData"].values()) == {""}
    assert set(of_kind("Secret")) == {"repsep-s3", "repsep-postgres", "repsep-ray"}


def test_texts_name_no_registry_and_no_index_of_packages() -> None:
    """Images of ours are a placeholder; whose registry holds them is yours to say."""
    hosts = re.compile(r"(?i)\b(ghcr|quay|gcr|docker|ecr|pypi|pythonhosted|pytorch)\.(io|com|org|amazonaws\.com)\b")
    for file in (*INFRA.rglob("*"), INFRA.parent / ".dockerignore"):
        if file.is_file():
            assert not hosts.search(file.read_text()), file
