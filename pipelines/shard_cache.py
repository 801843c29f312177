"""Whole shards from an object store on local disk, shared by all processes of a machine.

    <sha256>     a shard; the digest in dataset.json is its name, and what it holds is compared with it
    part-<hex>   one that is being downloaded, locked by whoever does it
    lock-<n>     files that are only locked: who holds one downloads, the others wait and find the shard

Locks are the kernel's (flock) and go with the process that held them, so nothing here is left behind that stops
anybody: not by a kill, a full disk or a damaged file.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import os
import secrets
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from pipelines.errors import RepsepError
from pipelines.storage import Folder, storage_errors

log = logging.getLogger(__name__)

PIECE = 8 * 2**20
LOCKS = 64
SHARDS = 16
"""A cache that would not hold so many shards as large as this one does not take it: training mixes rows of 16 shards
(`sample_order.SHUFFLE_SHARDS`), so each would be downloaded again and again."""


class ShardCache:
    """At most `capacity` bytes of shards in `folder`; those used least recently make room. Safe between threads too."""

    def __init__(self, folder: Path, capacity: int) -> None:
        self.folder, self.capacity = folder, capacity
        self._checked: dict[str, tuple[int, int, int]] = {}
        self._too_large: set[str] = set()
        self._warned = self._closed = False

    @classmethod
    def of(cls, gib: float) -> ShardCache | None:
        """This user's cache on this machine; None if it is to hold nothing."""
        if gib == 0:
            return None
        return cls(Path(tempfile.gettempdir()) / f"repsep-cache-{os.getuid()}", int(gib * 2**30))

    def read(self, source: Folder, key: str, sha256: str, start: int, end: int | None) -> bytes | None:
        """A piece of a shard, downloaded whole if it is not here; a negative start counts from its end.

        None where it cannot be held here, which is logged once: read it from the source. Raises StorageError where the
        source fails, RepsepError where it holds something else than dataset.json says.
        """
        try:
            shard = self._open(source, key, sha256)
            if shard is None:
                return None
            with shard:
                if start < 0:
                    start = max(0, os.fstat(shard.fileno()).st_size + start)
                shard.seek(start)
                return shard.read() if end is None else shard.read(end - start)
        except OSError as error:  # what goes wrong at the source is a StorageError
            self._closed = True
            self._warn(f"cannot be used ({error})")
            return None

    def fetch(self, source: Folder, key: str, sha256: str) -> None:
        """Have a shard here before it is read."""
        self.read(source, key, sha256, 0, 0)

    def _open(self, source: Folder, key: str, sha256: str) -> IO[bytes] | None:
        if (shard := self._held(sha256, checked_only=True)) is not None:
            return shard
        if sha256 in self._too_large:
            return None
        self._make_folder()
        with self._locked(f"lock-{int(sha256[:8], 16) % LOCKS}"):
            if (shard := self._held(sha256)) is not None:
                return shard
            if self._closed or not self._download(source, key, sha256):
                return None
            return self._held(sha256)

    def _held(self, sha256: str, *, checked_only: bool = False) -> IO[bytes] | None:
        """The shard as an open file: it stays whole for its reader, even if it is removed meanwhile."""
        try:
            shard = (self.folder / sha256).open("rb")
        except FileNotFoundError:
            return None
        status = os.fstat(shard.fileno())
        identity = (status.st_ino, status.st_size, status.st_mtime_ns)
        if self._checked.get(sha256) != identity:
            if checked_only:
                shard.close()
                return None
            if hashlib.file_digest(shard, "sha256").hexdigest() != sha256:
                shard.close()
                log.warning("the shard %s in %s is damaged and is downloaded again", sha256, self.folder)
                (self.folder / sha256).unlink(missing_ok=True)
                return None
            self._checked[sha256] = identity
        os.utime(shard.fileno(), ns=(time.time_ns(), status.st_mtime_ns))  # the time of access says who goes first
        return shard

    def _download(self, source: Folder, key: str, sha256: str) -> bool:
        size = source.size_of(key)
        if size is None:
            return False  # whoever reads it will hear so
        if size * SHARDS > self.capacity:
            self._too_large.add(sha256)
            self._warn(f"holds {self.capacity:,} bytes, too few for {SHARDS} shards of {size:,}")
            return False
        with self._part(size) as (path, part):
            for _ in range(2):  # the second time for what the network may have changed
                part.seek(0)
                digest = hashlib.sha256()
                for start in range(0, size, PIECE):
                    with storage_errors(source.uri_of(key)):
                        piece = source.fs.cat_file(source.path_of(key), start=start, end=min(start + PIECE, size))
                    digest.update(piece)
                    part.write(piece)
                if digest.hexdigest() == sha256:
                    part.flush()
                    status = os.fstat(part.fileno())
                    os.replace(path, self.folder / sha256)
                    self._checked[sha256] = (status.st_ino, status.st_size, status.st_mtime_ns)
                    return True
        raise RepsepError(
            f"{source.uri_of(key)} is not the shard that dataset.json describes: it was replaced or damaged since; "
            "run `repsep prepare` again"
        )

    @contextlib.contextmanager
    def _part(self, size: int) -> Iterator[tuple[Path, IO[bytes]]]:
        """An unfinished file for which there is room; gone afterwards, unless it was renamed."""
        path = self.folder / f"part-{secrets.token_hex(8)}"
        with self._locked("lock-room"):
            self._make_room(size)
            part = path.open("xb")
            fcntl.flock(part, fcntl.LOCK_EX)
            part.truncate(size)  # so that it counts from now on
        try:
            with part:
                yield path, part
        finally:
            path.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Under lock-room: remove what killed processes left, then the shards used least recently."""
        shards, total = [], size
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if path.name.startswith("part-") and _is_abandoned(path):
                    path.unlink()
                    continue
                status = path.stat()
                total += status.st_size
                if not path.name.startswith(("part-", "lock-")):
                    shards.append((status.st_atime_ns, status.st_size, path))
        # Half of what is free stays so: checkpoints are written on the same disk.
        room = min(self.capacity, total - size + shutil.disk_usage(self.folder).free // 2)
        for _, freed, path in sorted(shards):
            if total <= room:
                return
            path.unlink(missing_ok=True)
            total -= freed

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        with (self.folder / name).open("ab") as handle:  # a file of its own, so threads exclude each other as well
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _make_folder(self) -> None:
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{self.folder} belongs to somebody else")

    def _warn(self, why: str) -> None:
        if not self._warned:
            self._warned = True
            log.warning("the shard cache %s %s: row groups are read over the network", self.folder, why)


def _is_abandoned(part: Path) -> bool:
    with part.open("rb") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True
