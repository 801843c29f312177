"""One place that turns a URI into a filesystem and knows about endpoints.

Any fsspec URI works; `s3://` takes endpoint, keys and region from the usual AWS variables (AWS_ENDPOINT_URL,
AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION), as pyarrow and Ray's storage path do by themselves.

A write is whole or absent: one PUT on an object store, a temporary file and a rename on a local disk. On S3 every
operation survives transient faults (`retries.py`), and what `read` returns is what was stored (`checksums.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import posixpath
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

from pipelines.checksums import Checksums
from pipelines.errors import StorageError, UsageError
from pipelines.retries import GaveUpError

TEMPORARY = ".repsep-tmp"
BLOCK_SIZE = 8 * 1024 * 1024
NO_STORE = " Is a store running there? Correct AWS_ENDPOINT_URL if it is another."


@dataclass(frozen=True)
class Entry:
    """One object: `key` relative to the folder that was listed, size in bytes, `etag` its version."""

    key: str
    size: int
    etag: str


class Folder:
    """A folder at a URI. Keys are relative paths with forward slashes and never leave the folder."""

    def __init__(self, uri: str) -> None:
        self.uri = absolute_uri(uri).rstrip("/") or "/"
        if self.uri.endswith(":"):
            raise UsageError(f"{uri}: names no folder; write it as in s3://bucket/folder")
        self.is_s3 = self.uri.startswith(("s3://", "s3a://"))
        with storage_errors(self.uri):
            if self.is_s3:
                # Imported here, as it takes 0.5 s that a run on local folders need not wait.
                from pipelines.patient_s3 import OPTIONS, PatientS3

                self.fs: Any = PatientS3(**OPTIONS)
                self.path: str = self.fs._strip_protocol(self.uri)
            else:
                self.fs, self.path = url_to_fs(self.uri)
        self.local = isinstance(self.fs, LocalFileSystem)
        self._checksums = Checksums()

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

    def read(self, key: str, *, etag: str | None = None, size: int | None = None) -> bytes:
        """The object's bytes. Raises StorageError.

        On S3 they are compared with the ETag that comes with them, and with `etag` and `size` of a listing if given.
        An object that was replaced since that listing is returned as it is now.
        """
        path = self.path_of(key)
        with storage_errors(self.uri_of(key)):
            if self.is_s3:
                return self._checksums.read(lambda: self.fs.get_whole(path), etag, size)
            data: bytes = self.fs.cat_file(path)
            return data

    def read_if_present(self, key: str) -> bytes | None:
        """The object's bytes, or None where there is none."""
        try:
            return self.read(key)
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError) and not _is_bucket_missing(error.__cause__):
                return None
            raise

    def write(self, key: str, data: bytes) -> None:
        """Write or replace the object at once."""
        path = self.path_of(key)
        with storage_errors(self.uri_of(key)):
            if self.local:
                temporary = self._write_beside(path, data)
                os.replace(temporary, path)
            elif self.is_s3:
                self.fs.put_whole(path, data)
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
                if self.is_s3:
                    self.fs.put_whole(path, data, mode="create")
                else:
                    self.fs.pipe_file(path, data, mode="create")
            except FileExistsError:
                pass
            except OSError as error:
                if _s3_code(error) not in ("PreconditionFailed", "412"):
                    raise
            else:
                return True
        # The answer to a PUT that succeeded may have been lost, and its repetition refused: then this is our own.
        return self.read_if_present(key) == data

    def delete(self, key: str) -> None:
        """Remove the object if it is there."""
        with storage_errors(self.uri_of(key)):
            try:
                self.fs.rm_file(self.path_of(key))
            except FileNotFoundError as error:
                if _is_bucket_missing(error):
                    raise

    def size_of(self, key: str) -> int | None:
        """Bytes of the object, None where there is none."""
        with storage_errors(self.uri_of(key)):
            try:
                return int(self.fs.info(self.path_of(key))["size"])
            except FileNotFoundError as error:
                if _is_bucket_missing(error):
                    raise
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
            if self.is_s3:
                yield from self._list_s3(prefix)
            elif self.local:
                yield from self._list_local(prefix)
            else:
                yield from self._list_generic(prefix)

    def subfolders(self) -> Iterator[str]:
        """Names of the folders directly below; none where this folder is missing."""
        with storage_errors(self.uri):
            try:
                found = self.fs.ls(self.path, detail=True)
            except FileNotFoundError as error:
                if _is_bucket_missing(error):
                    raise
                return
            yield from sorted(posixpath.basename(i["name"].rstrip("/")) for i in found if i["type"] == "directory")

    def upload(self, local: Path, key: str = "") -> None:
        """Copy every file of a local folder to `key`."""
        for file in sorted(p for p in local.rglob("*") if p.is_file()):
            self.write(posixpath.join(key, file.relative_to(local).as_posix()), file.read_bytes())

    def sha256(self, key: str) -> str:
        """Hex digest of the object, read in pieces."""
        digest = hashlib.sha256()
        with storage_errors(self.uri_of(key)), self.open(key) as handle:
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
        try:
            with open(temporary, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
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

    def _list_local(self, prefix: str) -> Iterator[Entry]:
        # NOTE fsspec's find() leaves out folders that may not be read and takes a linked folder for a file.
        found: list[Entry] = []
        for folder, _, names in os.walk(self.path, onerror=self._onerror, followlinks=True):
            for name in names:
                path = os.path.join(folder, name)
                key = os.path.relpath(path, self.path)
                if key.startswith(prefix) and (entry := local_entry(path, key)) is not None:
                    found.append(entry)
        yield from sorted(found, key=lambda entry: entry.key)

    def _onerror(self, error: OSError) -> None:
        if not isinstance(error, FileNotFoundError) or error.filename == self.path:
            raise error

    def _list_generic(self, prefix: str) -> Iterator[Entry]:
        if not self.fs.exists(self.path):
            raise FileNotFoundError(f"no such folder: {self.path}")
        found = self.fs.find(self.path, detail=True)
        for path in sorted(found):
            key = path[len(self.path) :].lstrip("/")
            if key.startswith(prefix):
                yield Entry(key, int(found[path]["size"]), _etag(found[path]))


def local_entry(path: str, key: str) -> Entry | None:
    """The entry of a local file; None for an unfinished write, a file deleted meanwhile and what is no regular file.

    Raises StorageError for a link that leads nowhere.
    """
    if os.path.basename(path).startswith(TEMPORARY):
        return None
    try:
        status = os.stat(path)
    except FileNotFoundError:
        if os.path.islink(path):
            raise StorageError(f"{path}: this link leads nowhere; mend it or remove it.") from None
        return None
    if not stat.S_ISREG(status.st_mode):
        return None
    return Entry(key, status.st_size, f"{status.st_size}-{status.st_mtime_ns}")


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
    return absolute_uri(uri).startswith(("/", "file://", "local://", "sqlite:"))


@contextlib.contextmanager
def storage_errors(uri: str) -> Iterator[None]:
    """Turn what filesystems raise into a StorageError that names the URI and says what to do."""
    try:
        yield
    except (StorageError, UsageError):
        raise
    except FileNotFoundError as error:
        raise StorageError(_missing(uri, error)) from error
    except PermissionError as error:
        hint = (
            "check AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, and that they may read and write there"
            if uri.startswith("s3")
            else "check the permissions of the folder"
        )
        raise StorageError(f"{uri}: access was refused ({_reason(error)}); {hint}.{_endpoint_hint(uri)}") from error
    except ValueError as error:
        if "protocol" in str(error).lower():
            raise UsageError(f"{uri}: no filesystem for this kind of URI ({error}).") from error
        raise
    except ImportError as error:
        raise UsageError(f"{uri}: {error}") from error
    except GaveUpError as error:
        raise StorageError(f"{uri}: {error}.{_endpoint_hint(uri)}{NO_STORE if error.unanswered else ''}") from error
    except OSError as error:
        raise StorageError(f"{uri}: {_reason(error)}.{_endpoint_hint(uri)}") from error
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("botocore", "aiobotocore", "aiohttp"):
            raise StorageError(f"{uri}: {type(error).__name__}: {error}.{_endpoint_hint(uri)}{NO_STORE}") from error
        raise


def _missing(uri: str, error: Exception) -> str:
    if _is_bucket_missing(error):
        bucket = uri.partition("://")[2].partition("/")[0]
        return f"{uri}: there is no bucket {bucket!r}; create it or correct the name.{_endpoint_hint(uri)}"
    return f"{uri}: there is nothing there; correct the path.{_endpoint_hint(uri)}"


def _is_bucket_missing(error: BaseException) -> bool:
    return _s3_code(error) == "NoSuchBucket"


def _s3_code(error: BaseException) -> str:
    """The store's own word for the failure behind an error of s3fs, "" where there is none.

    NOTE the text beside it is the store's to choose: Ceph sends none.
    """
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))


def _reason(error: BaseException) -> str:
    return str(error.__cause__ if _s3_code(error) else error)


def _endpoint_hint(uri: str) -> str:
    if not uri.startswith("s3"):
        return ""
    endpoint = (
        os.environ.get("AWS_ENDPOINT_URL_S3")
        or os.environ.get("AWS_ENDPOINT_URL")
        or "AWS (no AWS_ENDPOINT_URL is set)"
    )
    return f" The endpoint in use is {endpoint}."


def _etag(info: dict[str, Any]) -> str:
    for name in ("ETag", "etag", "md5", "mtime", "created"):
        if info.get(name) is not None:
            return str(info[name]).strip('"')
    return str(info["size"])
