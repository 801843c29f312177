"""What a run keeps to go on from: one upload at a time behind the steps, failures counted, the last two kept.

NOTE checkpoints do not go through ray.train.report. In Ray 2.60 an asynchronous upload that fails ends the run, a
synchronous one leaves the ranks' reports out of step for good, and a run whose registered checkpoint is gone cannot be
started again. Storage that refuses for a minute, or one damaged file, would cost a night.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from pipelines.errors import RepsepError, StorageError
from pipelines.progress import say
from pipelines.training.checkpoint_folder import CheckpointFolder, DamagedCheckpointError, Record, name_of
from pipelines.training.parallel import Group

LOCAL = "repsep-save-"
"""Local folders of what is to be uploaded begin with it and the process's id."""

FAILURES = 3
"""Checkpoints in a row that may fail: the third ends the run."""


class CheckpointsFailedError(RepsepError):
    """None can be saved, or read: to train on would be to work for nothing. All ranks raise it together."""


class Checkpoints:
    """A run's checkpoints as one rank has them: one upload at a time behind the steps, the last two kept.

    All ranks call the same methods in the same order.
    """

    def __init__(self, uri: str, group: Group, writers: int) -> None:
        self.store, self.group, self.writers = CheckpointFolder(uri), group, writers
        self.attempt = group.share(secrets.token_hex(4))
        _remove_left_over()
        self.kept: list[str] = []
        """Names of those known to be whole, the latest last."""
        self.last_step: int | None = None
        self._failures = 0
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._under_way: tuple[str, int, Future[None]] | None = None

    @property
    def last_uri(self) -> str | None:
        """The latest that is known to be whole."""
        return self.store.uri_of(self.kept[-1]) if self.kept else None

    def save(self, record: Record, write: Callable[[Path], None]) -> None:
        """Have `write` fill a local folder and upload it behind the next steps; waits for the upload before this one.

        Raises CheckpointsFailedError with the third failure in a row; one is only warned of.
        """
        self.settle()
        name = name_of(record.step, self.attempt)
        self._under_way = (name, record.step, self._begin(name, record, write))

    def is_uploading(self) -> bool:
        """Whether any rank's upload is under way."""
        return bool(self.group.worst(float(self._under_way is not None and not self._under_way[2].done())))

    def settle(self) -> bool:
        """Wait for the upload under way; whether it went well on all ranks. Raises CheckpointsFailedError."""
        if self._under_way is None:
            return True
        name, step, future = self._under_way
        self._under_way = None
        error = future.exception()
        if error is not None:
            say(f"train: warning: the checkpoint of step {step} was not saved: {error}")
        if self.group.worst(float(error is not None)):
            self._failures += 1
            if self._failures == FAILURES:
                last = f"the last whole one is {self.last_uri}" if self.kept else "there is none yet"
                raise CheckpointsFailedError(
                    f"{FAILURES} checkpoints in a row could not be saved, the last at step {step}"
                    f"{f' ({error})' if error else ''}; {last}. Make room, or mend the storage, and run this again"
                )
            return False
        self._failures = 0
        self.kept = [*self.kept[-1:], name]
        self.last_step = step
        return True

    def close(self) -> None:
        """Remove all but the last two; for the end, when nothing is under way."""
        if self.group.rank == 0:
            self._tidy(list(self.kept))
        self._pool.shutdown()

    def restore(self, read: Callable[[Path, Record], None]) -> Record | None:
        """Give the latest whole checkpoint to `read`; None where there has never been one.

        One that is damaged is named and the one before it is taken. Raises CheckpointsFailedError if all are.
        """
        names: list[str] = self.group.share(self.store.names())
        for name in names:
            with self.group.shared_folder() as directory:
                record, error = self._fetch(name, directory)
                if self.group.worst(float(error is not None)):
                    if error is not None and self.group.local_rank == 0:
                        say(f"train: warning: a checkpoint is left out: {error}")
                    continue
                assert record is not None
                read(directory, record)
                self.group.barrier()  # the folder is the node's: nobody removes it before all have read
            before = names[names.index(name) + 1 :][:1]
            self.kept, self.last_step = [*before, name], record.step
            return record
        if self.group.share(any(self.store.was_finished(name) for name in names)):
            raise CheckpointsFailedError(
                f"none of the {len(names)} checkpoints in {self.store.folder.uri} is whole; to train from the start, "
                "delete that folder; to keep what was reached, restore its files from a backup"
            )
        if self.group.rank == 0:  # the run was stopped before its first upload was through, which is no loss
            for name in names:
                self.store.remove(name)
        return None

    def _begin(self, name: str, record: Record, write: Callable[[Path], None]) -> Future[None]:
        """Fill a local folder, then upload it in the thread."""
        directory = Path(tempfile.gettempdir()) / f"{LOCAL}{os.getpid()}-{name}-{self.group.rank}"
        writes, future = self.group.rank < self.writers, Future[None]()
        try:
            if writes:
                directory.mkdir(mode=0o700)
        except OSError as error:
            future.set_exception(error)
        if self.group.worst(float(future.done())) or not writes:  # writing may take all ranks, or none
            if not future.done():
                shutil.rmtree(directory, ignore_errors=True)
                future.set_result(None)
            return future
        try:
            write(directory)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
            shutil.rmtree(directory, ignore_errors=True)
            future.set_exception(error)
            return future
        return self._pool.submit(self._upload, name, directory, record, list(self.kept))

    def _upload(self, name: str, directory: Path, record: Record, kept: list[str]) -> None:
        try:
            rank = self.group.rank
            if rank == 0:
                self._tidy(kept)
            self.store.upload(name, directory, record if rank == 0 else None, rank)
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def _tidy(self, kept: list[str]) -> None:
        try:
            if kept:
                self.store.remove_before(kept[0])
        except StorageError as error:
            say(f"train: warning: older checkpoints were not removed: {error}")

    def _fetch(self, name: str, directory: Path) -> tuple[Record | None, Exception | None]:
        """One rank of each node copies; the others read only where training was."""
        try:
            if self.group.local_rank == 0:
                return self.store.fetch(name, directory), None
            return self.store.record(name), None
        except DamagedCheckpointError as error:
            return None, error


def _remove_left_over() -> None:
    """What processes of this machine that were killed had written for an upload: gigabytes each."""
    for folder in Path(tempfile.gettempdir()).glob(f"{LOCAL}*"):
        pid = folder.name.removeprefix(LOCAL).partition("-")[0]
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(pid), 0)
            except ProcessLookupError:
                shutil.rmtree(folder, ignore_errors=True)
