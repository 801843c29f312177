"""What is saved of a segmentor. No pickle: safetensors and JSON.

`model.safetensors` (inference weights), `segmentor.json` (config), `classes.json` (the dataset's list, unchanged).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from repsep_model.config import SegmentorConfig
from repsep_model.pretrained import CheckpointError
from repsep_model.segmentor import Segmentor, build_segmentor

WEIGHTS, SETTINGS, CLASSES = "model.safetensors", "segmentor.json", "classes.json"
FORMAT = 1


def save_segmentor(model: Segmentor, directory: str | Path, *, classes: Mapping[str, Any]) -> None:
    """Write the inference form of `model`; `classes` is the content of the dataset's classes.json."""
    if len(classes["classes"]) != model.config.num_classes:
        raise ValueError(f"{len(classes['classes'])} classes given for a model of {model.config.num_classes}")
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.contiguous() for name, t in model.for_inference().cpu().state_dict().items()}
    save_file(tensors, directory / WEIGHTS)
    settings = {"format": FORMAT, "config": model.config.to_dict()}
    (directory / SETTINGS).write_text(json.dumps(settings, indent=1))
    (directory / CLASSES).write_text(json.dumps(classes, indent=1, ensure_ascii=False))


def load_segmentor(directory: str | Path) -> Segmentor:
    """The segmentor that `save_segmentor` wrote, ready for inference on the CPU. Raises CheckpointError."""
    directory = Path(directory)
    for name in (WEIGHTS, SETTINGS, CLASSES):
        if not (directory / name).is_file():
            raise CheckpointError(f"{directory} holds no segmentor: {name} is missing")
    try:
        settings = json.loads((directory / SETTINGS).read_text())
        if settings.get("format") != FORMAT:
            raise CheckpointError(
                f"{directory / SETTINGS} has format {settings.get('format')}, this version reads {FORMAT}"
            )
        model = build_segmentor(SegmentorConfig.from_dict(settings["config"])).for_inference()
        model.load_state_dict(load_file(directory / WEIGHTS))
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, SafetensorError, RuntimeError) as error:
        raise CheckpointError(f"{directory} cannot be loaded: {error}") from error
    return model


def load_classes(directory: str | Path) -> dict[str, Any]:
    """The class list beside a segmentor."""
    classes: dict[str, Any] = json.loads((Path(directory) / CLASSES).read_text())
    return classes
