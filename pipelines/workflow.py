"""The sequence of stages. There is no scheduler: what is done says so, so that resuming is running it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pipelines.config import Recipe
from pipelines.errors import UsageError
from pipelines.stage import Done, Receipt, WouldRunError, planning, resting_on
from pipelines.storage import absolute_uri, home


def workspace_of(recipe: Recipe) -> str:
    """Where the stages of a recipe write."""
    return absolute_uri(recipe.workspace) if recipe.workspace is not None else str(home() / "workspace")


def run_workflow(recipe: Recipe, name: str | None = None) -> Iterator[Receipt]:
    """Yields each stage's receipt as it is done: prepare, (sweep,) train, evaluate, register, (segment,) report.

    With a `sweep` section the train section of its `best.yaml` stands in for the recipe's. `name` is the recipe's, for
    the report.
    """
    from pipelines.evaluate import evaluate
    from pipelines.prepare import prepare
    from pipelines.register import register
    from pipelines.report import report
    from pipelines.segment import segment
    from pipelines.sweep import best_train, sweep
    from pipelines.train import train

    if recipe.evaluate.predictions is not None:
        raise UsageError(
            "evaluate.predictions judges masks, from which no model can be registered; leave it out of a workflow's "
            "recipe and run `repsep evaluate --set evaluate.predictions=...` by itself"
        )
    workspace = workspace_of(recipe)
    own: Done = {}
    done: list[Receipt] = []

    def did(stage: Callable[[], Any]) -> Receipt:
        with resting_on(own):
            receipt: Receipt = stage()
        done.append(receipt)
        return receipt

    yield did(lambda: prepare(workspace, recipe.prepare))
    if recipe.sweep is not None:
        swept = did(lambda: sweep(workspace, recipe))
        recipe = recipe.model_copy(update={"train": best_train(swept, recipe.train)})
        yield swept
    yield did(lambda: train(workspace, recipe))
    yield did(lambda: evaluate(workspace, recipe))
    yield did(lambda: register(workspace, recipe))
    if recipe.segment is not None:
        yield did(lambda: segment(workspace, recipe))
    yield did(lambda: report(workspace, recipe, done, name))


def plan_workflow(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yields (stage, what would happen and why) in order; nothing is run and nothing written into the workspace."""
    stages = ["prepare", "sweep", "train", "evaluate", "register", "segment", "report"]
    left = [stage for stage in stages if stage not in ("sweep", "segment") or getattr(recipe, stage) is not None]
    receipts = run_workflow(recipe)
    while left:
        stage = left.pop(0)
        try:
            with planning():
                receipt = next(receipts)
        except WouldRunError as would:
            yield stage, f"runs: {would.why}"
            for later in left:
                yield later, f"runs if what comes out of {stage} is new"
            return
        yield stage, f"cached: {receipt.uri}"


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
