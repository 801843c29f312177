"""Every manifest is one that its operator takes: by its schema, by the operator's further rules, by our own pins."""

from __future__ import annotations

import copy
import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from pipelines.config import load_recipe
from tests.infra.manifests import (
    IMAGE,
    INFRA,
    KUBERAY,
    ROOT,
    Doc,
    argo_jobs,
    documents,
    of_kind,
    pods,
    ray_clusters,
    ray_jobs,
)
from tests.infra.schemas import validate

ALL = [*documents(), *documents(INFRA / "monitoring" / "podmonitor.yaml")]
ALL += [("argo-workflow.yaml", doc | {"metadata": {"name": f"argo-{name}"}}) for name, doc in argo_jobs().items()]
EXPECTED = {
    "ConfigMap": 2,
    "Deployment": 1,
    "Kustomization": 1,
    "Namespace": 1,
    "NetworkPolicy": 7,
    "PodMonitor": 1,
    "RayCluster": 1,
    "RayCronJob": 1,
    "RayJob": 3 + 6,  # 6 that Argo creates
    "Role": 1,
    "RoleBinding": 1,
    "Secret": 3,
    "Service": 2,
    "ServiceAccount": 1,
    "StatefulSet": 1,
    "WorkflowTemplate": 1,
}


def identified(named: Any) -> str | None:
    if isinstance(named, dict) and "kind" in named:
        return f"{named['kind']}-{named.get('metadata', {}).get('name', '')}"
    return None


def test_every_document_is_among_those_that_are_validated() -> None:
    assert Counter(doc["kind"] for _, doc in ALL) == EXPECTED
    assert {file for file, _ in ALL} == {file.name for file in KUBERAY.iterdir()} | {"podmonitor.yaml"}


@pytest.mark.parametrize("doc", [doc for _, doc in ALL], ids=identified)
def test_a_manifest_is_what_its_schema_says_to_the_last_key(doc: Doc) -> None:
    validate(doc)


# A key of each kind of schema, and one deep inside a pod, misspelt.
MISSPELT = [
    ("Deployment", "mlflow", ("spec", "template", "spec", "containers", 0), "readinessProbe", "readynessProbe"),
    ("StatefulSet", "postgres", ("spec",), "volumeClaimTemplates", "volumeClaimTemplate"),
    ("NetworkPolicy", "ray", ("spec", "ingress", 1), "ports", "port"),
    ("RayCluster", "repsep", ("spec", "autoscalerOptions"), "idleTimeoutSeconds", "idleTimeoutSecond"),
    ("RayJob", "repsep-train", ("spec",), "backoffLimit", "backOffLimit"),
    (
        "RayJob",
        "repsep-segment",
        ("spec", "rayClusterSpec", "workerGroupSpecs", 1, "template", "spec"),
        "terminationGracePeriodSeconds",
        "terminationGraceSeconds",
    ),
    ("RayCronJob", "repsep-nightly-segment", ("spec",), "timeZone", "timezone"),
    ("WorkflowTemplate", "repsep", ("spec", "templates", 1), "retryStrategy", "retry"),
]


@pytest.mark.parametrize(("kind", "name", "path", "key", "wrong"), MISSPELT, ids=[f"{m[0]}-{m[4]}" for m in MISSPELT])
def test_a_misspelt_key_is_found(kind: str, name: str, path: tuple[str | int, ...], key: str, wrong: str) -> None:
    doc = copy.deepcopy(of_kind(kind)[name])
    place: Any = doc
    for part in path:
        place = place[part]
    place[wrong] = place.pop(key)
    with pytest.raises(jsonschema.ValidationError, match=wrong if kind != "WorkflowTemplate" else "not valid under"):
        validate(doc)


