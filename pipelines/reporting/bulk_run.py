"""What a bulk run did, from its receipt, report.json and results."""

from __future__ import annotations

import json

from pipelines.bulk.commits import CLASSES, Output
from pipelines.bulk.page import class_areas, duration, rate_bars
from pipelines.bulk.pictures import sample_pictures
from pipelines.bulk.plan import open_source
from pipelines.bulk.survey import survey_of
from pipelines.config import SegmentConfig
from pipelines.reporting.facts import Row
from pipelines.stage import Receipt
from pipelines.storage import Folder


def bulk_facts(receipt: Receipt, config: SegmentConfig) -> Row:
    """Counts, rates, failures by reason, class areas, and overlays of a random sample (the same on every call)."""
    results, target = receipt.results, Folder(receipt.results["target"])
    output, (source, _) = Output(target), open_source(results["source"])
    found, totals = survey_of(output, results["input"]), output.totals()
    classes = sorted(json.loads(target.read(CLASSES))["classes"], key=lambda each: each["id"])
    colours = [each["color"] for each in classes]
    pictures = sample_pictures(found, source, target, colours, kind=results["input"], config=config)
    return dict(results) | {
        "duration": duration(results["seconds"]),
        "bars": rate_bars(results["rates"]),
        "reasons": found.reasons,
        "areas": class_areas(classes, totals),
        "pictures": pictures,
        "totals": totals,
    }
