"""The MLflow model of a segmentor: its files, our library and served_model.py, with what is asked and answered."""

from __future__ import annotations

import warnings
from pathlib import Path

import mlflow.pyfunc
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, Schema
from mlflow.types.schema import Array, Object, Property

import repsep_model
from pipelines.stage import package_versions

SERVED_PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow")
SERVED_CLASSES = Array(
    Object(
        [
            Property("id", DataType.long),
            Property("name", DataType.string),
            Property("color", Array(DataType.long)),
            Property("pixels", DataType.long),
        ]
    )
)


def save_pyfunc(path: Path, directory: Path) -> None:
    """Write the segmentor in `directory` as an MLflow model that `mlflow models serve` answers with."""
    versions = package_versions()
    with warnings.catch_warnings():
        # MLflow asks for type hints and an input example, though the signature is given, and lifts any filter itself.
        warnings.simplefilter("ignore", UserWarning)
        warnings.showwarning = lambda *_, **__: None
        _save(path, directory, versions)


def _save(path: Path, directory: Path, versions: dict[str, str]) -> None:
    mlflow.pyfunc.save_model(
        str(path),
        python_model=str(Path(__file__).with_name("served_model.py")),
        artifacts={"segmentor": str(directory)},
        code_paths=[str(Path(repsep_model.__file__).parent)],
        signature=ModelSignature(
            inputs=Schema([ColSpec(DataType.binary, "image")]),
            outputs=Schema(
                [
                    ColSpec(DataType.string, "mask"),
                    ColSpec(DataType.long, "height"),
                    ColSpec(DataType.long, "width"),
                    ColSpec(SERVED_CLASSES, "classes"),
                    ColSpec(DataType.double, "confidence"),
                ]
            ),
        ),
        pip_requirements=[f"{name}=={versions[name]}" for name in SERVED_PACKAGES] + ["safetensors", "scipy"],
    )
