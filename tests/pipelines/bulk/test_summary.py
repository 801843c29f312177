"""What report.json says of runs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipelines.bulk.summary import Part, together
from pipelines.storage import Folder


def report(number: int, **more: Any) -> dict[str, Any]:
    counts = {"images": 10, "skipped": 1, "ok": 8, "failed": 2, "done_before": 0, "failed_before": 1, "failed_rows": 3}
    rates = {"reader": 50.0, "model": 5.0, "writer": None, "end_to_end": 4.0}
    rest = {"failures": {"decode": 2}, "seconds": 100.0 * number, "rates": rates, "bottleneck": "model"}
    speed = {"images_per_s": 4.0, "megapixels_per_s": 1.0, "price_per_hour": 36.0, "cost_per_1000_images": None}
    return {"source": "in", **counts, **rest, **speed, **more}


def test_runs_side_by_side_add_up() -> None:
    whole = together([report(1), report(2), report(3, failures={"read": 2}, rates={"reader": 1.0, "model": 5.0})])
    assert (whole["images"], whole["skipped"], whole["ok"], whole["failed_rows"]) == (30, 3, 24, 9)
    assert whole["failures"] == {"decode": 4, "read": 2}
    assert whole["seconds"] == 300
    assert whole["images_per_s"] == 12
    assert whole["rates"]["model"] == 15
    assert whole["bottleneck"] == "model"
    assert whole["cost_per_1000_images"] == pytest.approx(36 / 3600 * 600 / 30 * 1000)
    assert together([report(1), report(2, price_per_hour=None)])["cost_per_1000_images"] is None


def test_the_last_part_to_finish_reports_for_all_and_one_that_began_again_is_not_done(tmp_path: Path) -> None:
    output = Folder(str(tmp_path))
    assert Part(2, 3).finish(output, report(2)) is None
    assert Part(1, 3).finish(output, report(1)) is None
    whole = Part(3, 3).finish(output, report(3))
    assert whole is not None
    assert whole["images"] == 30
    Part(2, 3).begin(output)
    assert Part(1, 3).finish(output, report(1)) is None, "the second part is at work again"
    assert Part(1, 2).finish(output, report(1)) is None, "halves are other parts than thirds"
