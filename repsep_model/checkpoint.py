"""What is saved of a segmentor, and how weights of others are taken in. No pickle: safetensors and JSON.

`model.safetensors` (inference weights), `segmentor.json` (config), `classes.json` (the dataset's list, unchanged).
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from repsep_model.backbone import Backbone
from repsep_model.config import SegmentorConfig
from repsep_model.segmentor import Segmentor, build_segmentor

WEIGHTS, SETTINGS, CLASSES = "model.safetensors", "segmentor.json", "classes.json"
FORMAT = 1


class CheckpointError(ValueError):
    """A directory that holds no whole segmentor, or weights that do not fit; the message says which file and why."""


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


@dataclass(frozen=True)
class LoadReport:
    """Which weights of a file found their place."""

    matched: tuple[str, ...]
    resized: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{len(self.matched)} matched, {len(self.resized)} resized, {len(self.missing)} missing "
            f"{list(self.missing[:5])}, {len(self.unexpected)} unexpected {list(self.unexpected[:5])}"
        )


def load_pretrained(backbone: Backbone, file: Path) -> LoadReport:
    """Backbone weights from a safetensors file or a torch state dict (read with weights_only, so no code runs).

    timm's own filter renames keys and resizes position embeddings. Raises CheckpointError if nothing fits.
    """
    state = _read_weights(file)
    model = backbone.model
    own = model.state_dict()
    adapted: dict[str, Tensor] = _timm_filter(model, state)
    matched = [name for name in adapted if name in own and adapted[name].shape == own[name].shape]
    if not matched:
        raise CheckpointError(f"{file} has no weights for this backbone; its first keys: {list(state)[:3]}")
    model.load_state_dict({name: adapted[name] for name in matched}, strict=False)
    return LoadReport(
        matched=tuple(matched),
        resized=tuple(n for n in matched if n in state and state[n].shape != adapted[n].shape),
        missing=tuple(sorted(set(own) - set(matched))),
        unexpected=tuple(sorted(set(adapted) - set(matched))),
    )


def _read_weights(file: Path) -> dict[str, Tensor]:
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(f"{file} cannot be read as weights: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{file} holds a {type(state).__name__}, not a state dict")
    for key in ("state_dict", "model", "module"):
        if isinstance(state.get(key), dict):
            state = state[key]
    return {str(name): t for name, t in state.items() if isinstance(t, Tensor)}


def _timm_filter(model: torch.nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    filter_fn = getattr(importlib.import_module(type(model).__module__), "checkpoint_filter_fn", None)
    adapted: dict[str, Tensor] = filter_fn(dict(state), model) if filter_fn is not None else state
    return adapted
