"""The house rules that a reader relies on, held over the syntax trees: nothing is imported to check them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("repsep_model", "pipelines", "jobs")
# Each package may import those before it.
ABOVE = {"repsep_model": ("pipelines", "jobs"), "pipelines": ("jobs",), "jobs": ()}
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))
LIBRARY_KNOWS_NOTHING_OF = ("ray", "mlflow", "click", "fsspec", "s3fs")
KNOW_MLFLOW = ("tracking.py", "served_package.py", "served_model.py")
KNOW_RAY = (
    "cluster.py",
    "counters.py",
    "halving.py",
    "job.py",
    "loop.py",
    "placement.py",
    "preemption.py",
    "telemetry.py",
    "train.py",
    "trials.py",
    "worker.py",
)
VAGUE = ("utils", "util", "common", "helpers", "helper", "misc", "manager")


def imported(path: Path) -> Iterator[str]:
    """Top-level packages that a module imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield path.parent.name if node.level else str(node.module).partition(".")[0]


def of(package: str) -> list[Path]:
    return [path for path in MODULES if path.is_relative_to(ROOT / package)]


def test_the_reader_of_imports_sees_those_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "module.py"
    file.write_text("import a.b\ndef f():\n    from c.d import e\n    from . import g\n")
    assert set(imported(file)) == {"a", "c", tmp_path.name}


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_run_one_way(package: str) -> None:
    assert of(package), f"{package} has no module"
    wrong = {path.name: set(imported(path)) & set(ABOVE[package]) for path in of(package)}
    assert not {name: found for name, found in wrong.items() if found}


def test_the_library_knows_nothing_of_clusters_registries_or_storage() -> None:
    wrong = {path.name: set(imported(path)) & set(LIBRARY_KNOWS_NOTHING_OF) for path in of("repsep_model")}
    assert not {name: found for name, found in wrong.items() if found}


def test_mlflow_is_known_to_three_modules_only() -> None:
    knowing = {path.name for path in MODULES if "mlflow" in imported(path)}
    assert knowing == set(KNOW_MLFLOW)


def test_ray_is_known_to_the_stages_that_run_on_it_and_to_one_module_of_bulk_segmentation() -> None:
    knowing = {path.name for path in MODULES if "ray" in imported(path)}
    assert knowing == set(KNOW_RAY)


def test_a_process_that_only_reads_or_writes_images_loads_no_torch() -> None:
    code = "import sys, pipelines.bulk.job; print('torch' in sys.modules, 'mlflow' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_commands_import_nothing_heavy_before_they_are_called() -> None:
    heavy = {"pipelines", "repsep_model", "ray", "torch", "mlflow"}
    for path in of("jobs"):
        at_import = [
            node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = {
            name.partition(".")[0]
            for node in at_import
            for name in ([a.name for a in node.names] if isinstance(node, ast.Import) else [str(node.module)])
        }
        assert not names & heavy, f"{path.name} makes --help slow: {names & heavy}"


def test_a_file_is_named_for_its_concept() -> None:
    vague = [path for path in ROOT.glob("*/**/*.py") if path.stem in VAGUE and not set(path.parts) & {".venv", "build"}]
    assert not vague


@pytest.mark.parametrize("path", [p for p in MODULES if p.stat().st_size], ids=lambda p: f"{p.parent.name}.{p.stem}")
def test_a_module_says_what_it_is_for(path: Path) -> None:
    said = ast.get_docstring(ast.parse(path.read_text()))
    assert said is not None
    assert len(said.split()) >= 3
