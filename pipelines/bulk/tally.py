"""What came back from one pass of bulk segmentation: counts, rates, and whether so much fails that it has to stop."""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field

from pipelines.bulk.commits import OK
from pipelines.bulk.steps import Row

FIRST_IMAGES, WINDOW = 20, 1000
STEPS = {"reader": ("read_s", "reader"), "model": ("segment_s", "segmenter"), "writer": ("write_s", "writer")}


@dataclass
class Tally:
    """Counts of images, `busy` seconds and processes by step."""

    retried: int = 0
    """Objects that had failed before: so many failures are no news."""
    ok: int = 0
    failed: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    megapixels: float = 0.0
    busy: Counter[str] = field(default_factory=Counter)
    workers: dict[str, set[int]] = field(default_factory=lambda: {step: set() for step in STEPS})
    recent: deque[bool] = field(default_factory=lambda: deque(maxlen=WINDOW))
    """Whether the latest images failed."""
    last_error: str = ""
    slots: dict[str, int] = field(default_factory=dict)
    """How many processes of a step can be at work at once."""
    first: tuple[float, int] | None = None
    last: tuple[float, int] | None = None
    """Seconds and images so far, when the first and the latest batch came back."""

    @property
    def seen(self) -> int:
        return self.ok + self.failed

    def add(self, row: Row) -> None:
        if row["status"] == OK:
            self.ok += 1
            self.megapixels += row["height"] * row["width"] / 1e6
        else:
            self.failed += 1
            self.reasons[row["stage"]] += 1
            self.last_error = row["error"]
        self.recent.append(row["status"] != OK)
        for step, (seconds, worker) in STEPS.items():
            if row.get(seconds) is not None and row.get(worker) is not None:
                self.busy[step] += row[seconds]
                self.workers[step].add(row[worker])

    def batch_came(self, seconds: float) -> None:
        """A batch is counted, so many seconds after the start."""
        self.first = self.first or (seconds, self.seen)
        self.last = (seconds, self.seen)

    def too_many_failed(self, rate: float) -> str | None:
        """Whether more than `rate` of the first or the latest images failed, in words; to be asked after a batch."""
        failed = min(sum(self.recent), self.failed - self.retried)
        if len(self.recent) < FIRST_IMAGES or failed <= rate * len(self.recent):
            return None
        which = "first" if self.seen == len(self.recent) else "latest"
        return f"{failed} of the {which} {len(self.recent)} images failed ({dict(self.reasons)})"

    def rates(self) -> dict[str, float | None]:
        """Images/s of each step, had it been alone, and end to end without the start.

        A step's rate is that of one process while it is at work, times the processes that did it, as far as there is
        room for them.
        """
        found: dict[str, float | None] = {}
        for step in STEPS:
            processes = min(len(self.workers[step]), self.slots.get(step, 1))
            found[step] = round(self.seen * processes / self.busy[step], 2) if self.busy[step] else None
        if self.first is None or self.last is None or self.last[0] <= self.first[0]:
            return found | {"end_to_end": None}
        return found | {"end_to_end": round((self.last[1] - self.first[1]) / (self.last[0] - self.first[0]), 2)}


def bottleneck(rates: dict[str, float | None]) -> str | None:
    """The step with the lowest rate of its own."""
    known = {step: rate for step, rate in rates.items() if rate and step in STEPS}
    return min(known, key=lambda step: known[step]) if known else None
