"""The registered versions of a model: listed, compared, promoted and rolled back by hand."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pipelines import tracking
from pipelines.config import Recipe
from pipelines.errors import RepsepError, UsageError
from pipelines.evaluate import PER_IMAGE, Counts, read_counts
from pipelines.gate import Decision, compare
from pipelines.models import fetch_model
from pipelines.register import CHALLENGER, CHAMPION, EVALUATION_FILES
from pipelines.stage import receipt_at
from repsep_model.checkpoint import load_classes


@dataclass(frozen=True)
class Version:
    """A version, the aliases that point to it, its mIoU where it was evaluated, and what the gate said."""

    version: str
    aliases: tuple[str, ...]
    miou: float | None
    reason: str
    replaced: str
    evaluation: str


def versions(recipe: Recipe) -> list[Version]:
    """All versions, newest first. Raises RepsepError where there is none."""
    name, uri = recipe.register_.name, tracking.tracking_uri(recipe.tracking)
    found = tracking.model_versions(recipe.tracking, name)
    if not found:
        raise RepsepError(f"MLflow at {tracking.shown(uri)} has no version of {name!r}; run `repsep register` first")
    with tracking.answering(uri):
        aliases = tracking.client_for(uri).get_registered_model(name).aliases
    return [
        Version(
            str(v.version),
            tuple(sorted(alias for alias, version in aliases.items() if str(version) == str(v.version))),
            float(v.tags["repsep.miou"]) if "repsep.miou" in v.tags else None,
            v.tags.get("repsep.reason", ""),
            v.tags.get("repsep.replaced", ""),
            v.tags.get("repsep.evaluation_uri", ""),
        )
        for v in found
    ]


def compare_versions(recipe: Recipe, first: str, second: str) -> Decision:
    """The gate between two versions, on the evaluations that they were registered with; moves nothing.

    Raises UsageError where these are of other images or were made in another way.
    """
    (ours, keys, counts), (theirs, other_keys, other_counts) = (_evaluation(recipe, v) for v in (first, second))
    for key in ("evaluation", "pixel_budget", "scales", "flip"):
        if ours[key] != theirs[key]:
            raise UsageError(
                f"versions {first} and {second} were evaluated differently ({key}: {ours[key]}, {theirs[key]}); "
                f"evaluate one of them again: --set evaluate.model=models:/{recipe.register_.name}/{second}"
            )
    if keys != other_keys:
        raise UsageError(f"versions {first} and {second} were evaluated on different images")
    return compare(counts, other_counts, list(ours["iou"]), recipe.register_)


def promote(recipe: Recipe, version: str, why: str) -> None:
    """Make a version champion whatever the gate said; the reason is kept as a tag. Raises RepsepError."""
    name, uri = recipe.register_.name, tracking.tracking_uri(recipe.tracking)
    known = {found.version: found for found in versions(recipe)}
    if version not in known:
        raise UsageError(f"there is no version {version} of {name!r}; there are {', '.join(known)}")
    with fetch_model(f"models:/{name}/{version}", recipe.tracking) as model:
        load_classes(model.directory)  # an alias that points to what cannot be read would stop every job
    before = next((found.version for found in known.values() if CHAMPION in found.aliases), "")
    with tracking.answering(uri):
        client = tracking.client_for(uri)
        tags = {"repsep.reason": f"by hand: {why}"} | ({"repsep.replaced": before} if before != version else {})
        for tag, value in tags.items():
            client.set_model_version_tag(name, version, tag, value)
    tracking.point_alias(recipe.tracking, name, CHAMPION, version, instead_of=CHALLENGER)


def roll_back(recipe: Recipe) -> str:
    """Make the version champion that the champion replaced; returns it. Raises UsageError where it replaced none."""
    known = versions(recipe)
    champion = next((found for found in known if CHAMPION in found.aliases), None)
    if champion is None:
        raise UsageError(f"{recipe.register_.name!r} has no champion")
    if not champion.replaced:
        raise UsageError(f"the champion, version {champion.version}, replaced no other: promote one by its number")
    name, uri = recipe.register_.name, tracking.tracking_uri(recipe.tracking)
    # What it goes back to keeps what it had replaced, so that one can go back further.
    previous = next((found for found in known if found.version == champion.replaced), None)
    if previous is None:
        raise UsageError(f"version {champion.replaced}, which the champion replaced, was deleted")
    with tracking.answering(uri):
        client = tracking.client_for(uri)
        client.set_model_version_tag(name, previous.version, "repsep.reason", f"rolled back from {champion.version}")
    tracking.point_alias(recipe.tracking, name, CHAMPION, previous.version, instead_of=CHALLENGER)
    return previous.version


def _evaluation(recipe: Recipe, version: str) -> tuple[dict[str, Any], list[str], Counts]:
    """Results, keys and counts of the version's evaluation: from the workspace, or as kept with the version."""
    name = recipe.register_.name
    found = tracking.registered_version(recipe.tracking, name, version=version)
    place = found.tags.get("repsep.evaluation_uri", "")
    receipt = receipt_at(place) if place else None
    if receipt is not None and receipt.folder.size_of(PER_IMAGE) is not None:
        return receipt.results, *read_counts(receipt)
    with tempfile.TemporaryDirectory() as kept:
        try:
            for file in EVALUATION_FILES:
                path = f"evaluation/{name}-{version}/{file}"
                (Path(kept) / file).write_bytes(tracking.read_artifact(recipe.tracking, str(found.run_id), path))
        except RepsepError as error:
            raise RepsepError(
                f"the evaluation of {name} version {version} is gone ({place or 'no tag'}), and {error}; "
                f"evaluate it again: --set evaluate.model=models:/{name}/{version}, then `repsep register`"
            ) from None
        receipt = receipt_at(kept)
        assert receipt is not None
        return receipt.results, *read_counts(replace(receipt, uri=kept))
