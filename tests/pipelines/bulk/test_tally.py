"""Counting what came back: rates, the bottleneck, and when a job in which too much fails has to stop."""

from __future__ import annotations

import pytest

from pipelines.bulk import steps
from pipelines.bulk.tally import FIRST_IMAGES, WINDOW, Tally, bottleneck


def row(status: str = "ok", **more: object) -> steps.Row:
    return {"status": status, "height": 100, "width": 200, "stage": "decode", "error": "why"} | more


def tally_of(statuses: list[str], **more: int) -> Tally:
    tally = Tally(**more)
    for status in statuses:
        tally.add(row(status))
    return tally


def test_a_job_in_which_everything_fails_is_stopped_after_the_first_images_not_before() -> None:
    assert tally_of(["failed"] * (FIRST_IMAGES - 1)).too_many_failed(0.5) is None
    said = tally_of(["failed"] * FIRST_IMAGES).too_many_failed(0.5)
    assert said is not None
    assert said.startswith(f"{FIRST_IMAGES} of the first {FIRST_IMAGES} images failed ({{'decode': {FIRST_IMAGES}}})")


def test_a_source_that_breaks_after_many_good_images_stops_the_job_soon() -> None:
    good = ["ok"] * 100_000
    assert tally_of([*good, *["failed"] * (WINDOW // 2)]).too_many_failed(0.5) is None
    said = tally_of([*good, *["failed"] * (WINDOW // 2 + 1)]).too_many_failed(0.5)
    assert said is not None
    assert "of the latest" in said


def test_images_that_had_failed_before_do_not_stop_the_job_that_tries_them_again() -> None:
    assert tally_of(["failed"] * 500, retried=500).too_many_failed(0.5) is None
    assert tally_of(["failed"] * 500, retried=200).too_many_failed(0.5) is not None


def test_a_step_s_rate_is_that_of_its_processes_at_work_and_the_slowest_is_the_bottleneck() -> None:
    tally = Tally(slots={"reader": 2, "model": 1, "writer": 8})
    for n in range(100):  # 0.1 s to read by 4 processes where there is room for 2; 0.2 s for the model; 0.01 s to write
        tally.add(row(read_s=0.1, reader=n % 4, segment_s=0.2, segmenter=7, write_s=0.01, writer=n % 2))
        tally.batch_came(10.0 + n)
    rates = tally.rates()
    assert rates == {"reader": 20.0, "model": 5.0, "writer": 200.0, "end_to_end": 1.0}
    assert bottleneck(rates) == "model"
    assert tally.megapixels == pytest.approx(2.0)


def test_without_images_there_are_no_rates() -> None:
    assert set(Tally().rates().values()) == {None}
    assert bottleneck(Tally().rates()) is None


@pytest.mark.parametrize("host", ["vm", "ip-10-0-0-1", "ip-10-0-0-2", "node-17", "z" * 60])
def test_a_worker_s_number_fits_its_column_on_every_machine(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(steps.socket, "gethostname", lambda: host)
    (value,) = steps.to_table([{"reader": steps.worker_id()}], steps.IMAGE_SCHEMA)["reader"].to_pylist()
    assert 0 < value < 2**63
