"""One place that turns a URI into a filesystem and knows about endpoints.

Any fsspec URI works; `s3://` takes endpoint, keys and region from the usual AWS variables (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION), as pyarrow and Ray's storage path do by themselves.

A write is whole or absent: one PUT on an object store, a temporary file and a rename on a local disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import secrets
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipelines.errors import StorageError, UsageError

TEMPORARY = ".repsep-tmp"
BLOCK_SIZE = 8 * 1024 * 1024
S3_OPTIONS: dict[str, Any] = {
    "use_listings_cache": False,  # another worker may have written since
    "config_kwargs": {"connect_timeout": 5, "read_timeout": 60, "retries": {"max_attempts": 4, "mode": "standard"}},
}


@dataclass(frozen=True)
class Entry:
    """One object: `key` relative to the folder that was listed, size in bytes, `etag` its version."""

    key: str
    size: int
    etag: str


class Folder:
    """A folder at a URI. Keys are relative paths with forward slashes and never leave the folder."""

    def __init__(self, uri: str) -> None:
        self.uri = absolute_uri(uri).rstrip("/")
        with storage_errors(self.uri):
            options = S3_OPTIONS if self.uri.startswith(("s3://", "s3a://")) else {}
            self.fs, self.path = url_to_fs(self.uri, **options)
        self.local = isinstance(self.fs, LocalFileSystem)
        self.is_s3 = bool(options)

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __truediv__(self, key: str) -> Folder:
        return Folder(self.uri_of(key))

    def uri_of(self, key: str) -> str:
        """The URI of an object in this folder."""
        return f"{self.uri}/{self._checked(key)}"

    def path_of(self, key: str) -> str:
        """The same in the filesystem's own form."""
        return f"{self.path}/{self._checked(key)}"

    def read(self, key: str) -> bytes:
        """The object's bytes. Raises StorageError."""
        with storage_errors(self.uri_of(key)):
            data: bytes = self.fs.cat_file(self.path_of(key))
            return data

    def read_if_present(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        try:
            return self.read(key)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError) and "bucket" not in str(error.__cause__).lower():
                return None
            raise

    def write(self, key: str, data: bytes) -> None:
        """Write or replace the object at once."""
        path = self.path_of(key)
        with storage_errors(self.uri_of(key)):
            if self.local:
                temporary = self._write_beside(path, data)
                os.replace(temporary, path)
            else:
                self.fs.pipe_file(path, data)

    def create(self, key: str, data: bytes) -> bool:
        """Write the object unless there is one; False if there is. Exactly one of several writers wins."""
        path = self.path_of(key)
        with storage_errors(self.uri_of(key)):
            if self.local:
                temporary = self._write_beside(path, data)
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                finally:
                    os.unlink(temporary)
                return True
            try:
                self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                if "PreconditionFailed" in str(error) or "pre-conditions" in str(error):
                    return False
                raise
            return True

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        with storage_errors(self.uri_of(key)), contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path_of(key))

    def size_of(self, key: str) -> int | None:
        """Bytes of the object, None where there is none."""
        with storage_errors(self.uri_of(key)):
            try:
                return int(self.fs.info(self.path_of(key))["size"])
            except FileNotFoundError:
                return None

    def open(self, key: str, mode: str = "rb") -> IO[bytes]:
        """A file object; on an object store a written file appears when it is closed."""
        with storage_errors(self.uri_of(key)):
            if self.local and mode != "rb":
                os.makedirs(os.path.dirname(self.path_of(key)), exist_ok=True)
            handle: IO[bytes] = self.fs.open(self.path_of(key), mode, block_size=BLOCK_SIZE)
            return handle

    def list(self, prefix: str = "") -> Iterator[Entry]:
        """Objects below `prefix`, in order of key, page by page. Folder markers and unfinished writes are left out.

        Raises StorageError if the bucket or the local folder is not there.
        """
        with storage_errors(self.uri_of(prefix) if prefix else self.uri):
            yield from self._list_s3(prefix) if self.is_s3 else self._list_generic(prefix)

    def subfolders(self) -> Iterator[str]:
        """Names of the folders directly below; none where this folder is missing."""
        with storage_errors(self.uri):
            try:
                found = self.fs.ls(self.path, detail=True)
            except FileNotFoundError:
                return
            yield from sorted(posixpath.basename(i["name"].rstrip("/")) for i in found if i["type"] == "directory")

    def upload(self, local: Path, key: str = "") -> None:
        """Copy every file of a local folder to `key`."""
        for file in sorted(p for p in local.rglob("*") if p.is_file()):
            self.write(posixpath.join(key, file.relative_to(local).as_posix()), file.read_bytes())

    def download(self, local: Path) -> None:
        """Copy every object to a local folder."""
        for entry in self.list():
            target = local / entry.key
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(self.read(entry.key))

    def sha256(self, key: str) -> str:
        """Hex digest of the object, read in pieces."""
        digest = hashlib.sha256()
        with self.open(key) as handle:
            while piece := handle.read(BLOCK_SIZE):
                digest.update(piece)
        return digest.hexdigest()

    def _checked(self, key: str) -> str:
        # On an object store ".." is a name like any other; on a disk it would leave the folder.
        if self.local and (key.startswith("/") or ".." in key.split("/")):
            raise UsageError(f"the key {key!r} would leave its folder {self.uri}")
        return key

    def _write_beside(self, path: str, data: bytes) -> str:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        temporary = os.path.join(os.path.dirname(path), f"{TEMPORARY}-{secrets.token_hex(8)}")
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        return temporary

    def _list_s3(self, prefix: str) -> Iterator[Entry]:
        bucket, _, root = self.path.partition("/")
        root = f"{root}/" if root else ""
        page: dict[str, Any] = {}
        while True:
            token = {"ContinuationToken": page["NextContinuationToken"]} if page.get("IsTruncated") else {}
            page = self.fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=root + prefix, **token)
            for item in page.get("Contents", []):
                key = item["Key"][len(root) :]
                if key and not key.endswith("/"):
                    yield Entry(key, int(item["Size"]), str(item["ETag"]).strip('"'))
            if not page.get("IsTruncated"):
                return

    def _list_generic(self, prefix: str) -> Iterator[Entry]:
        if not self.fs.exists(self.path):
            raise FileNotFoundError(f"no such folder: {self.path}")
        found = self.fs.find(self.path, detail=True)
        for path in sorted(found):
            key = path[len(self.path) :].lstrip("/")
            if key.startswith(prefix) and not posixpath.basename(key).startswith(TEMPORARY):
                info = found[path]
                yield Entry(key, int(info["size"]), _etag(path, info, self.local))


