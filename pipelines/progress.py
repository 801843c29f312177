"""What a person sees while long work goes on: plain lines on stderr, so that stdout stays for results."""

from __future__ import annotations

import sys
import time


def say(message: str) -> None:
    """One line; from a Ray worker it reaches the driver's terminal."""
    sys.stderr.write(message + "\n")
    sys.stderr.flush()


class Progress:
    """Counts work done and says, at most every few seconds, how far it is and how long it will take."""

    def __init__(self, label: str, total: int, *, done: int = 0, every_s: float = 5.0) -> None:
        self.label, self.total, self.done, self.every_s = label, total, done, every_s
        self.first = done
        self.began = self.said = time.monotonic()

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        now = time.monotonic()
        if now - self.said >= self.every_s or self.done >= self.total:
            self.said = now
            rate = (self.done - self.first) / max(now - self.began, 1e-9)
            left = (self.total - self.done) / rate if rate else 0.0
            say(f"{self.label} {self.done}/{self.total}, {rate:.1f}/s, {left:.0f} s left{', ' + note if note else ''}")
