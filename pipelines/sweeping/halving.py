"""Early stopping by ASHA (Li et al. 2020) over in-loop validation, by steps of training."""

from __future__ import annotations

from typing import Any

from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from pipelines.config import SweepConfig
from pipelines.sweeping.points import Point
from pipelines.sweeping.records import Records


class FairHalving(ASHAScheduler):
    """Ray's ASHA with two repairs.

    After a crash it is shown again what all trials had reached: Ray restores trials and search, not the scheduler, and
    those that go on would be compared with nobody. A trial at its last step ends by itself instead of being killed.
    """

    def __init__(self, records: Records, config: SweepConfig) -> None:
        super().__init__(
            time_attr="step",
            metric="miou",
            mode="max",
            max_t=config.steps,
            grace_period=config.validate_every,
            reduction_factor=config.reduction_factor,
            stop_last_trials=False,
        )
        self.records = records

    def on_trial_add(self, tune_controller: Any, trial: Any) -> None:
        super().on_trial_add(tune_controller, trial)
        for step, miou in self.records.read(Point.from_dict(trial.config["point"])).curve:
            super().on_trial_result(tune_controller, trial, {"step": step, "miou": miou})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        decision: str = super().on_trial_result(tune_controller, trial, result)
        return TrialScheduler.CONTINUE if result.get("step", 0) >= self._max_t else decision
