"""A machine that is about to go: one checkpoint for each notice, and few questions."""

from __future__ import annotations

from typing import Any

import pytest
import ray.train

from pipelines.training import preemption
from pipelines.training.parallel import Group
from pipelines.training.preemption import ASKED_EVERY_S, PreemptionNotice


class Training:
    """Steps of a given length on a clock of its own, and a Ray that answers what it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.step, self.asked = 100.0, 0, list[float]()
        self.answer: Any = None
        monkeypatch.setattr(preemption.time, "monotonic", lambda: self.now)
        monkeypatch.setattr(ray.train, "get_preemption_info", self._asked)
        self.notice = PreemptionNotice(Group(), 0)

    def _asked(self) -> Any:
        self.asked.append(self.now)
        return self.answer

    def steps(self, number: int, seconds: float) -> list[int]:
        """The steps at which there was news."""
        news = []
        for _ in range(number):
            self.step, self.now = self.step + 1, self.now + seconds
            if self.notice.came(self.step):
                news.append(self.step)
        return news


@pytest.mark.parametrize("seconds", [0.05, 0.3, 3.0])
def test_ray_is_asked_every_other_second_or_at_each_slower_step(
    seconds: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(monkeypatch)
    training.steps(200, seconds)
    gaps = [b - a for a, b in zip(training.asked, training.asked[1:], strict=False)]
    assert max(gaps) <= max(ASKED_EVERY_S, seconds) + 1e-6
    assert len(training.asked) <= 200 * seconds / ASKED_EVERY_S * 1.2 + 1 or seconds > ASKED_EVERY_S


def test_each_notice_is_news_once(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    assert training.steps(10, 1.0) == []
    training.answer = {"node": "a"}
    first = training.steps(10, 1.0)
    assert len(first) == 1
    assert first[0] <= 12
    training.answer = {"node": "a", "and": "b"}
    assert len(training.steps(10, 1.0)) == 1


def test_a_sudden_change_of_pace_is_noticed_within_50_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(monkeypatch)
    training.steps(1000, 0.001)
    training.answer = {"node": "a"}
    assert training.steps(51, 1.0)