def home() -> Path:
    """Where relative things live: $REPSEP_HOME, else ~/.repsep under a Ray job, else .repsep in the current folder.

    A Ray job runs in a throw-away copy of the working directory: what it wrote there would be lost.
    """
    if configured := os.environ.get("REPSEP_HOME"):
        return Path(configured).expanduser().absolute()
    return Path.home() / ".repsep" if in_ray_job() else Path(".repsep").absolute()


def in_ray_job() -> bool:
    """Whether this process was started by `ray job submit`."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


def absolute_uri(uri: str) -> str:
    """A URI as it is; a relative path against the current folder, or against `home()` under a Ray job."""
    if "://" in uri:
        return uri
    path = Path(uri).expanduser()
    if not path.is_absolute():
        path = (home() if in_ray_job() else Path.cwd()) / path
    return str(path)


def is_local(uri: str) -> bool:
    """Whether other machines cannot see it."""
    return absolute_uri(uri).startswith(("/", "file://", "local://"))


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn what filesystems raise into a StorageError that names the URI and says what to do."""
    try:
        yield
    except (StorageError, UsageError):
        raise
    except FileExistsError:
        raise
    except FileNotFoundError as error:
        raise StorageError(_missing(uri, error)) from error
    except PermissionError as error:
        hint = (
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may read and write there"
            if uri.startswith("s3")
            else "check the permissions of the folder"
        )
        raise StorageError(f"{uri}: access was refused ({error}); {hint}.") from error
    except ValueError as error:
        if "protocol" in str(error).lower():
            raise UsageError(f"{uri}: no filesystem for this kind of URI ({error}).") from error
        raise
    except ImportError as error:
        raise UsageError(f"{uri}: {error}") from error
    except OSError as error:
        raise StorageError(f"{uri}: {error}.{_endpoint_hint(uri)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            raise StorageError(f"{uri}: {type(error).__name__}: {error}.{_endpoint_hint(uri)}") from error
        raise


def _missing(uri: str, error: Exception) -> str:
    if "bucket" in str(error).lower() and uri.startswith("s3"):
        bucket = uri.partition("://")[2].partition("/")[0]
        return f"{uri}: there is no bucket {bucket!r} at this endpoint; create it or correct the name.{_endpoint_hint(uri)}"
    return f"{uri}: there is nothing there; correct the path.{_endpoint_hint(uri)}"


def _endpoint_hint(uri: str) -> str:
    if not uri.startswith("s3"):
        return ""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "AWS (no AWS_ENDPOINT_URL is set)"
    return f" The endpoint in use is {endpoint}."


def _etag(path: str, info: dict[str, Any], local: bool) -> str:
    if local:
        return f"{info['size']}-{os.stat(path).st_mtime_ns}"
    for name in ("ETag", "etag", "md5", "mtime", "created"):
        if info.get(name) is not None:
            return str(info[name]).strip('"')
    return str(info["size"])
