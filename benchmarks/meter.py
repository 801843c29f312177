"""What a process and all below it take: CPU seconds and memory."""

from __future__ import annotations

import os
import threading
from pathlib import Path


class Meter:
    """CPU seconds and memory of a process and all below it, ten times a second."""

    def __init__(self, pid: int) -> None:
        self.pid, self.stopped = pid, threading.Event()
        self.samples: list[float] = []
        self.ended: dict[int, float] = {}
        self.last: dict[int, float] = {}
        self.peak = 0
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        for turn in range(10**9):
            tree = process_tree(self.pid)
            now = {pid: cpu_seconds(pid) for pid in tree}
            for pid, spent in self.last.items():
                if pid not in now:
                    self.ended[pid] = spent  # what a process had used when it was last seen
            self.last = now
            self.samples.append(sum(now.values()) + sum(self.ended.values()))
            if turn % 10 == 0:
                self.peak = max(self.peak, sum(memory(pid) for pid in tree))
            if self.stopped.wait(0.1):
                return

    def stop(self) -> None:
        self.stopped.set()
        self.thread.join()


def process_tree(root: int) -> list[int]:
    """The process and all below it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
        children.setdefault(parent, []).append(int(stat.parent.name))
    found, waiting = [], [root]
    while waiting:
        pid = waiting.pop()
        found.append(pid)
        waiting += children.get(pid, [])
    return found


def cpu_seconds(pid: int) -> float:
    """Of the process itself: its children are counted by themselves."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Proportional set size in bytes; 0 for a process that is gone."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0
