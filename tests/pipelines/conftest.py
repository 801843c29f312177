"""One Ray cluster and one prepared data set for all tests that need them: starting either takes seconds."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipelines.config import Recipe
from pipelines.prepare import prepare
from pipelines.stage import Receipt

TINY_MODEL: dict[str, Any] = {
    "backbone": "vit_tiny_patch16_224",
    "backbone_args": {"depth": 4, "embed_dim": 48, "num_heads": 3},
    "width": 16,
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Ray warns of its own internals; everywhere else a warning is an error."""
    for item in items:
        if item.get_closest_marker("ray"):
            for category in ("DeprecationWarning", "FutureWarning", "ResourceWarning"):
                item.add_marker(pytest.mark.filterwarnings(f"default::{category}"))


@pytest.fixture(scope="session")
def ray_cluster(moto_server: str) -> Iterator[None]:
    """A local Ray whose workers see moto's endpoint: they take the environment that the cluster was started in."""
    import ray

    from pipelines import cluster

    values = {
        "RAY_ADDRESS": "local",
        "AWS_ENDPOINT_URL": moto_server,
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    cluster.connect()
    for name, value in before.items():
        if value is None:
            del os.environ[name]
        else:
            os.environ[name] = value
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("workspace"))


@pytest.fixture(scope="session")
def recipe(scenes: Path, workspace: str, tmp_path_factory: pytest.TempPathFactory) -> Recipe:
    """A recipe that trains a tiny model for a few steps on the small data set."""
    return Recipe.model_validate(
        {
            "workspace": workspace,
            "tracking": {"uri": f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"},
            "prepare": {"source": str(scenes)},
            "train": {
                "model": TINY_MODEL,
                "steps": 12,
                "batch_size": 4,
                "validate_every": 4,
                "warmup_steps": 2,
                "augment": {"crop": 64},
                "runtime": {"workers": 2, "log_every": 4},
            },
            "evaluate": {"overlays": 2},
            "register": {"name": "tiny", "bootstrap": 100},
        }
    )


@pytest.fixture(scope="session")
def prepared(recipe: Recipe, workspace: str) -> Receipt:
    return prepare(workspace, recipe.prepare)


@pytest.fixture(scope="session")
def trained(ray_cluster: None, prepared: Receipt, recipe: Recipe, workspace: str) -> Receipt:
    from pipelines.train import train

    return train(workspace, recipe)
