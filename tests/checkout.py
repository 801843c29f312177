"""A checkout for tests that type what a page says: `make` finds its .venv there and installs nothing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
NAMES = ("Makefile", "constraints.txt", "infra", "jobs", "pipelines", "pyproject.toml", "repsep_model")


def checkout(folder: Path) -> Path:
    """What the verbs of make and the jobs need, copied into a folder; .venv is the environment of this process."""
    for name in NAMES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy2(source, folder / name)
    environment = folder / ".venv"
    environment.mkdir()
    for part in Path(sys.prefix).iterdir():
        if part.name != ".installed":
            (environment / part.name).symlink_to(part)
    (environment / ".installed").touch()
    return folder
