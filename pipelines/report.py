"""What came of a workflow, for people: one self-contained page, and the model card from the same figures.

index.html      the page; no external request
model_card.md   also the description of the registered version, and an artifact of the run that trained it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pipelines import tracking, unsent
from pipelines.config import Recipe, Section
from pipelines.dataset import open_dataset
from pipelines.errors import RepsepError, UsageError
from pipelines.pages import render
from pipelines.progress import say
from pipelines.reporting.card import description_of, model_card
from pipelines.reporting.facts import Row
from pipelines.reporting.gather import gather
from pipelines.stage import Receipt, StageRun, latest_if_any, run_stage

PACKAGES = ("pipelines", "repsep_model")
PAGE, CARD = "index.html", "model_card.md"
TOLD = ("prepare", "sweep", "train", "evaluate", "register", "segment")


class _NoSettings(Section):
    """The report has none."""


def report(workspace: str, recipe: Recipe, receipts: Sequence[Receipt], name: str | None = None) -> Receipt:
    """Write page and card for these receipts; a stage that is not among them is said to be absent.

    `name` is what the recipe's file is called; another one makes no other report.
    """
    receipt = run_stage(
        "report",
        workspace=workspace,
        config=_NoSettings(),
        inputs={receipt.stage: receipt.digest for receipt in receipts},
        packages=PACKAGES,
        body=lambda run: _write(run, recipe, receipts, name),
    )
    for done in (*receipts, receipt) if receipt.cached else receipts:
        unsent.send(recipe.tracking, done)
    return receipt


def latest_receipts(workspace: str) -> list[Receipt]:
    """What the workspace holds of each stage, for a report of stages that were run one by one.

    Of two that do not belong together, such as an evaluation and a model that was trained after it, the older is left
    out; a bulk run may be of any model, the page says of which. Raises UsageError where no stage has finished.
    """
    found = {stage: receipt for stage in TOLD if (receipt := latest_if_any(workspace, stage)) is not None}
    if not found:
        raise UsageError(f"no stage has finished in {workspace}: there is nothing to report; run `repsep workflow`")
    if "evaluate" in found and found["evaluate"].results.get("predictions") is not None:
        _leave_out(found, "evaluate", "it judged masks and no model")
    data = open_dataset(found["prepare"].results["dataset"]).digest if "prepare" in found else None
    belongs: tuple[tuple[str, str, Callable[[Receipt, Receipt], bool]], ...] = (
        ("prepare", "sweep", lambda _, sweep: sweep.inputs["dataset"] == data),
        ("prepare", "train", lambda _, train: train.inputs["dataset"] == data),
        ("prepare", "evaluate", lambda _, judged: judged.inputs["train"] == data),
        ("train", "evaluate", lambda train, judged: judged.results["model"] == train.results["model"]),
    )
    for first, then, does in belongs:
        if first in found and then in found and not does(found[first], found[then]):
            older, newer = sorted((first, then), key=lambda stage: found[stage].finished_at)
            _leave_out(found, older, f"the latest {newer} is newer and does not belong to it")
    judged = found["evaluate"].digest if "evaluate" in found else None
    if "register" in found and found["register"].inputs["evaluation"] != judged:
        _leave_out(found, "register", "it was for another evaluation")
    return list(found.values())


def _leave_out(found: dict[str, Receipt], stage: str, why: str) -> None:
    say(f"report: the latest {stage} is left out: {why}")
    del found[stage]


def _write(run: StageRun, recipe: Recipe, receipts: Sequence[Receipt], name: str | None) -> None:
    facts = gather(recipe, receipts, name) | {"card": run.folder.uri_of(CARD)}
    card = model_card(facts)
    run.folder.write(PAGE, render("report.html", **facts).encode())
    run.folder.write(CARD, card.encode())
    run.outputs = [PAGE, CARD]
    bulk = facts["bulk"]
    run.results = {
        "page": run.folder.uri_of(PAGE),
        "card": run.folder.uri_of(CARD),
        "overlays": len(bulk["pictures"]) if bulk else 0,
    }
    if facts["gate"] is not None:
        _describe_version(run, recipe, facts["gate"], card)


def _describe_version(run: StageRun, recipe: Recipe, gate: Row, card: str) -> None:
    """The card with the registered version. While MLflow is away it is kept for it."""
    artifact = f"card/{gate['name']}-{gate['version']}.md"
    text = description_of(card, artifact, tracking.DESCRIPTION_LIMIT)
    try:
        logger = tracking.RunLogger(tracking.tracking_uri(recipe.tracking), gate["mlflow_run"])
        logger.text(card, artifact)
        tracking.describe_version(recipe.tracking, gate["name"], gate["version"], text)
    except RepsepError as error:
        described = (gate["name"], gate["version"], text)
        unsent.keep(run.folder, gate["mlflow_run"], files={artifact: card.encode()}, described=described)
        say(f"report: warning: the model card is not in MLflow, it is kept for it: {error}")
