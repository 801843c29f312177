"""report.json of a bulk output: what one run did, or n runs side by side together, and what the whole output holds."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipelines.bulk.commits import PARTS, Output, Totals
from pipelines.bulk.plan import Plan
from pipelines.bulk.tally import Tally, bottleneck
from pipelines.config import SegmentConfig
from pipelines.storage import Folder

Report = dict[str, Any]
SUMMED = ("images", "skipped", "ok", "failed", "done_before", "failed_before", "failed_rows")
ADDED_RATES = ("images_per_s", "megapixels_per_s")


def run_report(
    config: SegmentConfig, source: Folder, output: Output, plan: Plan, tally: Tally, *, model: str, seconds: float
) -> Report:
    """What this run did. `images` counts what was listed: of shards the shards."""
    rates = tally.rates()
    cost = None
    if config.price_per_hour is not None and tally.seen:
        cost = round(config.price_per_hour * seconds / 3600 / tally.seen * 1000, 4)
    return {
        "source": source.uri,
        "target": output.folder.uri,
        "model": model,
        "input": plan.kind,
        "images": plan.listed,
        "skipped": plan.skipped,
        "ok": tally.ok,
        "failed": tally.failed,
        "done_before": plan.done,
        "failed_before": plan.failed_before,
        "failed_rows": tally.failed + plan.failed_before,
        "failures": dict(tally.reasons),
        "seconds": round(seconds, 2),
        "images_per_s": round(tally.seen / seconds, 2) if tally.seen else 0.0,
        "megapixels_per_s": round(tally.megapixels / seconds, 3) if tally.seen else 0.0,
        "rates": rates,
        "bottleneck": bottleneck(rates),
        "price_per_hour": config.price_per_hour,
        "cost_per_1000_images": cost,
    }


def sums(totals: Totals, classes: Mapping[str, Any]) -> Report:
    """What the whole output holds, from this run and those before: rows, and for each class its pixels and images."""
    pixels = max(1, sum(totals.pixels))
    areas = [
        {
            "id": each["id"],
            "name": each["name"],
            "pixels": totals.pixels[each["id"]],
            "share": round(totals.pixels[each["id"]] / pixels, 6),
            "images": totals.class_images[each["id"]],
        }
        for each in classes["classes"]
        if each["id"] < len(totals.pixels)  # none, while every image has failed
    ]
    return {"rows": totals.rows, "rows_ok": totals.ok, "rows_failed": totals.failed, "classes": areas}


@dataclass(frozen=True)
class Part:
    """The i-th of n runs side by side on one output. The last one to finish compacts for all; the order is free."""

    number: int
    of: int

    @classmethod
    def of_text(cls, text: str | None) -> Part | None:
        """From "i/n"."""
        if text is None:
            return None
        number, _, of = text.partition("/")
        return cls(int(number), int(of))

    def begin(self, output: Folder) -> None:
        """Withdraw the report of an earlier run, so that nobody takes this part for done."""
        output.delete(self._name(self.number))

    def finish(self, output: Folder, report: Report) -> Report | None:
        """Leave this run's report; where those of all n are there, what they did together."""
        output.write(self._name(self.number), json.dumps(report).encode())
        found = [output.read_if_present(self._name(number)) for number in range(1, self.of + 1)]
        reports: list[Report] = [json.loads(data) for data in found if data is not None]
        return together(reports) if len(reports) == self.of else None

    def _name(self, number: int) -> str:
        return f"{PARTS}/{self.of}/{number}.json"


def together(reports: list[Report]) -> Report:
    """One report of several runs at the same time: counts and rates are sums, the time is the longest."""
    whole = dict(reports[-1])
    whole |= {name: sum(each[name] for each in reports) for name in SUMMED}
    whole |= {name: round(sum(each[name] for each in reports), 3) for name in ADDED_RATES}
    whole["failures"] = dict(sum((Counter(each["failures"]) for each in reports), Counter()))
    whole["seconds"] = max(each["seconds"] for each in reports)
    rates = {step: [each["rates"].get(step) for each in reports] for step in whole["rates"]}
    whole["rates"] = {step: round(sum(r for r in known if r), 2) or None for step, known in rates.items()}
    whole["bottleneck"] = bottleneck(whole["rates"])
    prices = [each["price_per_hour"] for each in reports]
    if None not in prices:
        spent = sum(price * each["seconds"] / 3600 for price, each in zip(prices, reports, strict=True))
        seen = whole["ok"] + whole["failed"]
        whole["price_per_hour"] = sum(prices)
        whole["cost_per_1000_images"] = round(spent / seen * 1000, 4) if seen else None
    return whole
