"""All that page and card say, in one mapping; a stage that did not run is None."""

from __future__ import annotations

import io
import shlex
from collections.abc import Sequence
from datetime import UTC, datetime

from PIL import Image

from pipelines.bulk.page import duration
from pipelines.config import Recipe, SegmentConfig
from pipelines.dataset import Dataset, open_dataset
from pipelines.evaluate import OVERLAYS
from pipelines.evaluation.measures import CLEAN
from pipelines.evaluation.page import calibration_figure, confusion_figure, separation_figure
from pipelines.pages import data_uri
from pipelines.reporting.bulk_run import bulk_facts
from pipelines.reporting.facts import Row, curves_of, data_facts, gate_facts, provenance, sweep_facts, train_facts
from pipelines.reporting.figures import svg, training_figures
from pipelines.reporting.scores import (
    class_scores,
    confusions_of,
    diagnostics_of,
    mean_confidence,
    most_confused,
    reliability_of,
    robustness,
)
from pipelines.stage import Receipt

WORST, PICTURES, PICTURE_WIDTH = 6, 4, 1200
SECTIONS = (
    ("data", "Data"),
    ("sweep", "Sweep"),
    ("training", "Training"),
    ("evaluation", "Evaluation"),
    ("robustness", "Corrupted images"),
    ("separation", "Separation"),
    ("gate", "Promotion"),
    ("bulk", "Bulk segmentation"),
    ("provenance", "How it was made"),
)


def gather(recipe: Recipe, receipts: Sequence[Receipt], name: str | None) -> Row:
    """What report.html and model_card.md ask for."""
    done = {receipt.stage: receipt for receipt in receipts}
    dataset = open_dataset(done["prepare"].results["dataset"]) if "prepare" in done else None
    data = data_facts(done["prepare"], dataset) if dataset is not None else None
    train = train_facts(done["train"]) if "train" in done else None
    if train is not None:
        train["figures"] = training_figures(curves_of(recipe.tracking, train["mlflow_run"]))
    evaluation = _evaluation(done["evaluate"], dataset) if "evaluate" in done else None
    gate = gate_facts(done["register"]) if "register" in done else None
    bulk = bulk_facts(done["segment"], recipe.segment or SegmentConfig()) if "segment" in done else None
    made = provenance(receipts)
    latest = max((receipt.finished_at for receipt in receipts), default=0.0)
    return {
        "recipe": name,
        "when": f"{datetime.fromtimestamp(latest, UTC):%Y-%m-%d %H:%M} UTC",
        "title": " with ".join(part for part in (data and data["name"], train and train["backbone"]) if part)
        or "report",
        "model": f"{gate['name']} version {gate['version']}" if gate else train["backbone"] if train else "no model",
        "registered": shlex.quote(f"models:/{gate['name']}/{gate['version']}") if gate else None,
        "sections": SECTIONS,
        "glance": _glance(data, train, evaluation, bulk),
        "data": data,
        "classes": (data or evaluation or {"classes": []})["classes"],
        "sweep": sweep_facts(done["sweep"]) if "sweep" in done else None,
        "train": train,
        "train_time": duration(train["train_seconds"]) if train else None,
        "evaluation": evaluation,
        "gate": gate,
        "bulk": bulk,
        "made": made | {"time": duration(made["seconds"])},
    }


def _evaluation(receipt: Receipt, dataset: Dataset | None) -> Row:
    results = receipt.results
    colours = dict(zip(dataset.class_names, dataset.colours, strict=True)) if dataset is not None else {}
    names, confusions = confusions_of(receipt)
    reliability, diagnostics = reliability_of(receipt), diagnostics_of(receipt)
    confidence, right = mean_confidence(reliability)
    worst = [
        {"key": each["key"], "miou": each["miou"], "picture": _smaller(receipt.folder.read(each["picture"]))}
        for each in results["worst"][:WORST]
    ]
    overlays = [entry.key for entry in receipt.folder.list(f"{OVERLAYS}/")][:PICTURES]
    return {
        "results": results,
        "classes": class_scores(receipt, names, colours),
        "confused": most_confused(confusions[CLEAN], names),
        "confusion": svg(lambda: confusion_figure(confusions[CLEAN], names)),
        "confidence": confidence,
        "right": right,
        "calibration": svg(lambda: calibration_figure(reliability)),
        "robustness": robustness(receipt, confusions),
        "separation": svg(lambda: separation_figure(diagnostics)) if diagnostics else None,
        "worst": worst,
        "overlays": [_smaller(receipt.folder.read(key)) for key in overlays],
    }


def _glance(data: Row | None, train: Row | None, evaluation: Row | None, bulk: Row | None) -> list[Row]:
    """The few figures that a reader looks for first."""
    found: list[tuple[str, str, bool]] = []
    if evaluation is not None:
        r, robust = evaluation["results"], evaluation["robustness"]
        found.append((_decimals(r["miou"]), f"mIoU on {r['split']} ({r['images']:,} images)", False))
        found.append((_decimals(r["prior_miou"]), "mIoU of the prior, which reads no image", False))
        found.append((_decimals(r["ece"]), "calibration error (ECE)", False))
        if robust is not None:
            kept = "none" if robust["overall"] is None else f"{robust['overall']:.0%}"
            found.append((kept, "of the mIoU left on corrupted images", False))
    if data is not None:
        found.append((f"{sum(s['images'] for s in data['splits']):,}", "labelled images", False))
    if train is not None:
        found.append((f"{train['parameters_millions']:,} M", "parameters", False))
    if bulk is not None:
        found.append((f"{bulk['totals'].ok:,}", "images segmented in bulk", False))
        if bulk["failed_rows"]:
            found.append((f"{bulk['failed_rows']:,}", "images failed there", True))
    return [{"value": value, "label": label, "bad": bad} for value, label, bad in found]


def _decimals(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _smaller(picture: bytes) -> str:
    """A JPEG of a width that a page needs."""
    image = Image.open(io.BytesIO(picture))
    if image.width > PICTURE_WIDTH:
        image.thumbnail((PICTURE_WIDTH, PICTURE_WIDTH))
        out = io.BytesIO()
        image.save(out, "JPEG", quality=85)
        picture = out.getvalue()
    return data_uri(picture, "jpeg")
