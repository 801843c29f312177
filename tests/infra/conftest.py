"""What pods find in /etc/repsep, in a folder of this machine."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.infra.manifests import of_kind


@pytest.fixture(scope="session")
def etc_repsep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files of the ConfigMap `repsep-recipe`."""
    folder = tmp_path_factory.mktemp("etc-repsep")
    for name, text in of_kind("ConfigMap")["repsep-recipe"]["data"].items():
        (folder / name).write_text(text)
    return folder