def test_a_wrong_value_deep_inside_a_worker_is_found() -> None:
    doc = copy.deepcopy(of_kind("RayCluster")["repsep"])
    resources = doc["spec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]
    resources["limits"]["memory"] = "16 gigabytes"
    with pytest.raises(jsonschema.ValidationError, match="16 gigabytes"):
        validate(doc)


def test_the_kustomization_holds_what_stays_and_no_job_or_secret() -> None:
    named = yaml.safe_load((KUBERAY / "kustomization.yaml").read_text())["resources"]
    kinds = {doc["kind"] for name in named for _, doc in documents(KUBERAY / name)}
    assert kinds >= {"Namespace", "ConfigMap", "NetworkPolicy", "StatefulSet", "Deployment", "RayCluster"}
    assert not kinds & {"RayJob", "RayCronJob", "Secret", "WorkflowTemplate"}


# ------------------------------------------------------------------------------- what KubeRay's operator asks besides


@pytest.mark.parametrize("name", ray_clusters())
def test_a_cluster_keeps_the_operators_rules_for_tokens_and_the_second_autoscaler(name: str) -> None:
    cluster = ray_clusters()[name]
    assert cluster["authOptions"] == {"mode": "token", "secretName": "repsep-ray"}
    assert f"ray=={cluster['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()
    assert cluster["enableInTreeAutoscaling"] is True
    assert cluster["autoscalerOptions"]["version"] == "v2"
    templates = [cluster["headGroupSpec"]["template"], *(g["template"] for g in cluster["workerGroupSpecs"])]
    for template in templates:
        assert template["spec"]["restartPolicy"] == "Never", "a restarted pod would be another node"
        names = {item["name"] for item in template["spec"]["containers"][0].get("env", [])}
        assert not names & {"RAY_enable_autoscaler_v2", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN"}, "KubeRay sets these"


@pytest.mark.parametrize("name", ray_jobs())
def test_a_jobs_entry_point_survives_the_shell_that_submits_it(name: str) -> None:
    """KubeRay puts it into a script as it is: what a shell reads would be read there, not in the job."""
    assert re.fullmatch(r"[\w./ -]+", ray_jobs()[name]["entrypoint"])
    assert ray_jobs()[name]["submitterPodTemplate"]["spec"]["restartPolicy"] == "Never"


def test_a_job_with_a_cluster_of_its_own_tries_again_ends_in_time_and_takes_the_cluster_away() -> None:
    own = {name: job for name, job in ray_jobs().items() if "rayClusterSpec" in job}
    assert len(own) == 4
    for name, job in own.items():
        assert job["backoffLimit"] >= 2, name
        assert job["activeDeadlineSeconds"] > 0, name
        assert job["shutdownAfterJobFinishes"] is True, name
        assert 0 < job["ttlSecondsAfterFinished"] <= 600, "a cluster that is done costs as much as one at work"
    nightly = own["repsep-nightly-segment"]
    assert nightly["activeDeadlineSeconds"] < 24 * 3600, "nights do not pile up"


def test_names_are_short_enough_for_what_kuberay_appends() -> None:
    names = [*of_kind("RayJob"), *(f"repsep-{stage}-abcde" for stage in argo_jobs())]
    assert all(re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) and len(name) <= 47 for name in names)


def test_nothing_runs_on_the_head_which_is_on_demand_and_gpus_are_spot_machines() -> None:
    for name, cluster in ray_clusters().items():
        head = cluster["headGroupSpec"]
        assert head["rayStartParams"]["num-cpus"] == "0", name
        assert head["template"]["spec"]["nodeSelector"] == {"karpenter.sh/capacity-type": "on-demand"}, name
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        gpu = groups["gpu-spot"]["template"]["spec"]
        assert gpu["nodeSelector"] == {"karpenter.sh/capacity-type": "spot"}, name
        assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "1", name
        for group in groups.values():
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"], name


def test_a_spot_worker_has_time_for_what_its_pre_stop_hook_does() -> None:
    for pod in pods():
        if pod.name.endswith("/gpu-spot"):
            script = pod.spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"][-1]
            deadline, sleep = (
                int(re.search(p, script)[1])  # type: ignore[index]
                for p in (r"--deadline-remaining-seconds (\d+)", r"sleep (\d+)")
            )
            assert sleep < deadline < pod.spec["terminationGracePeriodSeconds"], pod.name


def test_clusters_differ_in_their_groups_sizes_alone() -> None:
    heads, groups = [], {}
    for cluster in ray_clusters().values():
        shared = {key: value for key, value in cluster.items() if key != "workerGroupSpecs"}
        heads.append(shared)
        for group in cluster["workerGroupSpecs"]:
            sizes = ("replicas", "minReplicas", "maxReplicas")
            rest = {key: value for key, value in group.items() if key not in sizes}
            assert groups.setdefault(group["groupName"], rest) == rest
    assert len(heads) == 5
    assert all(head == heads[0] for head in heads)


def test_a_job_starts_with_as_many_machines_as_its_stage_needs_to_see(etc_repsep: Path) -> None:
    """Training refuses a single machine without CPUs; segmentation takes the GPUs that are there at its start."""
    for name, cluster in ray_clusters().items():
        groups = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
        assert sum(group["minReplicas"] for group in groups.values()) >= 1, name
        if "segment" in name:
            assert groups["gpu-spot"]["minReplicas"] == groups["gpu-spot"]["maxReplicas"], name
    recipe = load_recipe(etc_repsep / "recipe.yaml")
    assert recipe.train.runtime.gpu is True
    assert recipe.segment is not None
    assert recipe.segment.runtime.gpu is True


# ------------------------------------------------------------------------------------------------- references and pins


def test_the_recipe_that_pods_get_loads_and_is_for_more_than_one_machine(etc_repsep: Path) -> None:
    recipe = load_recipe(etc_repsep / "recipe.yaml")
    segment = recipe.segment
    assert segment is not None
    assert recipe.sweep is not None
    for uri in (recipe.workspace, recipe.prepare.source, segment.source, segment.target):
        assert str(uri).startswith("s3://your-bucket/"), "a placeholder in object storage"
    gpu = next(group for group in ray_clusters()["repsep"]["workerGroupSpecs"] if group["groupName"] == "gpu-spot")
    limits = gpu["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert recipe.train.runtime.cpus_per_worker < int(limits["cpu"]), "the rest is for Ray"
    assert recipe.train.runtime.most_workers <= gpu["maxReplicas"]
    assert recipe.train.batch_size >= recipe.train.runtime.most_workers


def test_every_config_map_secret_and_key_that_is_named_exists() -> None:
    there = {("Secret", name): set(doc["stringData"]) for name, doc in of_kind("Secret").items()}
    there |= {("ConfigMap", name): set(doc["data"]) for name, doc in of_kind("ConfigMap").items()}
    offered = set(re.findall(r"^  # ([A-Z_]+): ", (KUBERAY / "settings.yaml").read_text(), re.MULTILINE))
    used = set()
    for pod in pods():
        for container in pod.containers:
            for source in container.get("envFrom", []):
                used |= {
                    ("ConfigMap" if "configMapRef" in source else "Secret", ref["name"]) for ref in source.values()
                }
            for item in container.get("env", []):
                for kind, ref in item.get("valueFrom", {}).items():
                    owner = ({"secretKeyRef": "Secret", "configMapKeyRef": "ConfigMap"}[kind], ref["name"])
                    assert ref["key"] in (offered if ref.get("optional") else there[owner]), item
                    used.add(owner)
            volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
            for mount in container.get("volumeMounts", []):
                if "configMap" in volumes.get(mount["name"], {}):
                    used.add(("ConfigMap", volumes[mount["name"]]["configMap"]["name"]))
    for cluster in ray_clusters().values():
        assert "auth_token" in there[("Secret", cluster["authOptions"]["secretName"])]
        used.add(("Secret", cluster["authOptions"]["secretName"]))
    assert used == set(there), "named and made are the same"


def test_mlflow_is_told_of_the_store_what_ray_is_told() -> None:
    """Ray's pods take the whole of `repsep-environment`; boto3, which MLflow stores with, reads these two of it."""
    (container,) = of_kind("Deployment")["mlflow"]["spec"]["template"]["spec"]["containers"]
    taken = {item["name"]: item["valueFrom"]["configMapKeyRef"] for item in container["env"] if "AWS" in item["name"]}
    reference = {"name": "repsep-environment"}
    assert taken == {
        "AWS_DEFAULT_REGION": reference | {"key": "AWS_DEFAULT_REGION"},
        "AWS_ENDPOINT_URL": reference | {"key": "AWS_ENDPOINT_URL", "optional": True},
    }
    environment = of_kind("ConfigMap")["repsep-environment"]["data"]
    assert environment["AWS_DEFAULT_REGION"] == environment["AWS_REGION"]
    for name, cluster in ray_clusters().items():
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
            assert {"configMapRef": reference} in group["template"]["spec"]["containers"][0]["envFrom"], name


def test_a_service_leads_to_the_port_of_its_pods() -> None:
    by_labels = {frozenset(pod.labels.items()): pod for pod in pods() if "/" not in pod.name}
    for name, service in of_kind("Service").items():
        pod = by_labels[frozenset(service["spec"]["selector"].items())]
        ports = {port["name"]: port["containerPort"] for container in pod.containers for port in container["ports"]}
        for port in service["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"], name


def test_argos_stages_are_ours_in_order_and_on_the_cluster_that_stays() -> None:
    spec = of_kind("WorkflowTemplate")["repsep"]["spec"]
    tasks = next(t for t in spec["templates"] if t["name"] == spec["entrypoint"])["dag"]["tasks"]
    order = ["prepare", "train", "evaluate", "register", "segment"]
    needs = {task["name"]: task.get("dependencies", []) for task in tasks}
    expected = {after: [before] for before, after in itertools.pairwise(order)}
    assert needs == {"prepare": [], "report": ["register"], **expected}, "a report also where labelling fails"
    for name, doc in argo_jobs().items():
        assert doc["metadata"]["generateName"] == f"repsep-{name}-"
        assert doc["spec"]["clusterSelector"] == {"ray.io/cluster": "repsep"}
        assert "repsep" in of_kind("RayCluster")
        assert name in doc["spec"]["entrypoint"]


def test_all_images_are_ours_or_official_with_a_version_that_stays() -> None:
    images = {container["image"] for pod in pods() for container in pod.containers}
    assert images == {IMAGE, "postgres:17.7-bookworm"}
    assert not any(":latest" in file.read_text() for file in INFRA.rglob("*") if file.is_file())
