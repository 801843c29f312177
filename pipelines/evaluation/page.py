"""The page of an evaluation: classes, confusion matrix, calibration, corruptions, separation, worst images."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from pipelines.dataset import Dataset
from pipelines.evaluation.measures import CLEAN, Measured
from pipelines.pages import data_uri, render
from repsep_model.corruptions import SEVERITIES
from repsep_model.metrics import Reliability, scores_from_counts

NAMED_CLASSES = 40
"""With more the names of a confusion matrix would not be legible."""
UNJUDGED_SHOWN = 50
SHOWN_MEASURES = {
    "similarity": "cosine between locations (1: over-smooth)",
    "effective_rank": "effective rank",
    "class_margin": "cosine within minus between classes",
    "edge_contrast": "contrast at class edges",
}


def evaluation_page(
    dataset: Dataset,
    measured: Measured,
    results: Mapping[str, Any],
    reliability: Reliability | None,
    diagnostics: Mapping[str, Mapping[str, Any]],
    worst: Sequence[tuple[str, float, bytes]],
) -> str:
    """Self-contained HTML; `worst` are key, mIoU and picture."""
    names = dataset.class_names
    classes = [
        {"name": name, "color": colour, "iou": results["iou"][name], "boundary": results["boundary_iou"][name]}
        for name, colour in zip(names, dataset.colours, strict=True)
    ]
    return render(
        "evaluation.html",
        name=dataset.manifest["name"],
        results=results,
        classes=classes,
        confusion=_png(confusion_figure(measured.confusion[CLEAN], names)),
        calibration=_png(calibration_figure(reliability)) if reliability is not None else None,
        corruptions=_png(corruption_figure(measured.confusion, results["miou"]))
        if len(measured.confusion) > 1
        else None,
        separation=_png(separation_figure(diagnostics)) if diagnostics else None,
        unjudged=measured.unjudged[:UNJUDGED_SHOWN],
        worst=[{"key": key, "miou": miou, "picture": data_uri(picture, "jpeg")} for key, miou, picture in worst],
    )


def confusion_figure(counts_KK: Any, names: Sequence[str]) -> Figure:
    """Each row is a class of the labels, as shares of its pixels."""
    total = counts_KK.sum(axis=1, keepdims=True)
    shares = np.divide(counts_KK, total, out=np.full(counts_KK.shape, np.nan), where=total > 0)
    side = min(4 + 0.35 * len(names), 12)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label")
    if len(names) <= NAMED_CLASSES:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
    if len(names) <= 12:
        for (y, x), share in np.ndenumerate(shares):
            if share >= 0.005:
                axes.text(
                    x,
                    y,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if share > 0.5 else "0.2",
                )
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="share of the label's pixels")
    return figure


def calibration_figure(found: Reliability) -> Figure:
    """Accuracy over confidence, and how many pixels have it."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color="0.7", linestyle="--", label="perfectly calibrated")
    upper.plot(found.confidence, found.accuracy, "o-", color="#3567b7", label=f"model (ECE {found.ece:.3f})")
    upper.set(ylabel="share of pixels that are right", ylim=(0, 1), xlim=(0, 1))
    upper.legend(frameon=False, fontsize=8)
    lower.bar(
        found.edges[:-1], found.pixels / max(1, found.pixels.sum()), np.diff(found.edges), align="edge", color="0.7"
    )
    lower.set(xlabel="confidence", ylabel="pixels")
    return figure


def corruption_figure(confusion: Mapping[tuple[str, int], Any], clean: float) -> Figure:
    """mIoU over severity, a line for each corruption."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    lines: dict[str, dict[int, float]] = {}
    for (name, severity), counts in confusion.items():
        if (name, severity) != CLEAN:
            lines.setdefault(name, {})[severity] = miou_of(counts)
    for number, (name, values) in enumerate(lines.items()):
        style = ("-", "--", ":", "-.")[number // 10 % 4]
        axes.plot([0, *values], [clean, *values.values()], f"o{style}", markersize=3, label=name)
    axes.set(xlabel="severity (0: as it is)", ylabel="mIoU", ylim=(0, None), xticks=[0, *SEVERITIES])
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="center left", bbox_to_anchor=(1, 0.5))
    axes.grid(color="0.92")
    return figure


def separation_figure(diagnostics: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Each measure over the maps in forward order."""
    figure = Figure(figsize=(11, 5.5), layout="constrained")
    names = [name.removeprefix("block ").removeprefix("stage ") for name in diagnostics]
    for axes, (measure, heading) in zip(figure.subplots(2, 2).flatten(), SHOWN_MEASURES.items(), strict=True):
        axes.plot(range(len(names)), [row[measure] for row in diagnostics.values()], "o", color="#3567b7", markersize=4)
        axes.set_xticks(range(len(names)), names, fontsize=8 if len(names) < 24 else 5)
        axes.set_title(heading, fontsize=10)
        axes.grid(color="0.92")
    return figure


def miou_of(counts_KK: Any) -> float:
    """Of a confusion matrix."""
    return scores_from_counts(np.diag(counts_KK), counts_KK.sum(axis=0), counts_KK.sum(axis=1)).miou


def _png(figure: Figure) -> str:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=100)
    return data_uri(out.getvalue(), "png")
