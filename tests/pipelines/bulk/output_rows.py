"""Rows of bulk outputs for tests, and a folder that can be interrupted at any of its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

from pipelines.bulk.commits import Output
from pipelines.storage import Entry, Folder

START = datetime(2026, 11, 22, tzinfo=UTC)
SETTINGS = {"format": 1, "model": "m1", "bf16": True}
NAMES = {"name": "streets", "classes": [{"id": 0, "name": "sky", "color": [0, 0, 255]}]}


def row(key: str, *, etag: str = "v1", ok: bool = True, at: int = 0) -> dict[str, Any]:
    """An image's row, `at` seconds after START."""
    return {
        "key": key,
        "uri": uri_of(key),
        "etag": etag,
        "status": "ok" if ok else "failed",
        "height": 2 if ok else None,
        "width": 3 if ok else None,
        "pixels": [4, 0, 2] if ok else None,
        "finished_at": START + timedelta(seconds=at),
    }


def shard_rows(shard: str, states: str, *, etag: str = "v1", at: int = 0) -> list[dict[str, Any]]:
    """The rows of a shard's images; `states` has a letter for each, o for ok and f for failed."""
    return [
        row(f"{shard}#{number}", etag=etag, ok=letter == "o", at=at) | {"uri": uri_of(shard)}
        for number, letter in enumerate(states)
    ]


def uri_of(key: str) -> str:
    return f"s3://bucket/in/{key}"


def claimed(uri: str) -> Output:
    output = Output(Folder(uri))
    output.claim(SETTINGS, NAMES, overwrite=False)
    return output


def state(output: Output) -> list[tuple[str, str, str]]:
    """(key, etag, status) of the results, in order of key."""
    return [(r["key"], r["etag"], r["status"]) for r in output.results().to_pylist()]


class Watched(Folder):
    """A folder that tells, before it does anything, what it is going to do."""

    def __init__(self, uri: str, before: Callable[[str, str], None]) -> None:
        super().__init__(uri)
        self.before = before

    def __truediv__(self, key: str) -> Watched:
        self.before("list", key)  # nothing else is done with the folders in an output
        return Watched(self.uri_of(key), lambda *_: None)

    def read(self, key: str, **options: Any) -> bytes:
        self.before("read", key)
        return super().read(key, **options)

    def write(self, key: str, data: bytes) -> None:
        self.before("write", key)
        super().write(key, data)

    def create(self, key: str, data: bytes) -> bool:
        self.before("create", key)
        return super().create(key, data)

    def delete(self, key: str) -> None:
        self.before("delete", key)
        super().delete(key)

    def list(self, prefix: str = "") -> Iterator[Entry]:
        self.before("list", prefix)
        return super().list(prefix)


class KilledError(BaseException):
    """As a signal: nothing of the pipeline catches it."""


class AtStep:
    """Does something before the storage operation of this number, once; from then on the process is dead if it died."""

    def __init__(self, number: int, do: Callable[[], None]) -> None:
        self.number, self.do, self.steps, self.dead = number, do, 0, False

    def __call__(self, operation: str, key: str) -> None:
        if self.dead:  # other threads of a killed process do nothing more
            raise KilledError
        self.steps += 1
        if self.steps == self.number + 1:
            try:
                self.do()
            except KilledError:
                self.dead = True
                raise

    @property
    def is_done(self) -> bool:
        return self.steps > self.number


def die() -> None:
    raise KilledError
