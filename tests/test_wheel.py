"""The wheel works alone: what is in it, and what an installation can do in a folder that is not the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path
from typing import NamedTuple

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("repsep_model", "pipelines", "jobs")
DATA = ("py.typed", "recipes/*.yaml", "templates/*.html", "templates/*.md")
PATIENCE_S = 600


class Installed(NamedTuple):
    """An environment with the wheel, which sees this one's dependencies, and an empty folder."""

    bin: Path
    folder: Path

    def run(self, program: str, *arguments: str) -> str:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        done = subprocess.run(
            [str(self.bin / program), *arguments],
            cwd=self.folder,
            env=environment | {"REPSEP_HOME": str(self.folder / "home")},
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy: what an earlier build left in the checkout must not get in."""
    root = tmp_path_factory.mktemp("wheel")
    left = shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "shared")
    shutil.copytree(ROOT, root / "copy", ignore=left)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*command, "--wheel-dir", str(root), str(root / "copy")], check=True, timeout=PATIENCE_S)
    shutil.rmtree(root / "copy")  # nothing may be read from it any more
    (found,) = root.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    root = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(root / "venv")], check=True, timeout=PATIENCE_S)
    python = root / "venv/bin/python"
    command = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, str(wheel)], check=True, timeout=PATIENCE_S)
    (packages,) = (root / "venv/lib").glob("python*/site-packages")
    # A .pth file adds a folder and runs none of the .pth files in there: the checkout that is installed here stays out.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    (root / "elsewhere").mkdir()
    return Installed(root / "venv/bin", root / "elsewhere")


def test_the_wheel_holds_the_packages_their_recipes_and_templates_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
    expected = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for pattern in ("**/*.py", *DATA)
        for path in (ROOT / package).glob(pattern)
    }
    assert names == expected
    assert len([name for name in names if name.endswith((".yaml", ".html"))]) >= 10


def test_the_version_is_the_changelogs_newest(wheel: Path, installed: Installed) -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    headings = [line for line in (ROOT / "CHANGELOG.md").read_text().splitlines() if line.startswith("## [")]
    assert headings[0].startswith(f"## [{version}] - ")
    assert wheel.name.startswith(f"repsep-{version}-")
    assert installed.run("repsep", "--version").strip().endswith(version)


def test_the_commands_and_their_help_are_there(installed: Installed) -> None:
    assert "Label every image under a prefix." in installed.run("repsep", "--help")
    assert "--config" in installed.run("repsep", "train", "--help")


def test_a_recipe_that_comes_along_is_found_and_planned(installed: Installed) -> None:
    planned = installed.run("repsep", "workflow", "--config", "demo", "--plan", "--set", "workspace=work")
    assert " ".join(planned.splitlines()[0].split()) == "prepare runs: it was never run in this workspace"
    assert not (installed.folder / "work").exists()


def test_every_template_is_read_from_the_installation(installed: Installed) -> None:
    names = sorted(path.name for path in (ROOT / "pipelines/templates").glob("*.html"))
    program = (
        "import sys; from pipelines.pages import TEMPLATES; "
        "print(*(len((TEMPLATES / name).read_text()) for name in sys.argv[1:]))"
    )
    sizes = [len((ROOT / "pipelines/templates" / name).read_text()) for name in names]
    assert installed.run("python", "-c", program, *names).split() == [str(size) for size in sizes]


def test_the_library_is_imported_from_the_installation_without_ray_or_mlflow(installed: Installed) -> None:
    program = (
        "import sys, repsep_model, jobs, pipelines; "
        "print(*(package.__path__[0] for package in (repsep_model, jobs, pipelines))); "
        "print(*sorted({'ray', 'mlflow', 'click'} & {name.partition('.')[0] for name in sys.modules}))"
    )
    places, others = installed.run("python", "-c", program).split("\n")[:2]
    assert all(place.startswith(str(installed.bin.parent)) for place in places.split())
    assert others == ""
