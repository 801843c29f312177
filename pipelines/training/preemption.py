"""The notice that a machine is to be taken away, as clouds give for the cheap ones, and a drained node gets."""

from __future__ import annotations

import time

import ray.train

from pipelines.progress import say
from pipelines.training.parallel import Group

ASKED_EVERY_S, MOST_STEPS = 2.0, 50
"""Notices come from 30 s to minutes ahead. The second bounds what a sudden change of pace costs."""


class PreemptionNotice:
    """Asks Ray every few seconds whether a machine of ours is to be taken away.

    NOTE all ranks must ask at the same step, and each question is a round trip to an actor. So each time they agree on
    the slowest one's pace, which gives the step of the next.
    """

    def __init__(self, group: Group, step: int) -> None:
        self.group, self.due = group, step + 1
        self.asked_step, self.asked_at = step, time.monotonic()
        self.known: object = None

    def came(self, step: int) -> bool:
        """Whether there is news. After it training goes on: until the machine goes, or for good if it stays."""
        if step < self.due:
            return False
        pace = self.group.worst((time.monotonic() - self.asked_at) / (step - self.asked_step))
        self.asked_step, self.asked_at = step, time.monotonic()
        self.due = step + max(1, min(MOST_STEPS, int(ASKED_EVERY_S / pace)))
        notice = ray.train.get_preemption_info()
        news = notice is not None and notice != self.known
        self.known = notice
        if news and self.group.rank == 0:
            say(f"train: a machine is about to be taken away, a checkpoint of step {step} is written now")
        return news
