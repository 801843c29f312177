"""What came of a workflow, for people: one self-contained page, and the model card from the same figures.

index.html      the page; no external request
model_card.md   also the description of the registered version, and an artifact of the run that trained it
"""

from __future__ import annotations

from collections.abc import Sequence

from pipelines import tracking
from pipelines.config import Recipe, Section
from pipelines.errors import RepsepError
from pipelines.pages import render
from pipelines.progress import say
from pipelines.reporting.card import description_of, model_card
from pipelines.reporting.facts import Row
from pipelines.reporting.gather import gather
from pipelines.stage import Receipt, StageRun, run_stage

PACKAGES = ("pipelines", "repsep_model")
PAGE, CARD = "index.html", "model_card.md"


class _NoSettings(Section):
    """The report has none."""


def report(workspace: str, recipe: Recipe, receipts: Sequence[Receipt], name: str | None = None) -> Receipt:
    """Write page and card for these receipts; a stage that is not among them is said to be absent.

    `name` is what the recipe's file is called; another one makes no other report.
    """
    return run_stage(
        "report",
        workspace=workspace,
        config=_NoSettings(),
        inputs={receipt.stage: receipt.digest for receipt in receipts},
        packages=PACKAGES,
        body=lambda run: _write(run, recipe, receipts, name),
    )


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
        _describe_version(recipe, facts["gate"], card)


def _describe_version(recipe: Recipe, gate: Row, card: str) -> None:
    """The card with the registered version. That MLflow is away is only said: the card lies beside the page."""
    artifact = f"card/{gate['name']}-{gate['version']}.md"
    try:
        logger = tracking.RunLogger(tracking.tracking_uri(recipe.tracking), gate["mlflow_run"])
        logger.text(card, artifact)
        text = description_of(card, artifact, tracking.DESCRIPTION_LIMIT)
        tracking.describe_version(recipe.tracking, gate["name"], gate["version"], text)
    except RepsepError as error:
        say(f"report: warning: the model card is not in MLflow: {error}")
