"""Every object below a prefix, page by page and several prefixes at a time, in memory that does not grow with them.

A store answers 1,000 keys a request, one request after the other. So sub-folders are listed side by side: while
threads are idle, a prefix is listed with its sub-folders apart, and each of them, or a run of many small ones, becomes
work for another thread. One flat prefix is simply paged.
"""

from __future__ import annotations

import itertools
import os
import re
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from fsspec.asyn import sync

from pipelines.storage import Entry, Folder, local_entry, storage_errors

PAGE = 1000
THREADS = 16
DATE = re.compile(rb"<LastModified>[^<]*</LastModified>")


def pages(folder: Folder, *, threads: int = THREADS) -> Iterator[list[Entry]]:
    """The entries that `Folder.list` gives, in pages and in no order. Raises StorageError as it does.

    Whoever stops early calls `close()` on it, or lets it go.
    """
    if folder.is_s3:
        return _S3Listing(folder, threads).pages()
    return _batched(_local(folder) if folder.local else folder.list())


def entry_of(folder: Folder, key: str) -> Entry | None:
    """The entry of one object, None where there is none."""
    with storage_errors(folder.uri_of(key)):
        if folder.local:
            path = folder.path_of(key)
            return local_entry(path, key) if os.path.isfile(path) else None
        return next((entry for entry in itertools.islice(folder.list(key), 1) if entry.key == key), None)


def _batched(entries: Iterator[Entry]) -> Iterator[list[Entry]]:
    while page := list(itertools.islice(entries, PAGE)):
        yield page


# ------------------------------------------------------------------------------------------------------ a local disk


def _local(folder: Folder) -> Iterator[Entry]:
    """As Folder.list, but a folder is never held whole: only the folders on the way down are open."""
    with storage_errors(folder.uri), ExitStack() as stack:
        # (the folder's key with a slash, its entries); the last is the one that is read
        trail = [("", stack.enter_context(os.scandir(folder.path)))]
        while trail:
            above, entries = trail[-1]
            try:
                found = next(entries, None)
            except FileNotFoundError:
                found = None  # the folder was removed meanwhile
            if found is None:
                entries.close()
                trail.pop()
                continue
            key = above + found.name
            if found.is_dir():
                try:
                    trail.append((f"{key}/", stack.enter_context(os.scandir(found.path))))
                except FileNotFoundError:
                    continue
            elif (entry := local_entry(found.path, key)) is not None:
                yield entry


# ---------------------------------------------------------------------------------------------------------------- S3


@dataclass(frozen=True)
class _Prefix:
    """All objects under a prefix; or only those in its sub-folders from `first` to `last`, both included."""

    prefix: str
    first: str | None = None
    last: str | None = None


