"""What a checkpoint is, and the folder of a run's: uploaded, listed, verified, removed.

    <run>/checkpoint_00000400_5f3a91c2/
        state.pt                        model, average and optimizer; under FSDP2 .metadata and __<rank>_*.distcp,
                                        of which every rank uploads its own
        best/                           the best model so far, in its inference form
        files-<rank>.json               ranks over 0: size and SHA-256 of what they wrote
        checkpoint.json                 rank 0's last: where training is, and the same of what it wrote

A checkpoint counts when all ranks' lists and all that they name are there with the right digests, whoever else knows of
it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.errors import RepsepError
from pipelines.storage import BLOCK_SIZE, Folder, storage_errors

FORMAT = 1
RECORD, PREFIX, BEST = "checkpoint.json", "checkpoint_", "best"


class DamagedCheckpointError(RepsepError):
    """A checkpoint that is not whole: half-written, or with files that are missing or changed."""


@dataclass(frozen=True)
class Record:
    """What checkpoint.json says: where training is, whose model it is, and rank 0's files with size and SHA-256."""

    step: int
    best_miou: float
    best_step: int
    metrics: dict[str, float]
    model: str
    world_size: int
    writers: int
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    format: int = FORMAT


class CheckpointFolder:
    """The checkpoints of a run at a URI."""

    def __init__(self, uri: str) -> None:
        self.folder = Folder(uri)

    def names(self) -> list[str]:
        """Those that were begun, newest first."""
        return sorted((name for name in self.folder.subfolders() if name.startswith(PREFIX)), reverse=True)

    def uri_of(self, name: str) -> str:
        return self.folder.uri_of(name)

    def was_finished(self, name: str) -> bool:
        """Whether its upload once came to the end, on all ranks that write."""
        data = self.folder.read_if_present(f"{name}/{RECORD}")
        if data is None:
            return False
        try:
            writers = int(json.loads(data)["writers"])
        except (ValueError, KeyError, TypeError):
            return True
        return all(self.folder.size_of(f"{name}/{_list_of(rank)}") is not None for rank in range(1, writers))

    def upload(self, name: str, directory: Path, record: Record | None, rank: int = 0) -> None:
        """Copy what a rank wrote, then the list of it. Raises StorageError, and OSError of the local disk."""
        files = {
            (key := path.relative_to(directory).as_posix()): self._put(f"{name}/{key}", path)
            for path in sorted(directory.rglob("*"))
            if path.is_file()
        }
        if record is None:
            self.folder.write(f"{name}/{_list_of(rank)}", json.dumps(files).encode())
        else:
            content = dataclasses.asdict(dataclasses.replace(record, files=files))
            self.folder.write(f"{name}/{RECORD}", json.dumps(content, indent=1).encode())

    def record(self, name: str) -> Record:
        """Where training was. Raises DamagedCheckpointError."""
        content = self._read_list(name, RECORD)
        if content.get("format") != FORMAT:
            raise DamagedCheckpointError(f"{self.uri_of(name)}: {RECORD} has format {content.get('format')}")
        try:
            return Record(**content)
        except TypeError as error:
            raise DamagedCheckpointError(f"{self.uri_of(name)}: {RECORD} lacks something: {error}") from None

    def fetch(self, name: str, to: Path, below: str = "") -> Record:
        """Copy a checkpoint, or what is below a folder of it, to `to`. Raises DamagedCheckpointError unless whole."""
        record = self.record(name)
        files = dict(record.files)
        for rank in range(1, record.writers):
            files |= self._read_list(name, _list_of(rank))
        for key, expected in files.items():
            if key.startswith(below):
                self._get(f"{name}/{key}", to / key, expected)
        return record

    def remove_before(self, name: str) -> None:
        """Remove those of earlier steps. Never a later one: it may be of a group that replaced a rank left behind."""
        for other in self.names():
            if step_of(other) < step_of(name):
                self.remove(other)

    def remove(self, name: str) -> None:
        """Its record goes first, so that what is half removed is not taken for whole."""
        self.folder.delete(f"{name}/{RECORD}")
        with storage_errors(self.uri_of(name)):
            self.folder.fs.rm(self.folder.path_of(name), recursive=True)

    def _put(self, key: str, path: Path) -> dict[str, Any]:
        digest = hashlib.sha256()
        with storage_errors(self.folder.uri_of(key)), path.open("rb") as source, self.folder.open(key, "wb") as target:
            while piece := source.read(BLOCK_SIZE):
                digest.update(piece)
                target.write(piece)
        return {"size": path.stat().st_size, "sha256": digest.hexdigest()}

    def _get(self, key: str, path: Path, expected: Mapping[str, Any]) -> None:
        uri = self.folder.uri_of(key)
        if (size := self.folder.size_of(key)) != expected["size"]:
            found = "is missing" if size is None else f"has {size} bytes instead of {expected['size']}"
            raise DamagedCheckpointError(f"{uri} {found}")
        path.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        with storage_errors(uri), self.folder.open(key) as source, path.open("wb") as target:
            while piece := source.read(BLOCK_SIZE):
                digest.update(piece)
                target.write(piece)
        if digest.hexdigest() != expected["sha256"]:
            raise DamagedCheckpointError(f"{uri} was changed: its SHA-256 is not the recorded one")

    def _read_list(self, name: str, file: str) -> dict[str, Any]:
        data = self.folder.read_if_present(f"{name}/{file}")
        if data is None:
            raise DamagedCheckpointError(f"{self.uri_of(name)} is unfinished: {file} is missing")
        try:
            content: dict[str, Any] = json.loads(data)
        except ValueError:
            raise DamagedCheckpointError(f"{self.uri_of(name)}: {file} is no JSON") from None
        return content


def name_of(step: int, attempt: str) -> str:
    """Names sort by step; two attempts at a step do not write into each other's files."""
    return f"{PREFIX}{step:08d}_{attempt}"


def step_of(name: str) -> int:
    return int(name.removeprefix(PREFIX).partition("_")[0])


def _list_of(rank: int) -> str:
    return f"files-{rank}.json"
