"""Backbone weights of others, taken in with a report of what found its place. Nothing in a foreign file is executed."""

from __future__ import annotations

import importlib
import logging
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from repsep_model.backbone import Backbone

logger = logging.getLogger(__name__)


class CheckpointError(ValueError):
    """A directory that holds no whole segmentor, or weights that do not fit; the message says which file and why."""


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
