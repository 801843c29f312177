"""What a person sees while long work goes on, all on stderr, so that stdout stays for results.

On a terminal a bar with the time that is left, otherwise plain lines that a log file can hold.
"""

from __future__ import annotations

import os
import sys
import time
from typing import Protocol

from tqdm import tqdm


def say(message: str) -> None:
    """One line, above a bar if there is one; from a Ray worker it reaches the driver's terminal."""
    if on_terminal():
        tqdm.write(message, file=sys.stderr)
    else:
        sys.stderr.write(message + "\n")
    sys.stderr.flush()


def on_terminal() -> bool:
    """Whether a person watches this process; a terminal without a size, such as a container's, shows no bar."""
    return sys.stderr.isatty() and os.get_terminal_size(sys.stderr.fileno()).columns > 0


class Bar(Protocol):
    """What draws: tqdm's bar, or Ray's that is drawn by the driver."""

    def update(self, n: int) -> object: ...

    def close(self) -> object: ...

    def set_description(self, desc: str) -> object: ...


class Progress:
    """Counts work done and shows how far it is and how long it will take: by lines at most every few seconds.

    With `bar` by that one instead; on a terminal by one of its own.
    """

    def __init__(self, label: str, total: int, *, done: int = 0, every_s: float = 5.0, bar: Bar | None = None) -> None:
        self.label, self.total, self.done, self.every_s = label, total, done, every_s
        self.first = done
        self.began = self.said = time.monotonic()
        if bar is None and on_terminal() and total > 0:
            bar = tqdm(desc=label, total=total, initial=done, file=sys.stderr, dynamic_ncols=True, leave=True)
        self.bar = bar

    def advance(self, count: int, note: str = "") -> None:
        self.done += count
        if self.bar is not None:
            self._draw(count, note)
            return
        now = time.monotonic()
        if now - self.said >= self.every_s or self.done >= self.total:
            self.said = now
            rate = (self.done - self.first) / max(now - self.began, 1e-9)
            left = (self.total - self.done) / rate if rate else 0.0
            say(f"{self.label} {self.done}/{self.total}, {rate:.1f}/s, {left:.0f} s left{', ' + note if note else ''}")

    def close(self) -> None:
        """Leave the bar as it is; lines need no end."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None

    def _draw(self, count: int, note: str) -> None:
        assert self.bar is not None
        self.bar.set_description(f"{self.label} ({note})" if note else self.label)
        self.bar.update(count)
        if self.done >= self.total:
            self.close()
