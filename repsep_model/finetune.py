"""Training that starts from a whole segmentor, heads included, where the list of classes may be another one.

What has a dimension over the classes is filled row by row, by the classes' names: a class that the source does not know
keeps its fresh initialization. Which weights those are is asked of the model itself, built for two numbers of classes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor

from repsep_model.checkpoint import load_classes, load_segmentor
from repsep_model.config import SegmentorConfig
from repsep_model.segmentor import Segmentor

FREE = ("num_classes", "drop_path", "attention_supervision", "window")
"""Settings that may differ from the source's: none of them changes what its weights mean."""


@dataclass(frozen=True)
class FineTuneReport:
    """What became of the source: weights by the model's names, classes by theirs.

    `missing` is what the source lacks, the heads that only training needs; it is fresh.
    """

    copied: tuple[str, ...]
    remapped: tuple[str, ...]
    fresh_classes: tuple[str, ...]
    dropped_classes: tuple[str, ...]
    missing: tuple[str, ...]

    def __str__(self) -> str:
        fresh, dropped = (
            f" ({', '.join(names)})" if names else "" for names in (self.fresh_classes, self.dropped_classes)
        )
        return (
            f"{len(self.copied)} weights copied, {len(self.remapped)} remapped by class, {len(self.missing)} missing; "
            f"{len(self.fresh_classes)} classes fresh{fresh}, {len(self.dropped_classes)} dropped{dropped}"
        )


def init_from(model: Segmentor, directory: str | Path, class_names: Sequence[str]) -> FineTuneReport:
    """Fill a freshly built `model` with the segmentor that `save_segmentor` wrote; class k is `class_names[k]`.

    Raises CheckpointError for a directory without a whole segmentor, and ValueError for one of another architecture
    (the message names the settings that differ) and for class names that are not one for each class.
    """
    source, known = load_segmentor(directory), _names(load_classes(directory))
    _check_same_architecture(model.config, source.config, directory)
    wanted = list(class_names)
    for names, config, whose in ((wanted, model.config, "the model"), (known, source.config, directory)):
        if len(names) != config.num_classes or len(set(names)) != len(names):
            raise ValueError(f"{whose} needs {config.num_classes} class names, no two the same, got {names}")
    rows = [(new, known.index(name)) for new, name in enumerate(wanted) if name in known]
    by_class = _class_dimensions(model)
    given, fitted = source.state_dict(), model.state_dict()
    for name in fitted.keys() & given.keys():
        if name in by_class:
            fitted[name] = _with_rows(fitted[name], given[name], by_class[name], rows)
        else:
            fitted[name] = given[name]
    model.load_state_dict(fitted)
    return FineTuneReport(
        copied=tuple(name for name in fitted if name in given and name not in by_class),
        remapped=tuple(name for name in fitted if name in given and name in by_class),
        fresh_classes=tuple(name for name in wanted if name not in known),
        dropped_classes=tuple(name for name in known if name not in wanted),
        missing=tuple(name for name in fitted if name not in given),
    )


def _names(classes: dict[str, list[dict[str, str]]]) -> list[str]:
    return [entry["name"] for entry in classes["classes"]]


def _check_same_architecture(config: SegmentorConfig, source: SegmentorConfig, directory: str | Path) -> None:
    # Through JSON, as the source's came: a tuple there is a list here.
    ours, theirs = (json.loads(json.dumps(c.to_dict())) for c in (config, source))
    differing = [
        f"{f.name}: {theirs[f.name]!r} there, {ours[f.name]!r} here"
        for f in fields(config)
        if f.name not in FREE and ours[f.name] != theirs[f.name]
    ]
    if differing:
        raise ValueError(f"{directory} is a segmentor of another architecture; {'; '.join(differing)}")


def _class_dimensions(model: Segmentor) -> dict[str, int]:
    """The weights that depend on the number of classes, with the dimension that does."""
    few, more = (_shapes(model, number) for number in (1, 2))
    return {
        name: next(dim for dim, (a, b) in enumerate(zip(shape, more[name], strict=True)) if a != b)
        for name, shape in few.items()
        if shape != more[name]
    }


def _shapes(model: Segmentor, num_classes: int) -> dict[str, torch.Size]:
    with torch.device("meta"):
        other = Segmentor(replace(model.config, num_classes=num_classes), model.backbone)
    return {name: tensor.shape for name, tensor in other.state_dict().items()}


def _with_rows(fresh: Tensor, given: Tensor, dim: int, rows: Sequence[tuple[int, int]]) -> Tensor:
    """`fresh` with the entries of the known classes, pairs of (here, there), taken from `given`."""
    filled = fresh.clone()
    for new, old in rows:
        filled.select(dim, new).copy_(given.select(dim, old))
    return filled
