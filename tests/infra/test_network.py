"""The network policies let through what the manifests need, and nothing beside it."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.infra.manifests import KUBERAY, Doc, mappings, of_kind, pods, ray_clusters

POLICIES = list(of_kind("NetworkPolicy").values())
RAY, MLFLOW, POSTGRES, SUBMITTER, WORKFLOW = (
    {"app.kubernetes.io/part-of": "repsep", "app.kubernetes.io/component": name}
    for name in ("ray", "mlflow", "postgres", "submitter", "workflow")
)
STRANGER: dict[str, str] = {}
NAMESPACES = {name: {"namespace": name} for name in ("kuberay-system", "monitoring", "kube-system", "default")}
WORLD, CLOUD_METADATA = {"ip": "52.1.2.3"}, {"ip": "169.254.169.254"}

Side = dict[str, str]
"""The labels of a pod of ours, or {"namespace": name} for any pod of another namespace, or {"ip": address}."""


def selects(selector: Doc, labels: Side) -> bool:
    """Whether a label selector takes these labels."""
    matched = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for rule in selector.get("matchExpressions", []):
        assert rule["operator"] == "In"
        matched &= labels.get(rule["key"]) in rule["values"]
    return matched


def meets(peer: Doc, side: Side) -> bool:
    """Whether a rule's peer is that side."""
    if "ip" in side:
        block = peer.get("ipBlock")
        return block is not None and block["cidr"] == "0.0.0.0/0" and f"{side['ip']}/32" not in block.get("except", [])
    if "namespaceSelector" in peer:
        return selects(peer["namespaceSelector"], {"kubernetes.io/metadata.name": side.get("namespace", "repsep")})
    return "podSelector" in peer and "namespace" not in side and selects(peer["podSelector"], side)


def one_way(direction: str, pod: Side, other: Side, port: int, protocol: str) -> bool:
    """Whether the policies of a pod of ours let through what comes from, or goes to, the other side."""
    mine = [p["spec"] for p in POLICIES if direction in p["spec"]["policyTypes"]]
    mine = [spec for spec in mine if selects(spec["podSelector"], pod)]
    assert mine, "otherwise all would be let through"
    key, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
    return any(
        any(meets(peer, other) for peer in rule[peers])
        and ("ports" not in rule or {"protocol": protocol, "port": port} in rule["ports"])
        for spec in mine
        for rule in spec.get(key, [])
    )


def passes(source: Side, target: Side, port: int, protocol: str = "TCP") -> bool:
    """Whether a connection gets from one side to the other."""
    ours = [not {"namespace", "ip"} & set(side) for side in (source, target)]
    out = not ours[0] or one_way("Egress", source, target, port, protocol)
    return out and (not ours[1] or one_way("Ingress", target, source, port, protocol))


NEEDED = {
    "Ray's pods speak to each other on any port": [(RAY, RAY, port) for port in (6379, 8265, 10001, 34567)],
    "Ray's pods reach MLflow": [(RAY, MLFLOW, 5000)],
    "MLflow reaches its database": [(MLFLOW, POSTGRES, 5432)],
    "submitters reach the dashboard": [(SUBMITTER, RAY, 8265)],
    "KubeRay's operator asks how a job is": [(NAMESPACES["kuberay-system"], RAY, 8265)],
    "Prometheus scrapes": [(NAMESPACES["monitoring"], RAY, 8080)],
    "object storage and Kubernetes": [(side, WORLD, port) for side in (RAY, MLFLOW, WORKFLOW) for port in (443, 6443)],
}
REFUSED = {
    "no one but MLflow reaches the database": [(side, POSTGRES, 5432) for side in (RAY, SUBMITTER, STRANGER)],
    "strangers reach nothing": [(STRANGER, RAY, 8265), (STRANGER, MLFLOW, 5000), (STRANGER, WORLD, 443)],
    "other namespaces reach nothing else": [
        (NAMESPACES["default"], RAY, 8265),
        (NAMESPACES["default"], MLFLOW, 5000),
        (NAMESPACES["monitoring"], RAY, 8265),
        (NAMESPACES["kuberay-system"], RAY, 6379),
    ],
    "nothing reaches what serves nobody": [
        (NAMESPACES["default"], side, 80) for side in (SUBMITTER, WORKFLOW, STRANGER)
    ],
    "a submitter reaches the dashboard alone": [(SUBMITTER, RAY, 6379), (SUBMITTER, MLFLOW, 5000)],
    "no pod takes its machine's rights": [(side, CLOUD_METADATA, port) for side in (RAY, MLFLOW) for port in (80, 443)],
    "a database has nothing to say to the world": [(POSTGRES, WORLD, 443)],
}


