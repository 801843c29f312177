"""The file for Ray's cluster launcher passes Ray's own checks, costs what it says, and carries no rights."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import jsonschema
import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config

from tests.infra.manifests import IMAGE, INFRA, plain_secrets, texts

CLUSTER: dict[str, Any] = yaml.safe_load((INFRA / "aws" / "cluster.yaml").read_text())
HEAD, SPOT = (CLUSTER["available_node_types"][name] for name in ("head", "gpu-spot"))


def test_ray_accepts_it_as_it_is_and_with_its_own_defaults() -> None:
    validate_config(copy.deepcopy(CLUSTER))
    prepared = prepare_config(copy.deepcopy(CLUSTER))
    validate_config(prepared)
    assert set(prepared) - set(CLUSTER) <= {"file_mounts_sync_continuously", "rsync_exclude", "rsync_filter"}
    installs = [c for key in ("head_setup_commands", "worker_setup_commands") for c in prepared[key]]
    assert installs == CLUSTER["setup_commands"] * 2, "Ray's defaults would install Ray and boto3 again"


WRONG: dict[str, Callable[[dict[str, Any]], Any]] = {
    "a misspelt key": lambda c: c.update(idle_timeout_minute=5),
    "a misspelt key of a node type": lambda c: c["available_node_types"]["gpu-spot"].update(maximum_workers=3),
    "a misspelt key of docker": lambda c: c["docker"].update(images="x"),
    "a head that is no node type": lambda c: c.update(head_node_type="heads"),
    "more workers than allowed": lambda c: c.update(max_workers=0),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_ray_refuses_what_is_wrong(change: Callable[[dict[str, Any]], Any]) -> None:
    changed = copy.deepcopy(CLUSTER)
    change(changed)
    with pytest.raises((jsonschema.ValidationError, ValueError)):
        validate_config(changed)


def test_the_head_stays_and_runs_no_task_and_workers_are_spot_machines_that_go_when_idle() -> None:
    assert "InstanceMarketOptions" not in HEAD["node_config"]
    assert HEAD["resources"] == {"CPU": 0}
    assert HEAD["max_workers"] == 0
    assert SPOT["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    assert SPOT["resources"]["GPU"] == 1
    assert 1 <= SPOT["min_workers"] <= SPOT["max_workers"] <= CLUSTER["max_workers"]
    assert 0 < CLUSTER["idle_timeout_minutes"] <= 30
    assert CLUSTER["provider"]["cache_stopped_nodes"] is False, "a stopped machine still costs its disk"


def test_rights_come_from_an_instance_profile_and_nothing_is_copied_from_here() -> None:
    for node in (HEAD, SPOT):
        config = node["node_config"]
        assert config["IamInstanceProfile"] == {"Name": "repsep"}
        assert config["MetadataOptions"] == {"HttpTokens": "required"}
        assert config["SecurityGroupIds"], "the launcher's own lets everybody try SSH"
        assert all(disk["Ebs"]["Encrypted"] for disk in config["BlockDeviceMappings"])
    assert CLUSTER["file_mounts"] == {}
    assert CLUSTER["cluster_synced_files"] == []
    assert not plain_secrets(CLUSTER)
    assert not any("AWS_ACCESS_KEY_ID" in text for text in texts(CLUSTER))


def test_ray_asks_for_a_token_which_lies_where_it_looks() -> None:
    assert "--env RAY_AUTH_MODE=token" in CLUSTER["docker"]["run_options"]
    (command,) = CLUSTER["setup_commands"]
    assert command.startswith("umask 077 && ")
    assert command.endswith("> ~/.ray/auth_token")
    assert CLUSTER["docker"]["image"] == IMAGE


def test_workers_find_the_head_and_the_head_finds_its_launcher() -> None:
    head, worker = (CLUSTER[f"{who}_start_ray_commands"][-1] for who in ("head", "worker"))
    assert "--autoscaling-config=~/ray_bootstrap_config.yaml" in head
    assert "--dashboard-host=127.0.0.1" in head, "`ray dashboard` leads there through SSH"
    assert "--address=$RAY_HEAD_IP:6379" in worker
    assert "--port=6379" in head


def test_regions_agree() -> None:
    region = CLUSTER["provider"]["region"]
    assert f"--env AWS_REGION={region}" in CLUSTER["docker"]["run_options"]
    assert all(zone[:-1] == region for zone in CLUSTER["provider"]["availability_zone"].split(","))
