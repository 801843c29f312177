"""The page of a bulk output: what was done and how fast, what failed and why, what the masks hold, how they look.

report.html stands beside report.json and needs nothing else: no request, no script.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from pipelines.bulk.commits import PAGE, Output, Totals
from pipelines.bulk.pictures import sample_pictures
from pipelines.bulk.survey import Kind, survey_of
from pipelines.config import SegmentConfig
from pipelines.pages import render
from pipelines.storage import Folder

RATES = {
    "reader": "reading and decoding alone",
    "model": "model alone",
    "writer": "encoding and writing alone",
    "end_to_end": "end to end",
}
Row = dict[str, Any]


def write_page(
    output: Output, source: Folder, report: Mapping[str, Any], classes: Mapping[str, Any], config: SegmentConfig
) -> None:
    """Write report.html from the output's current results and the figures of report.json.

    `source` is the folder that the keys of the results are relative to. Raises StorageError.
    """
    kind: Kind = report["input"]
    found, totals = survey_of(output, kind), output.totals()
    names = sorted(classes["classes"], key=lambda c: c["id"])
    page = render(
        "segment.html",
        report=report,
        kind=kind,
        left=_left(report),
        duration=duration(report["seconds"]),
        rates=rate_bars(report["rates"]),
        found=found,
        totals=totals,
        classes=class_areas(names, totals),
        histogram=[(count, f"{count:,}" if count < 10_000 else f"{count / 1000:.0f}k") for count in found.histogram],
        pictures=sample_pictures(found, source, output.folder, [c["color"] for c in names], kind=kind, config=config),
    )
    output.folder.write(PAGE, page.encode())


def _left(report: Mapping[str, Any]) -> int:
    """Images that were listed and not taken; of shards the report does not say, as it counts their images."""
    taken = sum(report[name] for name in ("ok", "failed", "done_before", "failed_before"))
    return report["images"] - taken if report["input"] == "images" else 0


def rate_bars(rates: Mapping[str, float | None]) -> list[Row]:
    known = {name: rates[step] for step, name in RATES.items() if step in rates}
    fastest = max((rate for rate in known.values() if rate), default=1.0)
    return [{"name": name, "rate": rate, "bar": (rate or 0) / fastest} for name, rate in known.items()]


def class_areas(classes: Sequence[Mapping[str, Any]], totals: Totals) -> list[Row]:
    """The classes by area: `share` of all labelled pixels, `bar` of the largest class, images in which each occurs."""
    everything, largest = max(1, sum(totals.pixels)), max([1, *totals.pixels])
    none = [0] * len(classes)  # totals of no images know of no classes
    areas = [
        {
            "name": c["name"],
            "rgb": ",".join(str(int(channel)) for channel in c["color"]),
            "share": pixels / everything,
            "bar": pixels / largest,
            "images": images,
        }
        for c, pixels, images in zip(classes, totals.pixels or none, totals.class_images or none, strict=True)
    ]
    return sorted(areas, key=lambda a: -a["share"])


def duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02d} min"
