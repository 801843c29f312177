"""The dashboard draws all of our counters and only what exists; Prometheus finds the machines."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import ray.dashboard.modules.metrics.dashboards
import yaml
from ray._private import ray_constants

from pipelines import counters
from tests.infra.manifests import INFRA, documents, pods

DASHBOARD: dict[str, Any] = json.loads((INFRA / "monitoring" / "grafana-dashboard.json").read_text())
PROMETHEUS: dict[str, Any] = yaml.safe_load((INFRA / "monitoring" / "prometheus.yml").read_text())
OURS = {f"ray_{counted.name}_total": counted for counted in counters.ALL}  # tests/pipelines/test_counters.py
RAYS = {
    "ray_memory_manager_worker_eviction_total",
    "ray_node_cpu_utilization",
    "ray_node_gpus_utilization",
    "ray_object_store_memory",
}
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]


def metrics(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_a_panel_asks_for_metrics_that_exist(expression: str) -> None:
    assert metrics(expression)
    assert metrics(expression) <= set(OURS) | RAYS


def test_every_counter_is_drawn_and_every_metric_of_rays_is_one_that_its_own_dashboards_draw() -> None:
    drawn = set().union(*map(metrics, EXPRESSIONS))
    assert drawn == set(OURS) | RAYS
    folder = Path(next(iter(ray.dashboard.modules.metrics.dashboards.__path__)))
    source = "".join(file.read_text() for file in folder.glob("*.py"))
    assert all(re.search(rf"\b{name}\b", source) for name in RAYS)


def test_a_panel_groups_by_labels_that_the_counter_has() -> None:
    for expression in EXPRESSIONS:
        for grouped in re.findall(r"by \((\w+)\) \(\w+\((ray_repsep_\w+)", expression):
            assert grouped[0] in OURS[grouped[1]].labels
    legends = [target["legendFormat"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert "{{stage}}" in legends


def test_counters_are_drawn_as_rates() -> None:
    for expression in EXPRESSIONS:
        for name in metrics(expression):
            if name.endswith("_total"):
                assert re.search(rf"(rate|increase)\({name}\[", expression), expression
        assert expression.count("(") == expression.count(")")


def test_panels_have_ids_of_their_own_and_do_not_overlap() -> None:
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels) == 10
    for a, b in itertools.combinations([panel["gridPos"] for panel in panels], 2):
        apart = a["x"] + a["w"] <= b["x"] or b["x"] + b["w"] <= a["x"]
        assert apart or a["y"] + a["h"] <= b["y"] or b["y"] + b["h"] <= a["y"]
    assert all(panel["description"] and panel["title"] for panel in panels)


def test_the_data_source_is_chosen_in_grafana() -> None:
    (variable,) = DASHBOARD["templating"]["list"]
    assert (variable["name"], variable["type"], variable["query"]) == ("datasource", "datasource", "prometheus")
    sources = [panel["datasource"] for panel in DASHBOARD["panels"]]
    sources += [target["datasource"] for panel in DASHBOARD["panels"] for target in panel["targets"]]
    assert all(source == {"type": "prometheus", "uid": "${datasource}"} for source in sources)


def test_prometheus_reads_the_list_of_machines_where_ray_writes_it() -> None:
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    assert set(PROMETHEUS) == {"global", "scrape_configs"}
    (discovery,) = jobs["ray"]["file_sd_configs"]
    assert set(discovery) == {"files", "refresh_interval"}
    assert discovery["files"] == [f"/tmp/ray/{ray_constants.PROMETHEUS_SERVICE_DISCOVERY_FILE}"]


def test_prometheus_finds_the_head_of_the_local_stack() -> None:
    jobs = {job["job_name"]: job for job in PROMETHEUS["scrape_configs"]}
    (targets,) = jobs["ray-compose"]["static_configs"]
    ports = yaml.safe_load((INFRA / "compose.yaml").read_text())["services"]["ray"]["ports"]
    assert [f"{port.rpartition(':')[0]}" for port in ports if port.endswith(":8080")] == targets["targets"]


def test_the_pod_monitor_selects_all_ray_pods_and_no_other_by_the_name_of_their_port() -> None:
    ((_, monitor),) = documents(INFRA / "monitoring" / "podmonitor.yaml")
    labels = monitor["spec"]["selector"]["matchLabels"].items()
    (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
    selected = [pod for pod in pods() if labels <= pod.labels.items()]
    assert len(selected) == len([pod for pod in pods() if pod.containers[0]["name"] in ("ray-head", "ray-worker")])
    for pod in selected:
        ports = {port["name"]: port["containerPort"] for port in pod.containers[0]["ports"]}
        assert ports[endpoint["port"]] == 8080, pod.name
