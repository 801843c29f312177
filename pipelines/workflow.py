"""The sequence of stages. There is no scheduler: what is done says so, so that resuming is running it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipelines.config import Recipe, Section
from pipelines.dataset import open_dataset
from pipelines.errors import StoppedError
from pipelines.progress import say
from pipelines.stage import Done, Receipt, WouldRunError, changed_settings, is_planning, planning, resting_on
from pipelines.storage import absolute_uri, home


def workspace_of(recipe: Recipe) -> str:
    """Where the stages of a recipe write."""
    return absolute_uri(recipe.workspace) if recipe.workspace is not None else str(home() / "workspace")


def run_workflow(recipe: Recipe, name: str | None = None) -> Iterator[Receipt]:
    """Yields each stage's receipt as it is done: prepare, (sweep,) train, evaluate, register, (segment,) report.

    With a `sweep` section the train section of its `best.yaml` stands in for the recipe's. `name` is the recipe's, for
    the report. What can be known to fail later is raised before a model is trained (preflight.py); where the bulk run
    fails, the report of the others comes first.
    """
    from pipelines.evaluate import evaluate
    from pipelines.preflight import check_champion, check_dataset, check_recipe
    from pipelines.prepare import prepare
    from pipelines.register import register
    from pipelines.report import report
    from pipelines.segment import segment
    from pipelines.sweep import best_train, sweep
    from pipelines.train import train

    check_recipe(recipe)
    workspace = workspace_of(recipe)
    own: Done = {}
    done: list[Receipt] = []

    def did(stage: Callable[[], Any]) -> Receipt:
        with resting_on(own):
            receipt: Receipt = stage()
        done.append(receipt)
        return receipt

    prepared = did(lambda: prepare(workspace, recipe.prepare))
    yield prepared
    dataset = open_dataset(recipe.evaluate.dataset or prepared.results["dataset"])
    check_dataset(recipe, dataset)

    def before() -> None:
        check_champion(recipe, dataset)

    if recipe.sweep is not None:
        swept = did(lambda: sweep(workspace, recipe, before))
        recipe = recipe.model_copy(update={"train": best_train(swept, recipe.train)})
        yield swept
    yield did(lambda: train(workspace, recipe, before))
    yield did(lambda: evaluate(workspace, recipe))
    yield did(lambda: register(workspace, recipe))
    failed: Exception | None = None
    if recipe.segment is not None:
        try:
            bulk = did(lambda: segment(workspace, recipe))
        except Exception as error:
            if is_planning() or isinstance(error, StoppedError):
                raise
            failed = error
            say(
                "workflow: the bulk run failed; the report is of what was done before it. Mend what the error at the "
                "end says (an output of another model: another segment.target, or segment.overwrite=true to replace "
                "it) and run the same command again"
            )
        else:
            yield bulk
    try:
        made = did(lambda: report(workspace, recipe, done, name))
    except Exception as error:
        if failed is None:
            raise
        say(f"workflow: warning: there is no report: {error}")
    else:
        yield made
    if failed is not None:
        raise failed


def plan_workflow(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields (stage, what would happen and why) in order; nothing is run and nothing written into the workspace."""
    stages = ["prepare", "sweep", "train", "evaluate", "register", "segment", "report"]
    left = [stage for stage in stages if stage not in ("sweep", "segment") or getattr(recipe, stage) is not None]
    sections = _sections(recipe)
    receipts = run_workflow(recipe)
    while left:
        stage = left.pop(0)
        try:
            with planning():
                receipt = next(receipts)
        except WouldRunError as would:
            yield stage, f"runs: {would.why}"
            for later in left:
                own = changed_settings(workspace_of(recipe), later, sections[later]) if later in sections else []
                told = f"; changed since its latest run: {'; '.join(own)}" if own else ""
                yield later, f"runs if what comes out of {stage} is new{told}"
            return
        yield stage, f"cached: {receipt.uri}"


def _sections(recipe: Recipe) -> dict[str, Section]:
    """The section of each stage as its receipt keeps it; of train only where no sweep decides it."""
    from pipelines.evaluate import BY_DIGEST
    from pipelines.segment import THIS_RUN_ONLY
    from pipelines.sweep import fixed_settings

    sections: dict[str, Section] = {
        "evaluate": recipe.evaluate.model_copy(update=BY_DIGEST),
        "register": recipe.register_,
        **({"train": recipe.train} if recipe.sweep is None else {"sweep": fixed_settings(recipe)}),
    }
    return sections | ({"segment": recipe.segment.model_copy(update=THIS_RUN_ONLY)} if recipe.segment else {})


def describe(receipt: Receipt) -> list[str]:
    """What a stage made and where, for a person."""
    r = receipt.results
    state = "cached" if receipt.cached else f"done in {receipt.seconds:.1f} s"
    told = {
        "prepare": lambda: (
            f"{', '.join(f'{n} {s}' for s, n in r['images'].items())} images, "
            f"{r['classes']} classes, {r['rejected']} rejected, {len(r['warnings'])} warnings"
        ),
        "train": lambda: (
            f"{r['steps']} steps, mIoU {r['miou']:.4f} in the loop at step {r['best_step']}, "
            f"{r['images_per_s']} images/s"
        ),
        "sweep": lambda: f"{r['trials']} trials, best mIoU {r['best_miou']:.4f} ({r['best']})",
        "evaluate": lambda: (
            f"mIoU {r['miou']:.4f} on {r['split']} ({r['images']} images{_unjudged(r)}); "
            f"per-position prior {r['prior_miou']:.4f}"
        ),
        "register": lambda: f"{r['name']} version {r['version']} is {r['alias']}: {r['reason']}",
        "segment": lambda: (
            f"{r['rows']} rows, {r['failed_rows']} failed; this run {r['ok']} ok, {r['failed']} failed, "
            f"{r['images_per_s']} images/s"
        ),
        "report": lambda: f"a page with {r['overlays']} overlays of the bulk run; the model card is beside it",
    }
    where = {
        "prepare": "dataset",
        "train": "model",
        "sweep": "table",
        "evaluate": None,
        "register": "model",
        "segment": "target",
        "report": "page",
    }
    key = where[receipt.stage]
    return [f"{receipt.stage:9} {state}: {told[receipt.stage]()}", f"{'':9} -> {r[key] if key else receipt.uri}"]


def _unjudged(results: Mapping[str, Any]) -> str:
    return "".join(f", {count} {kind}" for kind, count in results["unjudged"].items())
