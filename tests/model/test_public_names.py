"""What the package offers, and what it leaves alone."""

import ast
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
    "load_pretrained",
    "load_segmentor",
    "save_segmentor",
    "segment_image",
    "segmentation_loss",
    "separation_report",
}
ABOVE = {"ray", "mlflow", "click", "fsspec", "s3fs", "pyarrow", "pydantic", "pipelines", "jobs"}


def test_all_is_exactly_the_public_names() -> None:
    assert set(repsep_model.__all__) == NAMES
    assert list(repsep_model.__all__) == sorted(repsep_model.__all__)


@pytest.mark.parametrize("name", sorted(NAMES))
def test_public_name_can_be_imported_and_says_what_it_is_for(name: str) -> None:
    assert getattr(repsep_model, name).__doc__


def test_importing_the_package_brings_in_neither_ray_nor_mlflow_nor_click() -> None:
    code = (
        "import sys, torch; seed = torch.initial_seed(); import repsep_model; "
        "print(*sorted({'ray', 'mlflow', 'click'} & set(sys.modules)), seed == torch.initial_seed())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["True"], done.stderr


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
