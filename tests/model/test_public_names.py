"""What the package offers, and what it leaves alone."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import repsep_model

PACKAGE = Path(repsep_model.__file__).parent
NAMES = {
    "CheckpointError",
    "ConfusionMatrix",
    "ExportError",
    "ExportReport",
    "FineTuneReport",
    "LoadReport",
    "LossWeights",
    "Segmentation",
    "Segmentor",
    "SegmentorConfig",
    "SegmentorOutput",
    "build_segmentor",
    "corrupt",
    "export_onnx",
    "export_program",
    "init_from",
    "load_pretrained",
    "load_segmentor",
    "save_segmentor",
    "segment_image",
    "segmentation_loss",
    "separation_report",
}
ABOVE = {"ray", "mlflow", "click", "fsspec", "s3fs", "pyarrow", "pydantic", "pipelines", "jobs"}


def run(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_all_is_exactly_the_public_names() -> None:
    assert set(repsep_model.__all__) == NAMES
    assert list(repsep_model.__all__) == sorted(repsep_model.__all__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_can_be_imported_and_says_what_it_is_for(name: str) -> None:
    assert getattr(repsep_model, name).__doc__


def test_names_imported_for_type_checkers_are_those_that_the_interpreter_finds() -> None:
    """What mypy and an IDE read and what a program gets are two lists: the same names from the same modules."""
    tree = ast.parse(Path(repsep_model.__file__).read_text())
    guarded = next(node for node in tree.body if isinstance(node, ast.If))
    read = {
        alias.name: node.module
        for node in guarded.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
        if alias.asname is None
    }
    assert read == {name: f"repsep_model.{home}" for name, home in repsep_model._HOME.items()}
    assert read.keys() == NAMES
    for name, module in read.items():
        assert getattr(repsep_model, name) is getattr(importlib.import_module(str(module)), name)


def test_public_names_are_listed_before_they_are_used() -> None:
    assert set(run("import repsep_model; print(*dir(repsep_model))").split()) >= NAMES
    assert set(run("from repsep_model import *; print(*dir())").split()) >= NAMES


def test_a_name_that_there_is_not_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'repsep_model' has no attribute 'segment_images'"):
        _ = repsep_model.segment_images  # type: ignore[attr-defined]
    with pytest.raises(ImportError, match="segment_images"):
        from repsep_model import segment_images  # noqa: F401


@pytest.mark.parametrize("module", ["repsep_model", "repsep_model.images"])
def test_reading_images_needs_no_torch(module: str) -> None:
    """Readers are many small processes: torch would cost each of them seconds and hundreds of megabytes."""
    assert (
        run(f"import sys, {module}; print(*sorted({{'torch', 'timm', 'torchvision', 'scipy'}} & set(sys.modules)))")
        == ""
    )


def test_importing_the_package_brings_in_neither_ray_nor_mlflow_nor_click() -> None:
    code = (
        "import sys, torch; seed = torch.initial_seed(); import repsep_model; "
        "[getattr(repsep_model, name) for name in repsep_model.__all__]; "
        "print(*sorted({'ray', 'mlflow', 'click'} & set(sys.modules)), seed == torch.initial_seed())"
    )
    assert run(code) == "True"


@pytest.mark.parametrize("file", sorted(PACKAGE.glob("*.py")), ids=lambda file: file.stem)
def test_module_imports_nothing_from_the_layers_above(file: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            imported.add(str(node.module))
    assert {name.split(".")[0] for name in imported} & ABOVE == set()
