"""What the tests of infra/ read: the documents of its YAML files, and the pods, references and texts inside them."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
KUBERAY = INFRA / "kuberay"
IMAGE = "example.org/repsep:0.1.0"

Doc = dict[str, Any]


@functools.cache
def documents(*files: Path) -> list[tuple[str, Doc]]:
    """(file's name, document) of each document in the given files, by default of all of infra/kuberay. Read only."""
    return [
        (file.name, doc)
        for file in files or sorted(KUBERAY.glob("*.yaml"))
        for doc in yaml.safe_load_all(file.read_text())
    ]


def of_kind(*kinds: str) -> dict[str, Doc]:
    """Documents of infra/kuberay by name."""
    return {doc["metadata"]["name"]: doc for _, doc in documents() if doc["kind"] in kinds}


def argo_jobs() -> dict[str, Doc]:
    """The RayJobs that the Argo workflow creates, one for each task, with Argo's parameters filled in."""
    spec = of_kind("WorkflowTemplate")["repsep"]["spec"]
    templates = {template["name"]: template for template in spec["templates"]}
    found = {}
    for task in templates[spec["entrypoint"]]["dag"]["tasks"]:
        text = templates[task["template"]]["resource"]["manifest"]
        for parameter in task["arguments"]["parameters"]:
            text = text.replace(f"{{{{inputs.parameters.{parameter['name']}}}}}", parameter["value"])
        assert "{{" not in text, "a parameter without a value"
        found[task["name"]] = yaml.safe_load(text)
    return found


def ray_jobs() -> dict[str, Doc]:
    """The spec of every RayJob, whoever creates it."""
    jobs = {name: doc["spec"] for name, doc in of_kind("RayJob").items()}
    jobs |= {name: doc["spec"]["jobTemplate"] for name, doc in of_kind("RayCronJob").items()}
    return jobs | {f"argo/{name}": doc["spec"] for name, doc in argo_jobs().items()}


def ray_clusters() -> dict[str, Doc]:
    """The spec of every RayCluster: the one that stays, and those of jobs."""
    clusters = {name: doc["spec"] for name, doc in of_kind("RayCluster").items()}
    return clusters | {name: job["rayClusterSpec"] for name, job in ray_jobs().items() if "rayClusterSpec" in job}


@dataclass(frozen=True)
class Pod:
    """A pod template: where it is, its labels, its spec."""

    name: str
    labels: dict[str, str]
    spec: Doc

    @classmethod
    def of(cls, name: str, template: Doc) -> Pod:
        return cls(name, template["metadata"]["labels"], template["spec"])

    @property
    def containers(self) -> list[Doc]:
        return [*self.spec["containers"], *self.spec.get("initContainers", [])]

    @property
    def is_head(self) -> bool:
        return self.name.endswith("/head")


def pods() -> list[Pod]:
    """Every pod template of infra/kuberay."""
    found = [Pod.of(name, doc["spec"]["template"]) for name, doc in of_kind("Deployment", "StatefulSet").items()]
    for name, job in ray_jobs().items():
        found.append(Pod.of(f"{name}/submitter", job["submitterPodTemplate"]))
    for name, cluster in ray_clusters().items():
        found.append(Pod.of(f"{name}/head", cluster["headGroupSpec"]["template"]))
        found += [Pod.of(f"{name}/{group['groupName']}", group["template"]) for group in cluster["workerGroupSpecs"]]
    return found


def mappings(node: Any) -> Iterator[Doc]:
    """Every mapping in a document, also inside lists."""
    if isinstance(node, dict):
        yield node
    if isinstance(node, (dict, list)):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from mappings(inner)


def texts(node: Any) -> Iterator[str]:
    """Every string in a document, keys left out."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, (dict, list)):
        for inner in node.values() if isinstance(node, dict) else node:
            yield from texts(inner)


SECRET_NAME = re.compile(r"(?i)(password|passwd|secret_?(access_?)?key|access_?key|token|mlflow-uri)$")
REFERENCES = ("secretName", "automountServiceAccountToken", "HttpTokens")


def plain_secrets(doc: Any) -> list[str]:
    """Names of what looks like a secret and has a value; a reference to a variable or a Secret is none."""
    found = []
    for mapping in mappings(doc):
        if SECRET_NAME.search(str(mapping.get("name", ""))) and mapping.get("value"):
            found.append(mapping["name"])  # an item of `env`
        for key, value in mapping.items():
            is_value = isinstance(value, (str, int)) and value != "" and not re.match(r"\$\{\w+:\?", str(value))
            if key not in REFERENCES and SECRET_NAME.search(str(key)) and is_value:
                found.append(str(key))
    return found
