"""Schemas for the manifests, each made strict: a key that a schema does not know is an error, as a typing error is.

Kubernetes' own kinds come from the package kubernetes-validate, KubeRay's from its custom resource definitions, which
lie beside the repository (and are skipped where they do not). Of Argo's, Prometheus' and Kustomize's kinds the part
that is used here is written down below.
"""

from __future__ import annotations

import functools
import gzip
import json
from typing import Any

import jsonschema
import kubernetes_validate
import pytest

from tests.infra.manifests import ROOT, Doc

KUBERNETES = "1.33"
KUBERAY_CRDS = ROOT.parent / "shared" / "schemas"
RAY_KINDS = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayCronJob": "raycronjobs"}


def validate(doc: Doc) -> None:
    """Raises jsonschema.ValidationError; skips the test where KubeRay's definitions are not there."""
    kind = doc["kind"]
    if kind in RAY_KINDS:
        assert doc["apiVersion"] == "ray.io/v1"
        _kuberay(kind).validate(doc)
        doc = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": doc["metadata"]}  # Kubernetes' own part of it
    if kind in FOREIGN:
        jsonschema.validate(doc, FOREIGN[kind])
    else:
        kubernetes_validate.validate(doc, KUBERNETES, strict=True)


@functools.cache
def _kuberay(kind: str) -> jsonschema.Draft202012Validator:
    """For one of KubeRay's kinds; made once, for it is large."""
    file = KUBERAY_CRDS / f"{RAY_KINDS[kind]}.json.gz"
    if not file.is_file():
        pytest.skip(f"KubeRay's definitions are not there: {file}")
    schema = strict(json.loads(gzip.decompress(file.read_bytes()))["schema"])
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def strict(schema: Any) -> Any:
    """The schema with additionalProperties false wherever it lists properties and does not ask to keep others."""
    if isinstance(schema, list):
        return [strict(inner) for inner in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: strict(value) for key, value in schema.items()}
    open_to_others = schema.get("x-kubernetes-preserve-unknown-fields") or "additionalProperties" in schema
    if isinstance(schema.get("properties"), dict) and "type" in schema and not open_to_others:
        found["additionalProperties"] = False
    return found


def _object(optional: Doc | None = None, **required: Any) -> Doc:
    """A closed object; keyword arguments are required."""
    return {
        "type": "object",
        "properties": required | (optional or {}),
        "required": list(required),
        "additionalProperties": False,
    }


def _list(items: Any) -> Doc:
    return {"type": "array", "items": items, "minItems": 1}


_TEXT, _NUMBER = {"type": "string"}, {"type": "integer"}
_LABELS = {"type": "object", "additionalProperties": _TEXT}
_METADATA = _object({"labels": _LABELS}, name=_TEXT, namespace=_TEXT)
_PARAMETERS = _object(parameters=_list(_object({"value": _TEXT}, name=_TEXT)))
_TASK = _object({"dependencies": _list(_TEXT)}, name=_TEXT, template=_TEXT, arguments=_PARAMETERS)
_RETRY = _object(
    limit=_NUMBER,
    retryPolicy={"enum": ["Always", "OnFailure", "OnError", "OnTransientError"]},
    backoff=_object(duration=_TEXT, factor=_NUMBER),
)
_RESOURCE = _object(
    action={"enum": ["create", "apply", "get", "delete", "patch", "replace"]},
    setOwnerReference={"type": "boolean"},
    successCondition=_TEXT,
    failureCondition=_TEXT,
    manifest=_TEXT,
)
_STAGES = _object(name=_TEXT, dag=_object(tasks=_list(_TASK)))
_STAGE = _object(
    name=_TEXT, inputs=_PARAMETERS, retryStrategy=_RETRY, activeDeadlineSeconds=_NUMBER, resource=_RESOURCE
)

FOREIGN: dict[str, Doc] = {
    "WorkflowTemplate": _object(
        apiVersion={"const": "argoproj.io/v1alpha1"},
        kind=_TEXT,
        metadata=_METADATA,
        spec=_object(
            entrypoint=_TEXT,
            serviceAccountName=_TEXT,
            ttlStrategy=_object(secondsAfterCompletion=_NUMBER),
            podMetadata=_object(labels=_LABELS),
            securityContext={"type": "object"},
            templates=_list({"oneOf": [_STAGES, _STAGE]}),
        ),
    ),
    "Kustomization": _object(
        apiVersion={"const": "kustomize.config.k8s.io/v1beta1"}, kind=_TEXT, resources=_list(_TEXT)
    ),
    "PodMonitor": _object(
        apiVersion={"const": "monitoring.coreos.com/v1"},
        kind=_TEXT,
        metadata=_METADATA,
        spec=_object(
            namespaceSelector=_object(matchNames=_list(_TEXT)),
            selector=_object(matchLabels=_LABELS),
            podMetricsEndpoints=_list(
                _object(
                    port=_TEXT, interval=_TEXT, relabelings=_list(_object(sourceLabels=_list(_TEXT), targetLabel=_TEXT))
                )
            ),
        ),
    ),
}
