"""A model's URI to a directory here: `models:/name@alias`, `models:/name/version`, or a directory anywhere."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import tracking
from pipelines.config import TrackingConfig
from pipelines.errors import RepsepError, UsageError
from pipelines.storage import Folder

if TYPE_CHECKING:
    from repsep_model.segmentor import Segmentor

FILES = ("model.safetensors", "segmentor.json", "classes.json")  # checkpoint.py has them too, but loads torch
REGISTERED = re.compile(r"^models:/([^/@]+)(?:@([^/@]+)|/(\d+))$")


@dataclass(frozen=True)
class FetchedModel:
    """A segmentor's directory here, its URI (an alias resolved), what it is called, and the SHA-256 of its files."""

    directory: Path
    uri: str
    version: str
    digest: str

    @property
    def classes(self) -> dict[str, Any]:
        """The content of classes.json."""
        found: dict[str, Any] = json.loads((self.directory / FILES[2]).read_text())
        return found

    def files(self) -> dict[str, bytes]:
        """Its files' contents: what goes through Ray's object store to workers."""
        return {name: (self.directory / name).read_bytes() for name in FILES}


@contextlib.contextmanager
def fetch_model(uri: str, config: TrackingConfig) -> Iterator[FetchedModel]:
    """Download a model for the time of the block. An alias is resolved once, here.

    Raises UsageError for a URI that cannot be understood and RepsepError for a model that is not there, or of which a
    file is not the one that was registered.
    """
    with tempfile.TemporaryDirectory(prefix="repsep-model-") as temporary:
        directory = Path(temporary) / "segmentor"  # MLflow names the artifact after the folder
        directory.mkdir()
        version, registered = uri, None
        if uri.startswith("models:"):
            found = REGISTERED.match(uri)
            if found is None:
                raise UsageError(f"{uri}: write models:/name@alias or models:/name/version")
            name, alias, number = found.groups()
            version, registered = tracking.download_registered(config, name, alias=alias, version=number, to=directory)
            uri = f"models:/{version}"
        else:
            folder = Folder(uri)
            for file in FILES:
                data = folder.read_if_present(file)
                if data is None:
                    raise RepsepError(
                        f"{uri} holds no segmentor: {file} is missing; give a directory that "
                        "training or save_segmentor wrote"
                    )
                (directory / file).write_bytes(data)
        present = {f: (directory / f).read_bytes() for f in FILES if (directory / f).is_file()}
        digest = digest_of_files(present)
        if (registered is not None and digest != registered) or len(present) < len(FILES):
            raise RepsepError(f"the files of {uri} are not those that were registered. {tracking.REPLACE}")
        yield FetchedModel(directory, uri, version, digest)


def digest_of_files(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names and contents."""
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0".encode() + hashlib.sha256(files[name]).digest())
    return digest.hexdigest()


def load_files(files: Mapping[str, bytes]) -> Segmentor:
    """The segmentor of `FetchedModel.files`, in a worker. Raises RepsepError."""
    # Imported here: torch takes 3 s, which a driver that only hands the files on need not wait.
    from repsep_model.checkpoint import load_segmentor
    from repsep_model.pretrained import CheckpointError

    with tempfile.TemporaryDirectory(prefix="repsep-model-") as temporary:
        for name, data in files.items():
            (Path(temporary) / name).write_bytes(data)
        try:
            return load_segmentor(temporary)
        except CheckpointError as error:
            raise RepsepError(f"the model cannot be loaded: {error}") from error