@pytest.mark.parametrize("connections", NEEDED.values(), ids=NEEDED)
def test_what_is_needed_gets_through(connections: list[tuple[Side, Side, int]]) -> None:
    assert all(passes(*connection) for connection in connections)


@pytest.mark.parametrize("connections", REFUSED.values(), ids=REFUSED)
def test_what_is_not_needed_does_not(connections: list[tuple[Side, Side, int]]) -> None:
    assert not any(passes(*connection) for connection in connections)


def test_everybody_can_look_up_names() -> None:
    for side in (RAY, MLFLOW, SUBMITTER, WORKFLOW):
        assert all(passes(side, NAMESPACES["kube-system"], 53, protocol) for protocol in ("UDP", "TCP"))


def test_the_labels_that_policies_go_by_are_those_of_the_pods() -> None:
    named = {pod.labels["app.kubernetes.io/component"] for pod in pods()}
    named.add(of_kind("WorkflowTemplate")["repsep"]["spec"]["podMetadata"]["labels"]["app.kubernetes.io/component"])
    used: set[Any] = set()
    for mapping in mappings(POLICIES):
        used |= {value for key, value in mapping.items() if key == "app.kubernetes.io/component"}
        used |= set(mapping["values"]) if mapping.get("operator") == "In" else set()
    assert used == named
    for name, cluster in ray_clusters().items():
        templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
        assert all(template["metadata"]["labels"] == RAY for template in templates), name


def test_every_port_that_a_pod_declares_can_be_reached_by_somebody() -> None:
    everybody = [RAY, MLFLOW, SUBMITTER, *NAMESPACES.values()]
    declared = {
        (tuple(pod.labels.items()), port["containerPort"])
        for pod in pods()
        for container in pod.containers
        for port in container.get("ports", [])
    }
    assert {port for _, port in declared} == {5000, 5432, 6379, 8080, 8265, 10001}
    for labels, port in declared:
        assert any(passes(side, dict(labels), port) for side in everybody), port


def test_the_rule_that_a_comment_offers_leads_to_a_store_in_the_cluster_and_to_nothing_else(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    text = (KUBERAY / "networkpolicy.yaml").read_text()
    offered = re.search(r"^    # - to:\n(    #  .*\n)+", text, re.MULTILINE)
    assert offered is not None
    rule = offered[0].replace("    # ", "    ")
    assert not any(passes(side, {"namespace": "store"}, 9000) for side in (RAY, MLFLOW))
    monkeypatch.setattr("tests.infra.test_network.POLICIES", list(yaml.safe_load_all(text.replace(offered[0], rule))))
    assert all(passes(side, {"namespace": "store"}, 9000) for side in (RAY, MLFLOW))
    assert not any(passes(side, {"namespace": "store"}, 9000) for side in (POSTGRES, SUBMITTER, STRANGER))
    assert not passes(RAY, {"namespace": "store"}, 22)
    assert not passes(RAY, NAMESPACES["default"], 9000)


def test_a_policy_that_lacks_a_port_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    text = yaml.safe_dump_all(POLICIES).replace("port: 5432", "port: 5433")
    monkeypatch.setattr("tests.infra.test_network.POLICIES", list(yaml.safe_load_all(text)))
    assert not passes(MLFLOW, POSTGRES, 5432)
