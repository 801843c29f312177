"""MLflow that is away for a while: what needs its answer waits, what is only written goes on without.

A training's metrics are written by a thread. What is due meanwhile is kept, within bounds, and tried again; that is
said once. Metrics keep the time at which they were measured. What is left at the end is kept on (unsent.py).
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pipelines.errors import RepsepError
from pipelines.progress import say
from pipelines.storage import Folder
from pipelines.tracking import RefusedError, RunLogger, fail_soon, measured, shown
from pipelines.unsent import keep

METRICS_KEPT, FILES_KEPT = 50_000, 16
BATCH = 1000
LONGEST_PAUSE_S = 30.0
PATIENCE_S = 900.0

Answer = TypeVar("Answer")


def patiently(
    call: Callable[[], Answer],
    *,
    within_s: float = PATIENCE_S,
    pause_s: float = 1.0,
    sleep: Callable[[float], None] = time.sleep,
) -> Answer:
    """What the call gives, tried again while MLflow is away; its RepsepError if that lasts longer, or it is refused.

    For a process that needs MLflow for nothing else: its requests fail soon there.
    """
    fail_soon()
    deadline, said = time.monotonic() + within_s, False
    while True:
        try:
            return call()
        except RefusedError:
            raise
        except RepsepError as error:
            if time.monotonic() + pause_s > deadline:
                raise
            if not said:
                say(f"warning: waiting for up to {within_s / 60:.0f} min for MLflow: {error}")
            said = True
        sleep(pause_s)
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


class PatientLogger:
    """Metrics and small files of one run. Beyond what is kept the oldest are lost, and counted.

    What is left at the end goes to the folder `unsent`. Start it in a process that needs MLflow for nothing else: its
    requests fail soon there.
    """

    def __init__(
        self,
        logger: RunLogger,
        unsent: Folder | None = None,
        *,
        metrics_kept: int = METRICS_KEPT,
        pause_s: float = 1.0,
    ) -> None:
        self.logger, self.unsent, self.metrics_kept, self.pause_s = logger, unsent, metrics_kept, pause_s
        self.lost = 0
        self._metrics: deque[Any] = deque()
        self._files: deque[tuple[str, bytes]] = deque()
        self._under_way: list[Any] = []
        self._changed = threading.Condition()
        self._closing = self._refused = False
        self._deadline = 0.0
        fail_soon()
        self._thread = threading.Thread(target=self._write, name="mlflow", daemon=True)
        self._thread.start()

    def metrics(self, values: Mapping[str, float], step: int) -> None:
        self._add(self._metrics, measured(values, step))

    def file(self, data: bytes, name: str) -> None:
        """An artifact; `name` may hold folders."""
        self._add(self._files, [(name, data)])

    def close(self, within_s: float = 30.0) -> None:
        """Goes on trying for `within_s`; says what was not written, and keeps it."""
        with self._changed:
            self._closing, self._deadline = True, time.monotonic() + within_s
            self._changed.notify_all()
        self._thread.join(within_s)
        with self._changed:
            left = [*self._under_way, *self._metrics, *self._files]
        if left or self.lost:
            count, run, kept = self.lost + len(left), self.logger.run_id, self._keep(left)
            say(f"warning: {count} metrics and pictures of the run {run} were not written to MLflow; {kept}")

    def _keep(self, left: list[Any]) -> str:
        if not left or self.unsent is None:
            return "they are lost"
        files = {item[0]: item[1] for item in left if isinstance(item, tuple)}
        metrics = [item for item in left if not isinstance(item, tuple)]
        try:
            keep(self.unsent, self.logger.run_id, metrics=metrics, files=files)
        except RepsepError as error:
            return f"they are lost: {error}"
        return f"{len(left)} are kept in {self.unsent.uri} and sent by the next evaluation or workflow"

    def _add(self, queue: deque[Any], items: list[Any], *, front: bool = False) -> None:
        with self._changed:
            queue.extendleft(reversed(items)) if front else queue.extend(items)
            bound = FILES_KEPT if queue is self._files else self.metrics_kept
            while len(queue) > bound:
                queue.popleft()
                self.lost += 1
            self._changed.notify_all()

    def _write(self) -> None:
        pause, away = self.pause_s, False
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._metrics or self._files or self._closing)
                if not self._metrics and not self._files:
                    return
                closing = self._closing
            try:
                self._round()
            except Exception as error:  # of MLflow, a database driver, the store of the artifacts: none may end the run
                if not away:
                    say(f"warning: MLflow cannot be written to, training goes on: {shown(str(error))[:400]}")
                away = True
                with self._changed:
                    if not closing:
                        self._changed.wait_for(lambda: self._closing, timeout=pause)
                    elif time.monotonic() < self._deadline:
                        self._changed.wait(self.pause_s)
                    else:
                        return
                pause = min(2 * pause, LONGEST_PAUSE_S)
            else:
                if away:
                    say("MLflow can be written to again; what was due is there")
                pause, away = self.pause_s, False

    def _round(self) -> None:
        """Write all that is due, metrics first."""
        self._empty(self._metrics, BATCH, self.logger.write)
        self._empty(self._files, 1, self._write_files)

    def _write_files(self, files: list[tuple[str, bytes]]) -> None:
        for name, data in files:
            self.logger.content(data, name)

    def _empty(self, queue: deque[Any], size: int, write: Any) -> None:
        while True:
            with self._changed:
                batch = [queue.popleft() for _ in range(min(size, len(queue)))]
                self._under_way = batch
            if not batch:
                return
            try:
                write(batch)
            except RefusedError as error:
                self.lost += len(batch)
                if not self._refused:
                    say(f"warning: {error}")
                self._refused = True
            except BaseException:
                self._add(queue, batch, front=True)
                raise
            finally:
                self._under_way = []
