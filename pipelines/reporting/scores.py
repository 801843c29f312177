"""What the evaluation measured, from its receipt and its files.

Shapes: K classes; counts are (images, K), a confusion matrix is (K, K) with labels in rows.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from numpy.typing import NDArray

from pipelines.evaluate import CALIBRATION, CONFUSION, DIAGNOSTICS, read_counts
from pipelines.evaluation.measures import CLEAN
from pipelines.evaluation.page import miou_of
from pipelines.reporting.facts import Row, rgb
from pipelines.stage import Receipt
from repsep_model.metrics import Reliability, reliability_from_counts
from repsep_model.robustness import retention

CONFUSED_SHOWN = 6
Confusions = dict[tuple[str, int], NDArray[np.int64]]


def class_scores(receipt: Receipt, names: list[str], colours: dict[str, list[int]]) -> list[Row]:
    """IoU and boundary IoU of each class with the pixels and images they come from, best first."""
    _, counts = read_counts(receipt)
    labelled, ious, boundary = counts["labelled"], receipt.results["iou"], receipt.results["boundary_iou"]
    rows = [
        {
            "name": name,
            "rgb": rgb(colours.get(name, (136, 136, 136))),
            "iou": ious[name],
            "boundary": boundary[name],
            "pixels": int(labelled[:, k].sum()),
            "images": int((labelled[:, k] > 0).sum()),
        }
        for k, name in enumerate(names)
    ]
    return sorted(rows, key=lambda row: -1.0 if row["iou"] is None else row["iou"], reverse=True)


def reliability_of(receipt: Receipt) -> Reliability:
    """The calibration curve."""
    bins = json.loads(receipt.folder.read(CALIBRATION))
    pixels, right = (np.array(bins[name], np.int64) for name in ("pixels", "right"))
    return reliability_from_counts(pixels, right, np.array(bins["confidence"], np.float64))


def mean_confidence(found: Reliability) -> tuple[float, float]:
    """Over all pixels: the mean confidence, and the share that is right."""
    filled = found.pixels > 0
    weights = found.pixels[filled] / max(1, found.pixels.sum())
    return float((weights * found.confidence[filled]).sum()), float((weights * found.accuracy[filled]).sum())


def confusions_of(receipt: Receipt) -> tuple[list[str], Confusions]:
    """The classes, and the matrix of the images as they are and of each corruption and severity.

    NOTE a receipt that was read again has its classes by name: the order of their ids is in the matrices alone.
    """
    with receipt.folder.open(CONFUSION) as handle:
        table = pq.read_table(handle)
    columns = [column for column in table.column_names if column.startswith("predicted ")]
    names = [column.split(" ", 2)[2] for column in columns]
    predicted = np.stack([table[column].to_numpy() for column in columns], 1)
    points = list(zip(table["corruption"].to_pylist(), table["severity"].to_pylist(), strict=True))
    found: Confusions = {}
    for point in dict.fromkeys(points):
        found[point] = predicted[[here == point for here in points]].astype(np.int64)
    return names, found


def most_confused(counts_KK: NDArray[np.int64], names: list[str]) -> list[Row]:
    """The pairs by which most pixels are lost: a label, what it is taken for, and how much of the label that is."""
    wrong = counts_KK.copy()
    np.fill_diagonal(wrong, 0)
    places = np.argsort(wrong, axis=None)[::-1][:CONFUSED_SHOWN]
    pairs = [divmod(int(place), len(names)) for place in places]
    return [
        {
            "label": names[i],
            "predicted": names[j],
            "pixels": int(wrong[i, j]),
            "share": float(wrong[i, j] / counts_KK[i].sum()),
        }
        for i, j in pairs
        if wrong[i, j]
    ]


def robustness(receipt: Receipt, confusions: Confusions) -> Row | None:
    """mIoU and what is kept of it for each corruption, worst first; None where it was not measured."""
    clean = receipt.results["miou"]
    mious = {point: miou_of(counts) for point, counts in confusions.items() if point != CLEAN}
    if not mious:
        return None
    kept = retention(clean if clean is not None else float("nan"), mious)
    severities = sorted({severity for _, severity in mious})
    rows = [
        {"name": name, "retention": number(share), "mious": [number(mious.get((name, s), np.nan)) for s in severities]}
        for name, share in kept.corruptions.items()
    ]
    return {
        "severities": severities,
        "clean": clean,
        "rows": sorted(rows, key=lambda row: np.inf if row["retention"] is None else row["retention"]),
        "categories": dict(sorted(receipt.results["retention_by_category"].items(), key=lambda item: item[1] or 0.0)),
        "overall": receipt.results["retention"],
    }


def diagnostics_of(receipt: Receipt) -> dict[str, dict[str, Any]]:
    """How separate each map is, in forward order; what could not be measured is NaN."""
    found = json.loads(receipt.folder.read(DIAGNOSTICS))
    return {name: {m: np.nan if v is None else v for m, v in row.items()} for name, row in found.items()}


def number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)
