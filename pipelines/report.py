"""One self-contained HTML page for a workflow: data, curves, results, overlays, the bulk run. No external request."""

from __future__ import annotations

import base64
import io
import random
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.figure import Figure
from PIL import Image

from pipelines import tracking
from pipelines.commits import OK, Output
from pipelines.config import Recipe, Section
from pipelines.dataset import Dataset, open_dataset
from pipelines.errors import StorageError
from pipelines.evaluate import OVERLAYS
from pipelines.stage import Receipt, StageRun, run_stage
from pipelines.storage import Folder
from repsep_model.images import ImageError, decode_image, decode_mask, overlay

PACKAGES = ("pipelines", "repsep_model")
TEMPLATES = Path(__file__).parent / "templates"
SAMPLES, FAILURES_SHOWN, SAMPLE_WIDTH = 12, 20, 480


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
    samples, failures = _bulk_samples(bulk, dataset) if bulk is not None else ([], [])
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, undefined=jinja2.StrictUndefined
    )
    page = environment.get_template("report.html").render(
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
    return _data_uri(out.getvalue(), "png")


def _overlays(evaluation: Folder) -> list[str]:
    return [_data_uri(evaluation.read(e.key), "jpeg") for e in evaluation.list(f"{OVERLAYS}/")]


def _bulk_samples(bulk: Receipt, dataset: Dataset) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Overlays of a random sample of the images (the same on every call), and the first failures."""
    target = Folder(bulk.results["target"])
    table = Output(target).results().select(["key", "uri", "status", "stage", "error", "confidence", "mask_uri"])
    rows = table.to_pylist()
    good = [row for row in rows if row["status"] == OK]
    chosen = random.Random(0).sample(good, min(SAMPLES, len(good)))
    source = Folder(bulk.results["source"])
    samples = []
    for row in sorted(chosen, key=lambda r: r["key"]):
        try:
            image = decode_image(source.read(row["key"]))
            ids = decode_mask(target.read(row["mask_uri"].removeprefix(target.uri + "/")))
        except (StorageError, ImageError):
            continue  # the image may be gone by now; the page is only a look
        picture = Image.fromarray(overlay(image, ids, dataset.colours))
        picture.thumbnail((SAMPLE_WIDTH, SAMPLE_WIDTH))
        out = io.BytesIO()
        picture.save(out, "JPEG", quality=85)
        samples.append(
            {"key": row["key"], "confidence": row["confidence"], "picture": _data_uri(out.getvalue(), "jpeg")}
        )
    return samples, [row for row in rows if row["status"] != OK][:FAILURES_SHOWN]


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
