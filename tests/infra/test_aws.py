"""The file for Ray's cluster launcher passes Ray's own checks, costs what it says, and carries no rights."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import boto3
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


def container_environment() -> dict[str, str]:
    """What `docker run` sets; all commands run in there."""
    given = (option.removeprefix("--env ") for option in CLUSTER["docker"]["run_options"] if "--env " in option)
    return dict(each.split("=", 1) for each in given)


def test_regions_agree() -> None:
    region = CLUSTER["provider"]["region"]
    names = ("AWS_REGION", "AWS_DEFAULT_REGION")
    assert {container_environment()[name] for name in names} == {region}
    assert all(zone[:-1] == region for zone in CLUSTER["provider"]["availability_zone"].split(","))


TOKEN, TRACKING = "0123456789abcdef" * 4, "postgresql://mlflow:p%40ss@db:5432/mlflow"


@pytest.fixture
def container(moto_server: str, tmp_path: Path) -> dict[str, str]:
    """The environment of the container, with keys and a store of secrets instead of the instance profile's."""
    beside = Path(sys.executable).parent
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text('#!/bin/sh\nprintf "%s: %s\\n" "$1" "$MLFLOW_TRACKING_URI" >>~/called\n')
    ray.chmod(0o755)
    return container_environment() | {
        "PATH": f"{ray.parent}:{beside}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "AWS_ENDPOINT_URL": moto_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
    }


@pytest.fixture
def secrets(moto_server: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    region = CLUSTER["provider"]["region"]
    client = boto3.client("secretsmanager", region_name=region, endpoint_url=moto_server)
    values = {"repsep/ray-token": TOKEN, "repsep/mlflow-uri": TRACKING}
    for name, value in values.items():
        client.create_secret(Name=name, SecretString=value)
    yield
    for name in values:
        client.delete_secret(SecretId=name, ForceDeleteWithoutRecovery=True)


def run(command: str, environment: dict[str, str]) -> int:
    return subprocess.run(["bash", "-c", command], env=environment, check=False, timeout=120).returncode


def test_the_head_gets_its_token_and_its_tracking_server_from_the_secrets_of_its_region(
    container: dict[str, str], secrets: None, tmp_path: Path
) -> None:
    commands = [*CLUSTER["setup_commands"], *CLUSTER["head_start_ray_commands"]]
    assert [run(command, container) for command in commands] == [0, 0, 0]
    token = tmp_path / ".ray" / "auth_token"
    assert token.read_text() == TOKEN
    assert token.stat().st_mode & 0o077 == 0, "nobody else reads it"
    assert (tmp_path / "called").read_text().splitlines() == ["stop: ", f"start: {TRACKING}"]


def test_a_head_whose_secrets_are_missing_does_not_start(container: dict[str, str], tmp_path: Path) -> None:
    (setup,), (_, start) = CLUSTER["setup_commands"], CLUSTER["head_start_ray_commands"]
    assert run(setup, container) != 0
    assert run(start, container) != 0
    assert not (tmp_path / "called").exists()
