"""One self-contained HTML page for a workflow: data, curves, results, overlays, the bulk run. No external request."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.figure import Figure

from pipelines import tracking
from pipelines.bulk.commits import Output
from pipelines.bulk.pictures import sample_pictures
from pipelines.bulk.plan import open_source
from pipelines.bulk.survey import survey_of
from pipelines.config import Recipe, Section, SegmentConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.evaluate import OVERLAYS
from pipelines.pages import data_uri, render
from pipelines.stage import Receipt, StageRun, run_stage
from pipelines.storage import Folder

PACKAGES = ("pipelines", "repsep_model")
Row = dict[str, Any]


class _NoSettings(Section):
    """The report has none."""


def report(workspace: str, recipe: Recipe, receipts: list[Receipt]) -> Receipt:
    """Write the page for these receipts; `segment` may be missing."""
    return run_stage(
        "report",
        workspace=workspace,
        config=_NoSettings(),
        inputs={receipt.stage: receipt.digest for receipt in receipts},
        packages=PACKAGES,
        body=lambda run: _write(run, recipe, receipts),
    )


def _write(run: StageRun, recipe: Recipe, receipts: list[Receipt]) -> None:
    results = {receipt.stage: receipt for receipt in receipts}
    dataset = open_dataset(results["prepare"].results["dataset"])
    bulk = results.get("segment")
    samples, failures = _bulk(bulk, recipe, dataset) if bulk is not None else ([], [])
    page = render(
        "report.html",
        name=dataset.manifest["name"],
        receipts=receipts,
        prepare=results["prepare"].results,
        train=results["train"].results,
        evaluate=results["evaluate"].results,
        register=results["register"].results,
        segment=bulk.results if bulk is not None else None,
        classes=_classes(dataset, results["evaluate"]),
        curves=_curves(recipe, results["train"].results["mlflow_run"]),
        overlays=_overlays(results["evaluate"].folder),
        samples=samples,
        failures=failures,
    )
    run.folder.write("index.html", page.encode())
    run.outputs = ["index.html"]
    run.results = {"page": run.folder.uri_of("index.html"), "overlays": len(samples)}


def _classes(dataset: Dataset, evaluation: Receipt) -> list[dict[str, Any]]:
    pixels = dataset.manifest["pixels"]
    total = max(1, sum(pixels))
    return [
        c | {"share": pixels[c["id"]] / total, "iou": evaluation.results["iou"][c["name"]]}
        for c in dataset.manifest["classes"]
    ]


def _curves(recipe: Recipe, run_id: str) -> str | None:
    loss = tracking.metric_history(recipe.tracking, run_id, "loss")
    miou = tracking.metric_history(recipe.tracking, run_id, "val/miou")
    if not loss and not miou:
        return None
    figure = Figure(figsize=(10, 3), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(*zip(*loss, strict=True)) if loss else None
    left.set(title="training loss", xlabel="step")
    right.plot(*zip(*miou, strict=True), marker="o") if miou else None
    right.set(title="mIoU on validation", xlabel="step", ylim=(0, None))
    for axes in (left, right):
        axes.grid(alpha=0.3)
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    return data_uri(out.getvalue(), "png")


def _overlays(evaluation: Folder) -> list[str]:
    return [data_uri(evaluation.read(e.key), "jpeg") for e in evaluation.list(f"{OVERLAYS}/")]


def _bulk(bulk: Receipt, recipe: Recipe, dataset: Dataset) -> tuple[list[Row], list[Row]]:
    """Overlays of a random sample of the images (the same on every call), and the first failures."""
    config, kind = recipe.segment or SegmentConfig(), bulk.results["input"]
    target, (source, _) = Folder(bulk.results["target"]), open_source(bulk.results["source"])
    found = survey_of(Output(target), kind)
    return sample_pictures(found, source, target, dataset.colours, kind=kind, config=config), found.failures
