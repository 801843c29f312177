"""What `prepare` finds in a source: classes and pairs, in the default layout or in that of a public data set."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipelines.config import PrepareConfig
from pipelines.errors import UsageError
from pipelines.label_maps import PASCAL_CONTEXT_60, LabelMap
from pipelines.native_layouts import NATIVE, NativeLayout, native_pairs
from pipelines.pairs import Pair, Reject, find_pairs
from pipelines.storage import Folder
from repsep_model.labels import IGNORE_INDEX, MAX_CLASSES

FOLDERS = "folders"


@dataclass(frozen=True)
class Contents:
    """The content of classes.json, pairs, and files that have no partner.

    `labels` turns the masks' ids into train ids, None where they are that already. `group_pattern` says what a holdout
    must not split.
    """

    classes_file: dict[str, Any]
    pairs: list[Pair]
    rejects: list[Reject]
    labels: LabelMap | None
    group_pattern: str | None

    @property
    def classes(self) -> list[dict[str, Any]]:
        classes: list[dict[str, Any]] = self.classes_file["classes"]
        return classes


def layout_part(keys: Sequence[str], config: PrepareConfig) -> set[str]:
    """The keys that the layout reads. Anything else in the source may change without a new dataset."""
    layout = _native(config)
    if layout is None:
        return {key for key in keys if key.startswith(("images/", "masks/")) or key == "classes.json"}
    return layout.part(keys)


def read_layout(source: Folder, keys: Sequence[str], config: PrepareConfig) -> Contents:
    """Raises UsageError where the source is not in the layout that `config` names."""
    layout = _native(config)
    if layout is None:
        classes_file = read_classes(source)
        return Contents(classes_file, *find_pairs(source.uri, keys, config), None, config.group_pattern)
    labels = layout.labels
    classes_file = {"name": labels.name, "ignore_index": IGNORE_INDEX, "classes": list(labels.classes)}
    pattern = config.group_pattern or layout.groups
    return Contents(classes_file, *native_pairs(source, keys, layout), labels, pattern)


def check_listing(source: Folder, keys: Sequence[str], config: PrepareConfig) -> None:
    """UsageError for a source that is in another layout than `config` names, or begins further down.

    A public data set that is taken for folders would lose every mask.
    """
    asked = _native(config)
    if asked is not None:
        if not asked.find(keys, asked.images):
            begins = asked.where_it_begins(keys)
            hint = f"; set prepare.source={source.uri_of(begins)}" if begins else ""
            raise UsageError(f"{source.uri} has no images of the layout {asked.described()}{hint}")
        if not asked.find(keys, asked.masks):
            raise UsageError(f"{source.uri} has no masks of the layout {asked.described()}{asked.origin_hint}")
    elif not any(key.startswith("masks/") for key in keys):
        for name, layout in NATIVE.items():
            if layout.find(keys, layout.images) and layout.find(keys, layout.masks):
                raise UsageError(f"{source.uri} looks like {layout.labels.name}: set prepare.layout={name}")


def read_classes(source: Folder) -> dict[str, Any]:
    """classes.json, checked: ids 0..K-1 in order, names, colours; the data's licence if it says one.

    Raises UsageError.
    """
    data = source.read_if_present("classes.json")
    if data is None:
        raise UsageError(
            f"{source.uri} has no classes.json; it lists the classes as [{{id, name, color: [r, g, b]}}, ...]"
        )
    uri = source.uri_of("classes.json")
    try:
        found = json.loads(data)
        classes: list[dict[str, Any]] = [
            {"id": int(c["id"]), "name": str(c["name"]), "color": [int(v) for v in c["color"]]}
            for c in found["classes"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{uri} cannot be understood: {type(error).__name__} {error}") from error
    if not classes or len(classes) > MAX_CLASSES:
        raise UsageError(f"{uri} has {len(classes)} classes; 1 to {MAX_CLASSES} are possible")
    if [c["id"] for c in classes] != list(range(len(classes))):
        raise UsageError(f"{uri}: ids must be 0 to {len(classes) - 1} in order; 255 is what is ignored")
    if any(len(c["color"]) != 3 or not all(0 <= v <= 255 for v in c["color"]) for c in classes):
        raise UsageError(f"{uri}: every colour needs three values in 0..255")
    names = [c["name"] for c in classes]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"{uri}: two classes are called {twice[0]!r}; results go by name, rename one")
    name = str(found.get("name") or posixpath.basename(source.uri))
    licence = {"licence": str(found["licence"])} if found.get("licence") else {}
    return {"name": name, "ignore_index": IGNORE_INDEX, "classes": classes} | licence


def _native(config: PrepareConfig) -> NativeLayout | None:
    """The native layout that is asked for, None for folders."""
    if config.layout == FOLDERS:
        return None
    layout = NATIVE[config.layout]
    return replace(layout, labels=PASCAL_CONTEXT_60) if config.background else layout
