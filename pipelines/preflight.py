"""What would end a workflow hours later, found before it trains. All of it is cheap.

What cannot be known yet is left to the stages: whether the new model becomes champion, and so which model the bulk run
takes.
"""

from __future__ import annotations

from pipelines import tracking
from pipelines.config import Recipe
from pipelines.dataset import Dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.gate import absolute_checks
from pipelines.models import fetch_model, load_files
from pipelines.progress import say
from pipelines.register import CHAMPION
from pipelines.segment import check_ends, owner


def check_recipe(recipe: Recipe) -> None:
    """Before anything runs. Raises UsageError, or StorageError for a bulk source that cannot be listed."""
    if recipe.evaluate.predictions is not None:
        raise UsageError(
            "evaluate.predictions judges masks, from which no model can be registered; leave it out of a workflow's "
            "recipe and run `repsep evaluate --set evaluate.predictions=...` by itself"
        )
    _check_gate(recipe, list(recipe.register_.class_floors))
    if recipe.segment is not None:
        check_ends(recipe.segment)


def check_dataset(recipe: Recipe, dataset: Dataset) -> None:
    """When the data are there: the classes and the split that later stages ask for. Raises UsageError."""
    dataset.split(recipe.evaluate.split)
    _check_gate(recipe, dataset.class_names)


def check_champion(recipe: Recipe, dataset: Dataset) -> None:
    """Before a model is searched or trained: what it will be compared with. Raises RepsepError, also for MLflow away.

    Says where a promotion will not go with the bulk run's target.
    """
    name = recipe.register_.name
    champion = tracking.aliased_version(recipe.tracking, name, CHAMPION)
    if champion is not None:
        uri = f"models:/{name}/{champion.version}"
        with fetch_model(uri, recipe.tracking) as model:
            classes = [c["name"] for c in model.classes["classes"]]
            if classes != dataset.class_names:
                raise UsageError(
                    f"the champion {uri} has other classes ({', '.join(classes)}) than the dataset "
                    f"({', '.join(dataset.class_names)}), so that no model of these data can be compared with it; "
                    "register it under another name: --set register.name=..."
                )
            try:
                load_files(model.files())
            except RepsepError as error:
                raise RepsepError(
                    f"the champion {uri}: {error}; make another version champion: `repsep models rollback`, "
                    "`repsep models promote`"
                ) from error
    bulk = recipe.segment
    if bulk is not None and bulk.model is None and not bulk.overwrite and owner(bulk) is not None:
        say(
            f"workflow: warning: {bulk.target} holds the masks of a model; if another becomes champion, segment will "
            "end there: for a new prefix set segment.target, to replace them segment.overwrite=true"
        )


def _check_gate(recipe: Recipe, classes: list[str]) -> None:
    """Asks the gate of figures that any evaluation would have."""
    kept = None if recipe.evaluate.corruptions == "none" else 1.0
    absolute_checks({"iou": dict.fromkeys(classes), "retention": kept}, recipe.register_)