class _S3Listing:
    """Threads that take prefixes off a stack and put pages into a queue. One lock guards both."""

    def __init__(self, folder: Folder, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.bucket, _, root = folder.path.partition("/")
        self.root = f"{root}/" if root else ""
        self.changed = threading.Condition()
        self.work = [_Prefix(self.root)]
        self.busy = 0
        self.ready: deque[list[Entry]] = deque()
        self.error: BaseException | None = None
        self.stopped = False

    def pages(self) -> Iterator[list[Entry]]:
        with storage_errors(self.folder.uri):
            self._leave_out_dates()
        workers = [threading.Thread(target=self._run, name=f"list-{i}", daemon=True) for i in range(self.threads)]
        for worker in workers:
            worker.start()
        try:
            while (page := self._next()) is not None:
                yield page
        finally:
            with self.changed:
                self.stopped = True
                self.changed.notify_all()
            for worker in workers:
                worker.join()

    def _leave_out_dates(self) -> None:
        """Nobody needs them, and to parse one costs botocore more than all else of an object."""
        filesystem = self.folder.fs
        sync(filesystem.loop, filesystem.set_session)
        client = sync(filesystem.loop, filesystem.get_s3, self.bucket)
        client.meta.events.register("before-parse.s3.ListObjectsV2", _leave_out_dates, unique_id="repsep-dates")

    def _next(self) -> list[Entry] | None:
        with self.changed:
            self.changed.wait_for(lambda: self.ready or self.error or not (self.work or self.busy))
            if self.error is not None:
                raise self.error
            page = self.ready.popleft() if self.ready else None
            self.changed.notify_all()
            return page

    def _run(self) -> None:
        while (prefix := self._take()) is not None:
            try:
                with storage_errors(self.folder.uri):
                    self._list(prefix)
            except BaseException as error:  # raised again where the pages are consumed
                with self.changed:
                    self.error = self.error or error
                    self.stopped = True
            with self.changed:
                self.busy -= 1
                self.changed.notify_all()

    def _take(self) -> _Prefix | None:
        with self.changed:
            self.changed.wait_for(lambda: self.work or self.stopped or not self.busy)
            if self.stopped or not self.work:
                return None
            self.busy += 1
            return self.work.pop()

    def _put(self, page: list[Entry]) -> bool:
        """Hand a page over, when there is room; False if nobody wants more."""
        with self.changed:
            self.changed.wait_for(lambda: self.stopped or len(self.ready) < self.threads)
            if page and not self.stopped:
                self.ready.append(page)
                self.changed.notify_all()
            return not self.stopped

    def _list(self, prefix: _Prefix) -> None:
        # While others have nothing to do, sub-folders are split off for them. Those of a run are too small for that.
        split = prefix.first is None and len(self.work) < self.threads
        options = {"Delimiter": "/"} if split else {"StartAfter": prefix.first} if prefix.first else {}
        answer: dict[str, Any] = {"IsTruncated": True}
        while answer["IsTruncated"]:
            token = {"ContinuationToken": answer["NextContinuationToken"]} if len(answer) > 1 else {}
            answer = self.folder.fs.call_s3(
                "list_objects_v2", Bucket=self.bucket, Prefix=prefix.prefix, **options, **token
            )
            answer.setdefault("IsTruncated", False)
            contents = answer.get("Contents", [])
            if split:
                self._share(prefix.prefix, [found["Prefix"] for found in answer.get("CommonPrefixes", [])])
            wanted = [item for item in contents if _is_within(item["Key"], prefix)]
            if not self._put([entry for item in wanted if (entry := self._entry(item)) is not None]):
                return
            if prefix.last is not None and contents and _is_beyond(contents[-1]["Key"], prefix.last):
                return

    def _share(self, above: str, folders: list[str]) -> None:
        """Make work of a page of sub-folders: one by one where they are few, else in runs."""
        if not folders:
            return
        with self.changed:
            # While little waits, in small runs for all threads; when there is enough, the page as a whole.
            runs = 2 * self.threads if len(self.work) < 2 * self.threads else 1
            length = -(-len(folders) // runs)
            for start in range(0, len(folders), length):
                run = folders[start : start + length]
                self.work.append(_Prefix(run[0]) if len(run) == 1 else _Prefix(above, run[0], run[-1]))
            self.changed.notify_all()

    def _entry(self, item: dict[str, Any]) -> Entry | None:
        key = item["Key"][len(self.root) :]
        if not key or key.endswith("/"):
            return None  # a folder's marker
        return Entry(key, int(item["Size"]), str(item["ETag"]).strip('"'))


def _leave_out_dates(response_dict: dict[str, Any], **_: Any) -> None:
    response_dict["body"] = DATE.sub(b"", response_dict["body"])


def _is_within(key: str, prefix: _Prefix) -> bool:
    """What lies directly under the prefix of a run came with the page that named its sub-folders."""
    if prefix.first is None or prefix.last is None:
        return True
    return "/" in key[len(prefix.prefix) :] and not _is_beyond(key, prefix.last)


def _is_beyond(key: str, last: str) -> bool:
    return key > last and not key.startswith(last)
