"""What is known of a trial after any crash."""

from __future__ import annotations

from pathlib import Path

import pytest
from ray.tune.schedulers import TrialScheduler

from pipelines.config import SweepConfig, TrainConfig
from pipelines.sweeping.halving import FairHalving
from pipelines.sweeping.points import Point, points
from pipelines.sweeping.records import FINISHED, Records, Trial

CONFIG = SweepConfig(trials=8, steps=80, validate_every=20)
POINTS = points(CONFIG, TrainConfig())


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(str(tmp_path / "trials"))


def report(step: int, miou: float, best: tuple[int, float] | None = None) -> dict[str, float]:
    best_step, best_miou = best or (step, miou)
    return {"step": step, "miou": miou, "best_step": best_step, "best_miou": best_miou}


def test_a_trial_that_never_reported_is_empty(records: Records) -> None:
    trial = records.read(POINTS[0])
    assert (trial.curve, trial.ended, trial.steps) == ((), "", 0)
    assert trial.miou != trial.miou


def test_reports_make_a_curve_and_the_last_of_a_repeated_step_counts(records: Records) -> None:
    for step, miou in ((20, 0.2), (40, 0.3), (40, 0.31), (60, 0.25)):
        records.add(POINTS[1], report(step, miou, (40, 0.31) if step == 60 else None))
    trial = records.read(POINTS[1])
    assert trial.curve == ((20, 0.2), (40, 0.31), (60, 0.25))
    assert (trial.miou, trial.steps, trial.at(20), trial.ended) == (0.31, 60, 0.2, "")


def test_the_best_of_a_lost_report_is_known_from_the_next(records: Records) -> None:
    records.add(POINTS[1], report(20, 0.2))
    records.add(POINTS[1], report(60, 0.25, (40, 0.4)))
    assert records.read(POINTS[1]).curve == ((20, 0.2), (40, 0.4), (60, 0.25))


def test_how_it_ended_is_kept_with_the_curve(records: Records) -> None:
    records.add(POINTS[1], report(20, 0.2))
    records.end(POINTS[1], "failed: RuntimeError: no memory")
    trial = records.read(POINTS[1])
    assert trial.failed
    assert trial.error == "RuntimeError: no memory"
    assert trial.curve == ((20, 0.2),)


def test_another_point_of_the_same_name_has_no_record(records: Records) -> None:
    records.add(POINTS[1], report(20, 0.2))
    other = Point(POINTS[1].name, POINTS[1].config.model_copy(update={"lr": 0.4}))
    assert records.read(other).curve == ()


def test_trials_rank_by_how_far_they_went_then_by_their_result() -> None:
    failed = Trial(POINTS[0], ((20, 0.9),), "failed: no memory")
    early, far = Trial(POINTS[1], ((20, 0.8),), "stopped early"), Trial(POINTS[2], ((20, 0.1), (80, 0.3)), FINISHED)
    further = Trial(POINTS[3], ((20, 0.1), (80, 0.4)), FINISHED)
    assert sorted([far, failed, further, early], key=lambda t: t.rank) == [failed, early, far, further]


# ---------------------------------------------------------------- ASHA


class Tried:
    """In place of one of Tune's trials."""

    def __init__(self, point: Point) -> None:
        self.trial_id, self.config = point.key, {"point": point.to_dict()}


def told(scheduler: FairHalving, tried: Tried, records: Records, step: int, miou: float) -> str:
    records.add(Point.from_dict(tried.config["point"]), report(step, miou))
    return scheduler.on_trial_result(None, tried, {"step": step, "miou": miou})


def test_a_trial_may_first_be_stopped_at_its_first_validation(records: Records) -> None:
    scheduler = FairHalving(records, CONFIG)
    good, bad = Tried(POINTS[0]), Tried(POINTS[1])
    for each in (good, bad):
        scheduler.on_trial_add(None, each)
    assert told(scheduler, good, records, 20, 0.5) == TrialScheduler.CONTINUE
    assert told(scheduler, bad, records, 19, 0.1) == TrialScheduler.CONTINUE
    assert told(scheduler, bad, records, 20, 0.1) == TrialScheduler.STOP


def test_after_a_crash_a_trial_is_compared_with_those_before_it(records: Records) -> None:
    before = FairHalving(records, CONFIG)
    first = [Tried(point) for point in POINTS[:3]]
    for each, miou in zip(first, (0.5, 0.6, 0.7), strict=True):
        before.on_trial_add(None, each)
        told(before, each, records, 20, miou)

    restored, late = FairHalving(records, CONFIG), Tried(POINTS[5])
    for each in (*first, late):
        restored.on_trial_add(None, each)
    assert told(restored, late, records, 20, 0.1) == TrialScheduler.STOP
    assert told(restored, first[2], records, 40, 0.8) == TrialScheduler.CONTINUE


def test_a_trial_that_goes_on_is_not_judged_again_by_the_step_it_had_passed(records: Records) -> None:
    before = FairHalving(records, CONFIG)
    slow = Tried(POINTS[0])
    before.on_trial_add(None, slow)
    assert told(before, slow, records, 20, 0.2) == TrialScheduler.CONTINUE
    better = [Tried(point) for point in POINTS[1:4]]
    for each in better:
        before.on_trial_add(None, each)
        told(before, each, records, 20, 0.6)

    restored = FairHalving(records, CONFIG)
    for each in (slow, *better):
        restored.on_trial_add(None, each)
    assert restored.on_trial_result(None, slow, {"step": 20, "miou": 0.2}) == TrialScheduler.CONTINUE


def test_at_its_last_step_a_trial_ends_by_itself(records: Records) -> None:
    scheduler = FairHalving(records, CONFIG)
    good, bad = Tried(POINTS[0]), Tried(POINTS[1])
    for each in (good, bad):
        scheduler.on_trial_add(None, each)
    told(scheduler, good, records, 80, 0.9)
    assert told(scheduler, bad, records, 80, 0.1) == TrialScheduler.CONTINUE
